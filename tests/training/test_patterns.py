"""Twins drawn from patterns: the same words, the other way about, and the other ending right."""

import random
import re
from pathlib import Path

import pytest

import model.training.patterns
from model.errors import InputError
from model.training.patterns import STATES, Patterns, exchanged, filled, slots

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
def file(tmp_path, monkeypatch):
    """One pattern of each kind; each state has a verb of its own, and says its second binding first."""
    monkeypatch.setattr("model.training.patterns.is_held_out", lambda text: False)
    words = {"girl": "Mia, Ada, Eve, Zoe, Ida, Sue", "boy": "Tom, Ben, Gus, Sam, Leo, Max"}
    words |= {
        "other": "the fox, the owl, the hen, the pig, the cow, the cat",
        "thing": "ball, egg, kite, cup, hat, axe",
    }
    words |= {"place": "barn, cave, tent, hut, den, inn", "person is": "sad, shy, wet, old, ill, hot"}
    words |= {"thing is": "red, big, new, dry, raw, odd", "between": "|".join(["It rained."] * 6)}
    words |= {"opening": "|".join(["Well,"] * 6)}
    lines = [("words", kind, text) for kind, text in words.items()]
    for state, (bound, _) in STATES.items():
        a, b, x, y = (f"{{{slot}}}" for slot in bound)
        verb = VERBS[state]
        lines.append((state, "introduction", f"{b} {verb} {y}, and {a} {verb} {x}."))
        lines.append((state, "question", f"So {a} {verb}", bound[2]))
    lines.append(("relation 1", "introduction", "{A} found {B}."))
    lines.append(("relation 1", "question", "The finder was", "A"))
    lines.append(("situation", "The {x} fell, not the {y}. Look at the", "x"))
    lines.append(("pair", "{girl} sat by {boy}. He saw", "girl", "{girl} sat by {boy}. She saw", "boy"))
    path = tmp_path / "patterns.tsv"
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return path


VERBS = dict(zip(STATES, ("has", "wants", "visits", "fills", "feels", "looks"), strict=True))


def right_ending(begin):
    """The ending of a drawn beginning, found anew from the text."""
    begin = begin.replace("It rained. ", "").removeprefix("Well, ").lower()
    if match := re.search(r"so (.*) (\w+)$", begin):
        who, verb = match.groups()
        (first, second), (third, fourth) = re.findall(rf"(?:^|\. |and )([\w ]+?) {verb} ([\w ]+?)[,.]", begin)
        return {first: second, third: fourth}[who]
    if match := re.fullmatch(r"(.*) found (.*)\. the finder was", begin):
        return match[1]
    if match := re.match(r"the (\w+) fell", begin):
        return match[1]
    match = re.fullmatch(r"(\w+) sat by (\w+)\. (he|she) saw", begin)
    return match[1 if match[3] == "he" else 2]


def test_each_beginning_has_its_own_ending_right_and_the_other_wrong(file):
    patterns, rng = Patterns(file), random.Random(1)
    drawn = [patterns.draw(rng, rng.choice([rng.random(), 1])) for _ in range(800)]
    for begin_1, end_1, begin_2, end_2 in drawn:
        assert end_1 != end_2
        assert (right_ending(begin_1), right_ending(begin_2)) == (end_1.lower(), end_2.lower()), (begin_1, begin_2)
    asked = [re.search(r"(\w+)$", begin)[1] for begin, *_ in drawn]
    assert {*VERBS.values(), "was", "the", "saw"} == set(asked)
    distracted = [sum(verb in begin for verb in VERBS.values()) > 1 for begin, *_ in drawn]
    assert 0.03 < sum(distracted) / len(drawn) < 0.3
    told = [twin for twin in drawn if " so " in twin[0].lower()]
    words = [
        [sorted(re.findall(r"\w+", begin.lower())) for begin in (begin_1, begin_2)] for begin_1, _, begin_2, _ in told
    ]
    same_words = [first == second for first, second in words]
    assert 0.1 < sum(same_words) / len(same_words) < 0.9


def test_early_in_a_run_they_are_of_the_shortest():
    patterns = Patterns(PATTERNS)

    def words(hardness):
        rng = random.Random(2)
        return sum(len(patterns.draw(rng, hardness)[0].split()) for _ in range(300)) / 300

    assert words(0) < 0.8 * words(0.4) < words(0.4) < 0.95 * words(1)


def test_held_out_patterns_are_not_drawn_from():
    rng = random.Random(3)
    held_out, learnt = Patterns(PATTERNS, held_out=True), Patterns(PATTERNS)
    for kind in ("_situations", "_pairs", "_introductions", "_questions"):
        found = [getattr(patterns, kind) for patterns in (learnt, held_out)]
        if isinstance(found[0], dict):
            found = [[(name, *text) for name, texts in kinds.items() for text in texts] for kinds in found]
        assert not set(found[0]) & set(found[1])
        assert 0.04 < len(found[1]) / len(found[0]) < 0.16
    assert all(held_out.draw(rng) for _ in range(50))


@pytest.mark.parametrize(
    "line",
    [
        "situation\tOnly {x} here\tx",
        "has\tquestion\tSo {x} is with\tx",
        "has\tquestion\tNot {y}. It was\tx",
        "has\tquestion\tThere was\tx",
        "has\tintroduction\t{A} had {ax}.",
        "hass\tintroduction\t{A} had {ax}, {B} {ay}.",
        "\tx",
    ],
)
def test_a_line_that_is_no_pattern_is_named(file, line):
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"line 26: (this is not a pattern|ask with one slot)"):
        Patterns(file)


def test_a_file_without_some_kind_is_refused(file):
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("pair")))
    with pytest.raises(InputError, match="too few lines of: pair"):
        Patterns(file)
    with pytest.raises(InputError, match="cannot be read"):
        Patterns(file.with_name("nowhere.tsv"))
