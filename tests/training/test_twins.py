"""Twins: two beginnings, two endings, and which belongs to which."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import model.training.twins
from model.config import TrainingConfig
from model.errors import InputError, ModelError
from model.evaluation.cloze import ClozePair, cloze, log_likelihood, read_pairs
from model.training.data import UNSUITABLE, PreparedData, Source, prepare
from model.training.loop import TrainingRun
from model.training.twins import Twins, choice_accuracy, choice_loss, is_held_out

LINES = [
    ("Mia hid the moon. Ben found", "the moon", "Mia hid an egg. Ben found", "an egg"),
    ("Tom lost two apples. The fox found", "apples", "Tom lost a red kite. The fox found", "a kite"),
    ("The old owl hid", "the warm bread", "A shy dragon hid", "a silver key"),
]
HELD_OUT = ("Tom hid the moon. Ben hid", "the moon", "Tom hid two apples. Ben hid", "two apples")


WRITTEN = Path(model.training.twins.__file__).with_name("twins.tsv")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "twins.tsv"
    path.write_text("".join("\t".join(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def data(tmp_path, stories, tokenizer):
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))
    prepare([(Source("s"), [tmp_path / "s.jsonl"])], tmp_path, 64, tokenizer=tokenizer)
    return PreparedData.open(tmp_path)


def logits_of(decoder):
    @torch.inference_mode()
    def logits(tokens):
        with torch.autocast("cpu", torch.bfloat16):
            return decoder(torch.tensor([tokens]))[0].float().numpy()

    return logits


def test_each_beginning_stands_with_both_endings_the_right_one_first(file, tokenizer):
    twins = Twins.read(file, tokenizer)
    begin_1, end_1, begin_2, end_2 = LINES[0]
    wanted = [(begin_1, end_1), (begin_1, end_2), (begin_2, end_2), (begin_2, end_1)]
    for row_l, target_l, (begin, end) in zip(twins.rows_nrl[0], twins.targets_nrl[0], wanted, strict=True):
        assert tokenizer.decode(token for token in row_l if token != tokenizer.pad_id) == f"{begin} {end}."
        assert tokenizer.decode(target_l[target_l >= 0]) == f" {end}."
        assert (row_l[1:][target_l >= 0] == target_l[target_l >= 0]).all()


def test_the_loss_is_of_the_likelihoods_that_cloze_compares(file, tokenizer, tiny_decoder):
    twins = Twins.read(file, tokenizer)
    rows, targets = (torch.from_numpy(array).flatten(0, 1) for array in (twins.rows_nrl, twins.targets_nrl))
    logits = logits_of(tiny_decoder)
    wanted = 0.0
    for begin_1, end_1, begin_2, end_2 in LINES:
        for begin, right, wrong in ((begin_1, end_1, end_2), (begin_2, end_2, end_1)):
            of_right, of_wrong = (
                log_likelihood(logits, tokenizer.encode_opening(begin), tokenizer.encode(f" {end}."))
                for end in (right, wrong)
            )
            wanted += math.log1p(math.exp(of_wrong - of_right))
    assert choice_loss(tiny_decoder, rows[:, :-1], targets).item() == pytest.approx(wanted, rel=0.02)  # bfloat16


def test_accuracy_is_that_of_cloze(tmp_path, tokenizer, tiny_decoder, stories):
    """On many pairs of a random model, some right and some of unequal length."""
    things = ["a red kite", "the warm bread", "a silver key", "the moon", "two apples", "an egg"]
    beginnings = [b for story in stories[:60] if not is_held_out(b := story.split(".")[0] + ". Ben hid")]
    lines = [(b, things[i % 6], f"Mia ran. {b}", things[(i // 6 + i + 1) % 6]) for i, b in enumerate(beginnings)]
    (tmp_path / "many.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    twins = Twins.read(tmp_path / "many.tsv", tokenizer)
    assert len(twins.rows_nrl) == len(lines)
    pairs = [
        ClozePair("", begin, f" {right}.", f" {wrong}.")
        for begin_1, end_1, begin_2, end_2 in lines
        for begin, right, wrong in ((begin_1, end_1, end_2), (begin_2, end_2, end_1))
    ]
    found = cloze(pairs, tokenizer, logits_of(tiny_decoder))
    assert 0.1 < found["accuracy"] < 0.9 and 0 < found["pairs_left_out"] < len(pairs)
    near_tie = 1.01 / found["pairs"]
    assert choice_accuracy(tiny_decoder, twins) == pytest.approx(found["accuracy"], abs=near_tie)


def test_held_out_twins_are_judged_by_and_not_learnt(file, tokenizer, tiny_decoder):
    assert choice_accuracy(tiny_decoder, Twins.read(file, tokenizer, held_out=True)) is None
    file.write_text(file.read_text() + "\t".join(HELD_OUT) + "\n")
    assert len(Twins.read(file, tokenizer).rows_nrl) == len(LINES)
    (rows,) = Twins.read(file, tokenizer, held_out=True).rows_nrl
    assert (
        tokenizer.decode(token for token in rows[0] if token != tokenizer.pad_id)
        == "Tom hid the moon. Ben hid the moon."
    )
    file.write_text("\t".join(HELD_OUT) + "\n")
    with pytest.raises(InputError, match="to learn"):
        Twins.read(file, tokenizer)


def test_every_epoch_reads_all_of_them_once_and_a_step_number_says_which(file, tokenizer):
    twins = Twins.read(file, tokenizer)
    by_step = [twins.batch(step, 2, seed=1)[0] for step in range(6)]
    assert all(len(rows) == 8 for rows in by_step)
    read = np.concatenate(by_step).reshape(4, 3, 4, -1)  # epoch, twin, row
    for epoch in read:
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, twins.rows_nrl))
    assert any((read[0] != epoch).any() for epoch in read[1:])
    assert (twins.batch(4, 2, seed=1)[0] == by_step[4]).all()


def test_long_ones_are_left_out(file, tokenizer):
    whole = Twins.read(file, tokenizer)
    shortest = int((whole.rows_nrl != tokenizer.pad_id).sum(2).max(1).min())
    assert len(Twins.read(file, tokenizer, shortest).rows_nrl) == 1
    with pytest.raises(InputError, match="no twins of at most"):
        Twins.read(file, tokenizer, shortest - 1)


@pytest.mark.parametrize("text", ["one\ttwo\tthree\n", "a\tb\t\td\n", "a\tb\tc\td\te\n", "\na\tb\n"])
def test_a_bad_line_is_named(tmp_path, tokenizer, text):
    (tmp_path / "t.tsv").write_text("\t".join(LINES[0]) + "\n" + text)
    with pytest.raises(InputError, match=r"line [23]: give four fields"):
        Twins.read(tmp_path / "t.tsv", tokenizer)


def test_a_missing_file_is_named(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"nowhere\.tsv cannot be read"):
        Twins.read(tmp_path / "nowhere.tsv", tokenizer)


def test_a_run_learns_to_choose_and_resumes_with_the_same_twins_only(file, data, tiny_config, tmp_path, one_thread):
    config = TrainingConfig(rows_per_step=4, rows_per_pass=4, warmup_steps=2, decay_fraction=0.5, save_every=4)

    def run(name, **options):
        return TrainingRun(tmp_path / name, data, tiny_config, config, **options)

    def records(name):
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    file.write_text(file.read_text() + "\t".join(HELD_OUT) + "\n")
    run("whole", twins=file).run()
    assert records("whole")[-1]["held_out_choices"] in (0, 0.5, 1)
    losses = [record["choice_loss"] for record in records("whole")]
    assert losses[0] > 0.5
    assert losses[-1] < 0.2

    def stop(record):
        if record["step"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("cut", twins=file, report=stop).run()
    for others in ({}, {"twins": file.with_name("others.tsv")}):
        file.with_name("others.tsv").write_text(file.read_text().splitlines()[0] + "\n")
        with pytest.raises(ModelError, match=r"other settings \(twins\)"):
            run("cut", **others).run()
    run("cut", twins=file).run()
    assert [record["choice_loss"] for record in records("cut")] == losses
    run("none").run()
    assert "choice_loss" not in records("none")[0]


def test_the_twins_that_come_along_are_not_those_a_storyteller_is_judged_by():
    lines = [line.split("\t") for line in WRITTEN.read_text(encoding="utf-8").splitlines()]
    pairs = read_pairs()
    assert len(lines) > 1000
    endings = {frozenset(end.strip(" .").lower() for end in (pair.right, pair.wrong)) for pair in pairs}
    assert not any(frozenset((end_1.lower(), end_2.lower())) in endings for _, end_1, _, end_2 in lines)
    assert not {begin for line in lines for begin in line[::2]} & {pair.context for pair in pairs}
    assert not UNSUITABLE.search(WRITTEN.read_text(encoding="utf-8"))
