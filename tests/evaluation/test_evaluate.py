"""`taleloom evaluate` as a whole, on a tiny model."""

import json
import sys

import pytest
from click.testing import CliRunner

from model.checkpoint import load_tokenizer, read_config
from model.cli import main
from model.drafts import N_DRAFTS
from model.errors import InputError
from model.evaluation.following import Idea
from model.evaluation.report import COLUMNS, DETECTED, ROWS
from model.evaluation.suite import split_openings
from model.text import sentences


def evaluate(*arguments):
    return CliRunner().invoke(main, ["evaluate", *(str(argument) for argument in arguments)])


def test_several_sources_and_cloze(tiny_model, jsonl, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Mia found a kite.")
    done = evaluate("--data", jsonl, "--data", other, "--model", tiny_model, "--json")
    results = json.loads(done.stdout)
    assert set(results["sources"]) == {"stories", "other"} and 0 <= results["cloze"]["accuracy"] <= 1
    alone = json.loads(evaluate("--data", jsonl, "--model", tiny_model, "--json").stdout)
    assert results["sources"]["stories"] == alone


def test_stories_are_told_measured_and_kept(tiny_model, jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr("model.evaluate.MAX_TOKENS", 30)
    monkeypatch.setattr("model.evaluation.realism.detection.__defaults__", (2, 1))
    ideas = [Idea("the fox, an egg", ("fox",), ("egg", "eggs")), Idea("Mia hid a kite", ("Mia",), ("kite",))]
    monkeypatch.setattr("model.evaluate.read_ideas", lambda: ideas)  # fit a context of 64
    out = tmp_path / "out"
    command = ("--stories", 3, "--openings", 12, "--real", jsonl, "--corpus", jsonl, "--out", out)
    done = evaluate(*command, "--model", tiny_model, "--device", "cpu")
    assert done.exit_code == 0, done.output
    results = json.loads((out / "evaluation.json").read_text())
    assert set(COLUMNS) <= set(results) and set(results["realism"]) == set(DETECTED)
    assert results["ideas"]["stories"] == results["real"]["stories"] == 3
    assert results["real"]["copied_8grams"] == 1  # the corpus holds them
    assert set(ROWS) == {name for column in COLUMNS for name in results[column]} & set(ROWS)
    table = (out / "evaluation.md").read_text()
    assert all(label in table for label, _ in ROWS.values()) and table.strip() in done.stdout
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    told = [json.loads(line) for line in (out / "ideas.jsonl").read_text().splitlines()]
    assert [story["prompt"] for story in told] == [ideas[i].idea for i in (0, 1, 0)]
    assert [(story["seed"] - 1) // N_DRAFTS for story in told] == [0, 1, 2]  # one of the story's own drafts
    assert all(0 < story["tokens"] <= 30 for story in told)
    first = [json.loads(line) for line in (out / "first_drafts.jsonl").read_text().splitlines()]
    assert [story["seed"] for story in first] == [1, 2, 3]
    assert len((out / "continuations.jsonl").read_text().splitlines()) == 12


def test_openings_and_what_is_compared_are_disjoint_and_whole(tiny_model, stories):
    tokenizer = load_tokenizer(tiny_model, read_config(tiny_model))
    continued, others = split_openings(stories, 50, tokenizer, 400)
    assert len(continued) == len(others) == 50
    assert all(len(sentences(split.opening)) == 2 for split in continued + others)
    texts = {" ".join(story.split()) for story in stories}
    assert all(" ".join(f"{split.opening} {split.rest}".split()) in texts for split in continued + others)
    cut, _ = split_openings(stories, 50, tokenizer, 7)
    assert all(whole.rest.startswith(short.rest) for whole, short in zip(continued, cut, strict=True))
    assert all(len(tokenizer.encode(short.rest)) <= 7 for short in cut)
    with pytest.raises(InputError, match="too few"):
        split_openings(stories[:5], 50, tokenizer, 400)


def test_without_the_extra_it_says_what_to_install(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    done = evaluate("--stories", 2, "--model", tiny_model)
    assert done.exit_code == 1 and "pip install 'taleloom[evaluate]'" in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stories", 2, "--corpus", "none.jsonl"), "no file"),
        (("--stories", 2, "--real", "none.jsonl"), "no file"),
        (("--stories", 2, "--real", "{few}"), "too few"),
        (("--corpus", "{data}"), "--stories"),
        (("--data", "{data}", "--data", "{data}"), "one name"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, jsonl, tiny_model):
    few = jsonl.with_name("few.txt")
    few.write_text("A story.")
    arguments = [str(argument).format(data=jsonl, few=few) for argument in arguments]
    done = evaluate(*arguments, "--model", tiny_model)
    assert done.exit_code == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1
