"""The classifier must catch what is known to be bad and must not tell a source from itself."""

import random

import pytest

from model.evaluation.realism import detection, features, shuffled
from model.text import sentences

NAMES = "Mia Tom Ben Lily Sam Anna Max Sue".split()
THINGS = "kite ball drum boat cake shell hat lamp".split()


def coherent(n, seed):
    """Stories that keep their name and thing."""
    rng = random.Random(seed)
    stories = []
    for _ in range(n):
        who, what = rng.choice(NAMES), rng.choice(THINGS)
        lines = [
            f"One day, {who} found a {what} in the grass.",
            f"The {what} was old, but {who} liked it.",
            f'"Look at my {what}," said {who}, "it is so nice!"',
            f"Then the wind took the {what} away and {who} was sad.",
            f"A bird brought the {what} back.",
            f"So {who} was happy and slept next to the {what}.",
        ]
        middle = rng.sample(lines[1:-1], rng.randint(2, 4))
        stories.append(" ".join([lines[0], *middle]) + "\n" + lines[-1])
    return stories


def test_sentences_shuffled_between_stories_are_caught():
    caught = detection(coherent(100, 1), shuffled(coherent(100, 2)), n_splits=4)
    assert caught["accuracy"] > 0.9 and (caught["stories"], caught["splits"]) == (100, 4)


def test_two_halves_of_one_source_are_not_told_apart():
    found = detection(coherent(150, 3), coherent(150, 4), n_splits=8)
    assert found["accuracy"] == pytest.approx(0.5, abs=0.1) and found["deviation"] < 0.15


def test_the_same_stories_give_the_same_accuracy():
    arguments = coherent(30, 1), shuffled(coherent(40, 2))
    assert detection(*arguments, n_splits=2) == detection(*arguments, n_splits=2)


def test_shuffling_keeps_sentences_and_paragraphs():
    stories = coherent(20, 5)
    dealt = shuffled(stories)
    assert sorted(s for text in dealt for s in sentences(text)) == sorted(
        s for text in stories for s in sentences(text)
    )
    assert [text.count("\n") for text in dealt] == [text.count("\n") for text in stories] and dealt != stories


def test_features_count_what_they_say():
    found = features('Tom saw Ben. "Go on," said Ben. Ben ran. A fox ate.')
    assert (found["words"], found["sentences"], found["sentence_longest"]) == (12, 4, 4)
    assert found["speech"] == pytest.approx(2 / 12) and found["names"] == 1 and found["ends_well"]
    assert found["same_start"] == 0 and found["known_words"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert set(features("")) == set(found)
