"""Twins: two beginnings, two endings, and which belongs to which."""

import json
import math
from pathlib import Path

import pytest
import torch

import model.training.twins
from model.config import TrainingConfig
from model.errors import InputError, ModelError
from model.evaluation.cloze import ClozePair, cloze, log_likelihood, read_pairs
from model.training.data import UNSUITABLE, PreparedData, Source, prepare
from model.training.loop import TrainingRun
from model.training.patterns import Patterns
from model.training.twins import TwinStream, choice_accuracy, choice_loss, choices, is_held_out, padded, read_twins

LINES = [
    ("Mia hid the moon. Ben found", "the moon", "Mia hid an egg. Ben found", "an egg"),
    ("Tom lost two apples. The fox found", "apples", "Tom lost a red kite. The fox found", "a kite"),
    ("The old owl hid", "the warm bread", "A shy dragon hid", "the silver key"),
]
HELD_OUT = ("Tom hid the moon. Ben hid", "the moon", "Tom hid two apples. Ben hid", "two apples")


WRITTEN = Path(model.training.twins.__file__).with_name("twins.tsv")
PATTERNS = WRITTEN.with_name("patterns.tsv")


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


def test_a_choice_is_where_the_endings_part(tokenizer):
    begin_1, end_1, begin_2, end_2 = LINES[2]
    first, second = choices(LINES[2], tokenizer)
    whole = tokenizer.encode_opening(begin_1) + tokenizer.encode(f" {end_1}.")
    other = tokenizer.encode_opening(begin_2) + tokenizer.encode(f" {end_2}.")
    assert [*first.tokens, first.right] == whole[: len(first.tokens) + 1]
    assert [*second.tokens, second.right] == other[: len(second.tokens) + 1]
    assert (first.right, first.wrong) == (second.wrong, second.right)
    assert first.right != first.wrong
    assert tokenizer.decode(first.tokens).startswith(f"{begin_1} the")  # "the" belongs to both endings
    assert choices(("Ben hid", "the moon", "Mia hid", "the moon"), tokenizer) is None


def test_the_loss_is_of_the_likelihoods_that_cloze_compares(tokenizer, tiny_decoder):
    found = [choice for line in LINES for choice in choices(line, tokenizer)]
    logits = logits_of(tiny_decoder)
    chosen = told = 0.0
    for tokens, right, wrong in found:
        of_right, of_wrong = (log_likelihood(logits, tokens, [token]) for token in (right, wrong))
        chosen += math.log1p(math.exp(of_wrong - of_right))
        told -= of_right
    loss, choice = choice_loss(tiny_decoder, *padded(found, 64, torch.device("cpu")))
    assert choice.item() == pytest.approx(chosen, rel=0.02)  # bfloat16
    assert loss.item() == pytest.approx(chosen + model.training.twins.LIKELIHOOD_SHARE * told, rel=0.02)


def test_accuracy_is_that_of_cloze_where_endings_part_at_their_end(tokenizer, tiny_decoder, stories):
    """On many pairs of a random model, some right."""
    words = sorted({word for story in stories for word in story.split() if len(tokenizer.encode(f" {word}.")) == 2})
    beginnings = [story.split(".")[0] + ". Ben hid" for story in stories[:60]]
    twins = [
        (begin, words[i % len(words)], f"Mia ran. {begin}", words[(3 * i + 1) % len(words)])
        for i, begin in enumerate(beginnings)
    ]
    pairs = [
        ClozePair("", begin, f" {right}.", f" {wrong}.")
        for begin_1, end_1, begin_2, end_2 in twins
        for begin, right, wrong in ((begin_1, end_1, end_2), (begin_2, end_2, end_1))
        if end_1 != end_2 and tokenizer.encode(f" {end_1}.")[0] != tokenizer.encode(f" {end_2}.")[0]
    ]

    # Cloze scores the full stop, too; that after a wrong word may be likelier than after the right one.
    logits = logits_of(tiny_decoder)

    def without_the_stop(tokens):
        found = logits(tokens)
        found[:, tokenizer.encode(f" {words[0]}.")[1]] = 50.0  # as good as certain after any word
        return found

    found = cloze(pairs, tokenizer, without_the_stop)
    assert 0.1 < found["accuracy"] < 0.9 and found["pairs"] > 60
    near_tie = 1.01 / found["pairs"]
    assert choice_accuracy(tiny_decoder, twins, tokenizer) == pytest.approx(found["accuracy"], abs=near_tie)


def test_held_out_twins_are_judged_by_and_not_learnt(file, tokenizer, tiny_decoder):
    assert is_held_out(HELD_OUT[0])
    assert choice_accuracy(tiny_decoder, read_twins(file, held_out=True), tokenizer) is None
    file.write_text(file.read_text() + "\t".join(HELD_OUT) + "\n")
    assert read_twins(file) == LINES
    assert read_twins(file, held_out=True) == [HELD_OUT]


def texts(stream, step, tokenizer):
    return sorted(tokenizer.decode([*choice.tokens, choice.right]) for choice in stream.step(step)[0])


