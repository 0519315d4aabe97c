"""Measures of stories on texts small enough to count by hand."""

import pytest

from model.evaluation.following import Idea, following, is_kept, read_ideas, sentences_with
from model.evaluation.stories import distinct_n, measure_texts, name_consistency, reading_grade, repeated_sentences
from model.text import names, sentences, words


def test_sentences_end_where_a_reader_would_say():
    text = '"Oh!" said Ben. Mr. Fox ran 3 miles. "Hi!" Tom cried.\nIt was "fun." 2 dogs came ... and ate'
    assert sentences(text) == [
        '"Oh!" said Ben.',
        "Mr. Fox ran 3 miles.",
        '"Hi!"',
        "Tom cried.",
        'It was "fun."',
        "2 dogs came ... and ate",
    ]
    assert sentences("... !") == [] and sentences("") == []
    assert words("Don't STOP, Zoë's 2!") == ["don't", "stop", "zoë's", "2"]


def test_repeated_sentences_are_counted_without_case_and_marks_and_short_ones_never():
    text = 'The dog ran home. "Oh!" said Ben. The dog ran home! "Oh!" said Ben. THE DOG, ran home. The cat ran home.'
    assert repeated_sentences(text) == 2
    assert measure_texts([text, "One. Two."])["repeated_sentences"] == 2 / 8


def test_distinct_n_is_of_the_first_so_many():
    assert distinct_n(["a b a b a"], 1) == 2 / 5
    assert distinct_n(["a b a b a"], 2) == 2 / 4
    assert distinct_n(["a b", "b a"], 2) == 1  # no n-gram crosses from story to story
    assert distinct_n(["a b a b a"], 1, most=2) == 1
    assert distinct_n(["a"], 2) == 0


def test_a_name_has_its_capital_within_a_sentence():
    text = 'One day Lily met Tom. Tom said, "Come, Ben!" On Monday she saw Mom. Tomorrow, Zed ran.'
    assert names(text) == [["Lily", "Tom"], ["Tom", "Ben"], [], ["Zed"]]


def test_lost_late_and_doubled_names():
    lost = "A girl named Lily met Tom. They ran. Then they ate. So Lily slept."  # Tom is lost
    late = "A boy called Max ran. He sat. Max ate. Then came Sue."  # Sue is late
    twice = "A cat named Max had a cat named Max. It slept."
    scores = name_consistency([lost, late, twice])
    assert scores["names_per_story"] == 5 / 3
    assert scores["names_lost"] == 2 / 4  # of Lily, Tom, Max, Max: Tom, and Max of the two sentences
    assert scores["names_late"] == 1 / 5
    assert scores["name_given_twice"] == 1 / 3
    assert name_consistency(["nothing here"])["names_lost"] == 0


def test_reading_grade_is_flesch_and_kincaids():
    # 8 words in 2 sentences, 9 syllables.
    assert reading_grade(["The cat sat here. The dog named Happy ran."]) == pytest.approx(
        0.39 * 9 / 2 + 11.8 * 10 / 9 - 15.59
    )


STORY = "The dragon lit a fire. It ran. It sat. It ate. The Dragon slept. It rained. It slept. Dragons' fires burned."


@pytest.mark.parametrize(
    ("forms", "places", "kept"),
    [
        (["dragon", "dragons"], [0, 4, 7], True),
        (["dragon"], [0, 4], False),  # the last third of eight sentences begins with the seventh
        (["fire"], [0], False),
        (["fire", "fires"], [0, 7], True),
        (["rained", "slept"], [4, 5, 6], True),
        (["drag"], [], False),
    ],
)
def test_what_is_kept(forms, places, kept):
    assert sentences_with(STORY, forms) == (places, 8)
    assert is_kept(STORY, forms) == kept


def test_following_counts_both():
    ideas = [Idea("a dragon and a fire", ("dragon", "dragons"), ("fire", "fires")), Idea("x", ("dragon",), ("cat",))]
    assert following(ideas, [STORY, STORY]) == {
        "character_kept": 0.5,
        "thing_kept": 0.5,
        "both_kept": 0.5,
        "words_used": 0.75,
    }


def test_the_ideas_name_what_they_are_annotated_with():
    ideas = read_ideas()
    assert len({idea.idea for idea in ideas}) == len(ideas) == 200
    for idea in ideas:
        assert sentences_with(idea.idea, idea.character)[0] and sentences_with(idea.idea, idea.thing)[0], idea
        assert not set(idea.character) & set(idea.thing)


def test_an_empty_story_is_measured_too():
    assert measure_texts([""])["median_words"] == 0
    assert following([Idea("x", ("dragon",), ("cat",))], [""])["words_used"] == 0
