"""Twins drawn from patterns: the same words, the other way about, and the other ending right."""

import random
import re
from pathlib import Path

import pytest

import model.training.patterns
from model.errors import InputError
from model.training.patterns import Patterns, exchanged, filled, slots

PATTERNS = Path(model.training.patterns.__file__).with_name("patterns.tsv")


def test_slots_are_exchanged_with_their_articles():
    assert exchanged("{A} gave {B} {ax} for the {y}.", "AB") == "{B} gave {A} {ax} for the {y}."
    assert exchanged("{A} gave {B} {ax} for the {y}.", "xy") == "{A} gave {B} {ay} for the {x}."
    assert slots("{A} had {ax}, {girl} had none.") == {"A", "x", "girl"}


def test_filled_texts_have_articles_and_capitals():
    words = {"A": "the fox", "B": "Mia", "x": "apple", "y": "kite"}
    text = '{A} had {ax}. {B} had {ay}. "{A} is here," said {B}. "Yes!" said {A}.'
    assert (
        filled(text, words) == 'The fox had an apple. Mia had a kite. "The fox is here," said Mia. "Yes!" said the fox.'
    )


@pytest.fixture
def file(tmp_path):
    """One pattern of each kind, whose roles show in what is drawn: the first of each pair has the first."""
    words = {"girl": "Mia, Ada, Eve", "boy": "Tom, Ben, Gus", "other": "the fox, the owl, the hen"}
    words |= {"thing": "ball, egg, kite", "place": "barn, cave, tent", "person is": "sad, shy, wet"}
    words |= {
        "thing is": "red, big, old",
        "between": "It rained.|It snowed.|It was hot.",
        "opening": "One day,|Once,|Then",
    }
    lines = [("words", kind, text) for kind, text in words.items()]
    for state, (bound, _) in model.training.patterns.STATES.items():
        a, b, x, y = bound
        lines.append((state, "introduction", f"now {{{b}}} goes with {{{y}}} and {{{a}}} with {{{x}}}."))
        lines.append((state, "question", f"So {{{a}}} goes with", x))
    lines.append(("relation 1", "introduction", "{A} found {B}."))
    lines.append(("relation 1", "question", "The finder was", "A"))
    lines.append(("situation", "The {x} fell, not the {y}. Look at the", "x"))
    lines.append(("pair", "{girl} sat by {boy}. He saw", "girl", "{girl} sat by {boy}. She saw", "boy"))
    path = tmp_path / "patterns.tsv"
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return path


def is_right(begin, end):
    """Whether a drawn beginning has this ending, read anew from the text."""
    if match := re.search(r"So (.*) goes with$", begin):
        told = re.search(
            r"[Nn]ow (.*) goes with (.*) and (.*) with (.*?)\. (?:It \w+( hot)?\. )?So", begin.rsplit("] ")[-1]
        )
        return {told[1].lower(): told[2], told[3].lower(): told[4]}[match[1].lower()] == end
    if match := re.search(r"(?:^|, |Once |Then )(.*) found (.*)\. The finder was$", begin):
        return match[1].lower().removeprefix("one day, ").removeprefix("once, ").removeprefix("then ") == end.lower()
    if match := re.search(r"The (\w+) fell, not the", begin):
        return match[1] == end
    match = re.fullmatch(r"(\w+) sat by (\w+)\. (He|She) saw", begin)
    return match[1 if match[3] == "He" else 2] == end


def test_each_beginning_has_its_own_ending_right_and_the_other_wrong(file, monkeypatch):
    monkeypatch.setattr("model.training.patterns.is_held_out", lambda text: False)
    patterns, rng = Patterns(file), random.Random(1)
    seen = set()
    for _ in range(600):
        begin_1, end_1, begin_2, end_2 = patterns.draw(rng, rng.random())
        seen |= {word for word in ("So", "finder", "fell", "saw") if word in begin_1}
        assert end_1 != end_2 and begin_1 != begin_2
        if begin_1.count("goes with") == 2:  # without another state that distracts
            assert sorted(re.findall(r"\w+", begin_1.lower())) == sorted(re.findall(r"\w+", begin_2.lower())) or (
                begin_1.split("So ")[0] == begin_2.split("So ")[0]
            )
        if begin_1.count("goes with") <= 2:
            assert is_right(begin_1, end_1) and is_right(begin_2, end_2), (begin_1, end_1)
            assert not is_right(begin_1, end_2) and not is_right(begin_2, end_1)
    assert seen == {"So", "finder", "fell", "saw"}


def test_early_in_a_run_they_are_of_the_shortest(monkeypatch):
    monkeypatch.setattr("model.training.patterns.is_held_out", lambda text: False)
    patterns = Patterns(PATTERNS)

    def words(progress):
        rng = random.Random(2)
        return sum(len(patterns.draw(rng, progress)[0].split()) for _ in range(300)) / 300

    assert words(0) < 0.8 * words(0.6) < 0.8 * words(1) * 1.1


def test_held_out_patterns_are_not_drawn_from():
    rng = random.Random(3)
    held_out, learnt = Patterns(PATTERNS, held_out=True), Patterns(PATTERNS)
    situations = [line.split("\t")[1] for line in PATTERNS.read_text().splitlines() if line.startswith("situation\t")]
    assert set(learnt._situations) | set(held_out._situations) == {
        (t, e) for t, e in learnt._situations + held_out._situations
    }
    assert not set(learnt._situations) & set(held_out._situations)
    assert len(learnt._situations) + len(held_out._situations) == len(situations)
    assert 0.04 < len(held_out._situations) / len(situations) < 0.13
    assert all(held_out.draw(rng) for _ in range(50))


@pytest.mark.parametrize(
    "line",
    ["situation\tOnly {x} here\tx", "has\tquestion\tSo {x} is with\tx", "has\tintroduction\t{A} had {ax}.", "\tx"],
)
def test_a_line_that_is_no_pattern_is_named(file, line):
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"line 26: this is not a pattern"):
        Patterns(file)


def test_a_file_without_some_kind_is_refused(file, monkeypatch):
    monkeypatch.setattr("model.training.patterns.is_held_out", lambda text: False)
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("pair")))
    with pytest.raises(InputError, match="too few lines of: pair"):
        Patterns(file)
    with pytest.raises(InputError, match="cannot be read"):
        Patterns(file.with_name("nowhere.tsv"))