def test_every_epoch_reads_all_of_them_once_and_a_step_number_says_which(tokenizer):
    """64 twins, two a step: an epoch is two blocks of 16 steps."""
    many = [(f"{'Tom ' * (i % 8)}saw {'Mia ' * (i // 8)}and", "an egg", f"Ben {i}", "the moon") for i in range(64)]

    def stream():
        return TwinStream(many, None, tokenizer, per_step=2, n_steps=64, length=64, seed=1)

    read = stream()
    by_step = [texts(read, step, tokenizer) for step in range(64)]
    first, second = (sorted(text for step in by_step[i : i + 32] for text in step) for i in (0, 32))
    assert first == second and len(set(first)) == 128
    blocks = [{text for step in by_step[i : i + 16] for text in step} for i in (0, 16, 32, 48)]
    assert not blocks[0] & blocks[1]
    assert blocks[0] not in blocks[2:]  # another epoch, another order
    assert texts(stream(), 37, tokenizer) == by_step[37]


def test_drawn_twins_come_beside_the_written_ones_and_grow_harder_as_the_run_goes_on(tokenizer):
    asked = []

    def draw(rng, done):
        asked.append(done)
        return ("The fox hid", rng.choice(["bread", "kites"]), "The owl hid", "apples")

    stream = TwinStream(LINES, draw, tokenizer, per_step=10, n_steps=64, length=64, seed=1)
    found = [text for step in range(16) for text in texts(stream, step, tokenizer)]
    assert len(found) == 16 * 20
    assert sum("fox" in text and "lost" not in text for text in found) == 16 * 7
    texts(stream, 40, tokenizer)
    assert set(asked) == {0.0, 0.5}


def test_each_process_adds_its_part_of_the_twins(file, data, tiny_config, tmp_path, one_thread):
    """The gradients of two processes add up to those of one, in one pass or several."""

    def added(rank, n_processes, rows_per_pass=4):
        config = TrainingConfig(rows_per_step=4, rows_per_pass=rows_per_pass)
        run = TrainingRun(tmp_path / "run", data, tiny_config, config, twins=file, patterns=PATTERNS)
        with torch.no_grad():
            for parameter in run.decoder.parameters():
                parameter.mul_(4)  # far from a coin's choices
        run.rank, run.n_processes = rank, n_processes
        loss = run._choice_gradients(run._twins)
        return loss, run.decoder.model.layers[0].mlp.down_proj.weight.grad

    (loss, grad), (loss_0, grad_0), (loss_1, grad_1) = added(0, 1), added(0, 2), added(1, 2)
    assert abs(loss_0 - loss_1) > 0.01 * loss
    assert loss_0 + loss_1 == pytest.approx(loss.item(), rel=1e-3)
    assert (grad_0 + grad_1 - grad).norm() < 0.02 * grad.norm()  # bfloat16
    assert (grad_0 - grad_1).norm() > 0.1 * grad.norm()
    assert (added(0, 1, rows_per_pass=1)[1] - grad).norm() < 0.02 * grad.norm()


def test_drawing_gives_up_where_none_is_short_enough(tokenizer):
    stream = TwinStream([], lambda rng, done: LINES[0], tokenizer, per_step=2, n_steps=1, length=4, seed=1)
    with pytest.raises(InputError, match="No twin that is drawn"):
        stream.step(0)


def test_long_ones_are_left_out(tokenizer):
    shortest = min(max(len(choice.tokens) for choice in choices(line, tokenizer)) for line in LINES)
    stream = TwinStream(LINES, None, tokenizer, 2, 1, shortest, 1)
    assert {len(choice.tokens) <= shortest for choice in stream.step(0)[0]} == {True}
    with pytest.raises(InputError, match="no twins of at most"):
        TwinStream(LINES, None, tokenizer, 2, 1, shortest - 1, 1)


@pytest.mark.parametrize("text", ["one\ttwo\tthree\n", "a\tb\t\td\n", "a\tb\tc\td\te\n", "\na\tb\n"])
def test_a_bad_line_is_named(tmp_path, text):
    (tmp_path / "t.tsv").write_text("\t".join(LINES[0]) + "\n" + text)
    with pytest.raises(InputError, match=r"line [23]: give four fields"):
        read_twins(tmp_path / "t.tsv")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.tsv cannot be read"):
        read_twins(tmp_path / "nowhere.tsv")


def test_a_run_learns_to_choose_and_resumes_with_the_same_twins_only(file, data, tiny_config, tmp_path, one_thread):
    config = TrainingConfig(rows_per_step=4, rows_per_pass=4, warmup_steps=2, decay_fraction=0.5, save_every=4)

    def run(name, **options):
        return TrainingRun(tmp_path / name, data, tiny_config, config, **options)

    def records(name):
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    file.write_text(file.read_text() + "\t".join(HELD_OUT) + "\n")
    run("whole", twins=file, patterns=PATTERNS).run()
    assert records("whole")[-1]["held_out_choices"] in (0, 0.5, 1)
    assert 0.3 < records("whole")[-1]["held_out_drawn_choices"] < 0.7
    mixed = [record["choice_loss"] for record in records("whole")]

    def stop(record):
        if record["step"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("cut", twins=file, patterns=PATTERNS, report=stop).run()
    file.with_name("others.tsv").write_text(file.read_text().splitlines()[0] + "\n")
    for others in ({}, {"twins": file}, {"twins": file.with_name("others.tsv"), "patterns": PATTERNS}):
        with pytest.raises(ModelError, match=r"other settings \(twins\)"):
            run("cut", **others).run()
    run("cut", twins=file, patterns=PATTERNS).run()
    assert [record["choice_loss"] for record in records("cut")] == mixed

    run("written", twins=file).run()
    losses = [record["choice_loss"] for record in records("written")]
    assert losses[0] > 0.5
    assert losses[-1] < 0.2
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
    assert Patterns(PATTERNS) and not UNSUITABLE.search(PATTERNS.read_text(encoding="utf-8"))
