"""Overlap: runs planted in a corpus are found at their length; BLEU and chrF at their ends of the scale."""

import pytest

from model.evaluation.overlap import continuation_overlap, copied, self_bleu

ALPHABET = " ".join("alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november".split())
OWN = "one two three four five six seven eight nine ten"


def test_the_longest_run_is_found_whatever_its_case_and_marks():
    corpus = ["something else entirely", f"before {ALPHABET} after"]
    planted = " ".join(ALPHABET.split()[2:12])  # ten words: three 8-grams
    scores = copied([f"{OWN} {planted.upper().replace(' ', ', ')} {OWN}"], iter(corpus))
    assert scores["longest_run_median"] == scores["longest_run_most"] == 10
    assert scores["copied_8grams"] == pytest.approx(3 / 23) and scores["copied_13grams"] == 0


def test_a_copied_story_and_one_of_seven_copied_words():
    seven = " ".join(ALPHABET.split()[:7])
    scores = copied([ALPHABET, f"{seven} {OWN}"], [ALPHABET])
    assert (scores["longest_run_median"], scores["longest_run_most"]) == (7, 14)
    assert scores["copied_13grams"] == pytest.approx(2 / (2 + 5))
    assert copied(["too short"], [ALPHABET])["longest_run_most"] == 0


def test_self_bleu_is_high_for_stories_that_are_all_alike():
    assert self_bleu([ALPHABET] * 5) == pytest.approx(100)
    assert self_bleu([ALPHABET, OWN]) < 1
    assert self_bleu([ALPHABET]) == 0


def test_the_real_continuation_itself_scores_100_and_chance_less():
    real = [ALPHABET, OWN, "the small fox ran to the big house and slept"]
    scores = continuation_overlap(real, real)
    assert scores["bleu"] == pytest.approx(100) and scores["chrf"] == pytest.approx(100)
    assert scores["bleu_chance"] < 1 and scores["chrf_chance"] < 30
