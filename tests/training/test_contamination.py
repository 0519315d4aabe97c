"""Copies of validation text in a corpus are found, whatever their dress."""

import random

from model.training.contamination import contamination

WORDS = [f"w{i}" for i in range(500)]


def story(seed, n=60):
    return random.Random(seed).choices(WORDS, k=n)


def test_copies_near_copies_and_shared_passages_are_told_apart():
    validation = [story(i) for i in range(4)]
    training = [
        " ".join(validation[0]).upper().replace(" ", ", ") + "!",  # word for word
        " ".join([*validation[1][:40], *story(90, 20)]),  # two thirds of it
        " ".join([*story(91, 30), *validation[2][:20], *story(92, 30)]),  # a passage of 20 words
        " ".join(story(93)),
    ]
    found = contamination(training, [" ".join(words) for words in validation])
    assert (found["exact"], found["near"], found["stories"]) == (1, 2, 4)
    n_13 = 60 - 13 + 1
    assert found["share_13"] == (n_13 + (40 - 12) + (20 - 12)) / (4 * n_13)


def test_half_a_copy_spread_over_two_stories_is_none():
    whole = story(1)
    training = [" ".join(whole[:30]), " ".join(whole[30:])]
    assert contamination(training, [" ".join(whole)])["near"] == 0


def test_nothing_in_common():
    found = contamination([" ".join(story(1))], [" ".join(story(2))])
    assert found == {"exact": 0, "near": 0, "share_13": 0.0, "stories": 1}
