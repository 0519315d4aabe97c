"""Training: it learns, resumes exactly, and says what is wrong."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_decoder
from model.config import BUNDLED_WEIGHTS, TrainingConfig
from model.decoder import Decoder
from model.errors import ModelError, TaleloomError
from model.training import patterns
from model.training.data import PreparedData, Source, prepare
from model.training.loop import TrainingRun, distilled_loss, summed_loss

PATTERNS = Path(patterns.__file__).with_name("patterns.tsv")
CONFIG = TrainingConfig(rows_per_step=4, rows_per_pass=4, warmup_steps=2, eval_every=10, save_every=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory, stories):
    folder = tmp_path_factory.mktemp("data")
    (folder / "s.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))
    prepare([(Source("s"), [folder / "s.jsonl"])], folder, 64, 320)
    return PreparedData.open(folder)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [record["loss"] for record in metrics(folder)]


def test_it_learns_and_leaves_a_model(data, tiny_config, tmp_path):
    run = TrainingRun(tmp_path, data, tiny_config, CONFIG)
    before = run.evaluate()["held_out_bits_per_byte"]
    run.run()
    records = metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(1, run.n_steps + 1))
    assert records[-1]["held_out_bits_per_byte"] < before - 0.5
    assert records[-1]["loss"] < records[0]["loss"] - 1
    loaded = load_decoder(tmp_path / "model")
    assert torch.equal(loaded.model.norm.weight, run.decoder.model.norm.weight.half().float())


def test_the_first_loss_is_that_of_guessing(data, tiny_config, tmp_path):
    run = TrainingRun(tmp_path, data, tiny_config, CONFIG)
    loss, _, _ = run._gradients()
    assert abs(loss - math.log(tiny_config.vocab_size)) < 0.1


def test_accumulated_passes_add_up_to_one_large_pass(data, tiny_config, tmp_path, one_thread):
    gradients = []
    for rows_per_pass in (4, 1):
        config = TrainingConfig(rows_per_step=4, rows_per_pass=rows_per_pass)
        run = TrainingRun(tmp_path, data, tiny_config, config)
        run._gradients()
        gradients.append(torch.cat([p.grad.flatten() for p in run.decoder.parameters()]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert difference < 0.02  # bf16


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_two_runs_with_one_seed_agree_and_a_resumed_one_too(data, tiny_config, tmp_path, one_thread, dropout):
    config = dataclasses.replace(CONFIG, dropout=dropout)
    whole, again, cut = (TrainingRun(tmp_path / n, data, tiny_config, config) for n in ("whole", "again", "cut"))
    whole.run()
    again.run()

    def stop(record):
        if record["step"] == 11:  # between checkpoints: steps 9 to 11 are done again
            raise KeyboardInterrupt

    cut.report = stop
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    TrainingRun(tmp_path / "cut", data, tiny_config, config).run()
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_checkpoint_from_before_there_was_dropout_resumes(data, tiny_config, tmp_path):
    before = dataclasses.asdict(dataclasses.replace(CONFIG, rows_per_pass=1, eval_every=1, save_every=1))
    before |= {"muon_lr": 0.0, "adamw_lr": 0.0}
    del before["dropout"]
    assert TrainingRun(tmp_path, data, tiny_config, CONFIG)._identity()["training"] == json.dumps(before)
    with_dropout = dataclasses.replace(CONFIG, dropout=0.1)
    assert "dropout" in TrainingRun(tmp_path, data, tiny_config, with_dropout)._identity()["training"]


def test_dropout_trains_another_model(data, tiny_config, tmp_path, one_thread):
    for dropout in (0.0, 0.5):
        config = dataclasses.replace(CONFIG, dropout=dropout, max_steps=2)
        TrainingRun(tmp_path / str(dropout), data, tiny_config, config).run()
    assert losses(tmp_path / "0.0")[1] != losses(tmp_path / "0.5")[1]


def train_command(jsonl, out):
    shape = {"context": 64, "vocab-size": 320, "width": 32, "layers": 2, "heads": 4, "kv-heads": 2, "mlp-width": 64}
    options = [text for name, value in shape.items() for text in (f"--{name}", str(value))]
    options += ["--rows-per-step", "2", "--rows-per-pass", "1", "--save-every", "10"]
    return ["-m", "model.cli", "train", "--dataset", str(jsonl), "--out", str(out), "--device", "cpu", *options]


def test_a_killed_run_resumes_to_the_same_curve(jsonl, tmp_path):
    """SIGKILL in the middle of the training process, then the same command again."""
    jsonl.write_text(jsonl.read_text() * 8)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("whole", "killed"):
        command = [sys.executable, *train_command(jsonl, tmp_path / name)]
        if name == "killed":
            process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 120
            while not (tmp_path / name / "checkpoint.safetensors").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (tmp_path / name / "model").exists()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) > 30


def test_two_processes_agree_with_one(jsonl, tmp_path):
    """torchrun: the rows and the twins of a step are shared, their gradients added."""
    twins = tmp_path / "twins.tsv"
    twins.write_text("".join(f"{'Mia ' * i}hid an egg\tan egg\t{'Ben ' * i}hid\tthe moon\n" for i in range(1, 30)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, start in (("one", [sys.executable]), ("two", torchrun)):
        command = [*start, *train_command(jsonl, tmp_path / name), "--twins", str(twins), "--patterns", str(PATTERNS)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    for measure in ("loss", "choice_loss"):
        one, two = ([record[measure] for record in metrics(tmp_path / name)] for name in ("one", "two"))
        assert len(one) == len(two) > 3
        assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 0.02


def test_a_run_of_other_settings_is_not_continued(data, tiny_config, tmp_path):
    config = TrainingConfig(rows_per_step=4, rows_per_pass=4, max_steps=2)
    TrainingRun(tmp_path, data, tiny_config, config).run()
    other = TrainingConfig(rows_per_step=4, rows_per_pass=4, max_steps=2, weight_decay=0.5)
    with pytest.raises(ModelError, match="other settings"):
        TrainingRun(tmp_path, data, tiny_config, other).run()


def test_a_damaged_checkpoint_is_named(data, tiny_config, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="damaged"):
        TrainingRun(tmp_path, data, tiny_config, CONFIG).run()


def test_a_run_goes_on_from_another_model(data, tiny_config, tmp_path):
    first = TrainingRun(tmp_path / "first", data, tiny_config, CONFIG)
    first.run()
    second = TrainingRun(tmp_path / "second", data, tiny_config, CONFIG, initial=tmp_path / "first" / "model")
    assert second.evaluate() == pytest.approx(first.evaluate(), rel=0.02), "up to rounding"
    with pytest.raises(TaleloomError, match="another shape"):
        other = dataclasses.replace(tiny_config, num_hidden_layers=1)
        TrainingRun(tmp_path / "third", data, other, CONFIG, initial=tmp_path / "first" / "model")


def test_the_loss_mixes_the_text_with_what_the_teachers_say(tiny_config):
    torch.manual_seed(0)
    student, one, two = (Decoder(tiny_config) for _ in range(3))
    with torch.no_grad():  # fresh ones find all words about as likely, which any mean would be
        for parameter in (p for decoder in (student, one, two) for p in decoder.parameters() if p.dim() == 2):
            parameter *= 30
    inputs_bt, targets_bt = (torch.randint(tiny_config.vocab_size, (3, 20)) for _ in range(2))
    targets_bt[1, 12:] = -100
    with torch.autocast("cpu", torch.bfloat16):
        logits_btv = student(inputs_bt).float()
        taught_btv = (one(inputs_bt).float().softmax(-1) + two(inputs_bt).float().softmax(-1)) / 2
    expected = torch.nn.functional.cross_entropy(
        logits_btv[targets_bt >= 0], taught_btv[targets_bt >= 0], reduction="sum"
    )
    by_text = summed_loss(student, inputs_bt, targets_bt).item()
    only, none, half = (distilled_loss(student, [one, two], s, inputs_bt, targets_bt).item() for s in (1.0, 0.0, 0.5))
    assert only == pytest.approx(expected.item(), rel=1e-5)
    assert none == pytest.approx(by_text, rel=1e-5)
    assert half == pytest.approx((only + by_text) / 2, rel=1e-5)
    assert distilled_loss(student, [one], 1.0, inputs_bt, targets_bt).item() != pytest.approx(only, rel=1e-3)


def test_it_learns_from_a_teacher(data, tiny_config, tmp_path):
    """The same steps from the same start, with and without a teacher: with one it agrees more with the teacher."""
    teacher = TrainingRun(tmp_path / "teacher", data, tiny_config, dataclasses.replace(CONFIG, seed=2)).run()
    folder = tmp_path / "teacher" / "model"
    config = dataclasses.replace(CONFIG, max_steps=20)
    alone = TrainingRun(tmp_path / "alone", data, tiny_config, config).run()
    taught = TrainingRun(tmp_path / "taught", data, tiny_config, config, teachers=[folder]).run()
    inputs_bt = torch.from_numpy(data.rows[:8, :-1].astype("int64"))
    with torch.inference_mode():
        expected = teacher(inputs_bt).softmax(-1).flatten(0, 1)
        far, near = (
            torch.nn.functional.cross_entropy(decoder(inputs_bt).flatten(0, 1), expected) for decoder in (alone, taught)
        )
    assert near < far
    again = TrainingRun(tmp_path / "taught", data, tiny_config, config, teachers=[folder])
    again.run()
    assert again.step == 20 and len(losses(tmp_path / "taught")) == 20, "it was finished, and nothing is learned anew"
    with pytest.raises(ModelError, match=r"other settings \(teachers\)"):
        TrainingRun(tmp_path / "taught", data, tiny_config, config).run()


def test_a_teacher_of_another_tokenizer_is_refused(data, tiny_config, tmp_path):
    with pytest.raises(TaleloomError, match="its tokenizer is not the one"):
        TrainingRun(tmp_path, data, tiny_config, CONFIG, teachers=[BUNDLED_WEIGHTS])


@pytest.mark.parametrize("option", ["--teacher", "--tokenizer"])
def test_the_command_takes_its_tokenizer_from_another_model(jsonl, tmp_path, option):
    options = [option, str(BUNDLED_WEIGHTS), "--max-steps", "1"]
    command = [sys.executable, *train_command(jsonl, tmp_path / "run"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    learned = (tmp_path / "run" / "model" / "tokenizer.model").read_bytes()
    assert learned == (BUNDLED_WEIGHTS / "tokenizer.model").read_bytes()


def test_a_model_goes_on_with_its_own_tokenizer(jsonl, tmp_path):
    options = ["--init", str(BUNDLED_WEIGHTS), "--tokenizer", str(BUNDLED_WEIGHTS)]
    command = [sys.executable, *train_command(jsonl, tmp_path / "run"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "--init or --tokenizer" in done.stderr and "Traceback" not in done.stderr


def test_too_little_data_says_so(data, tiny_config, tmp_path):
    with pytest.raises(TaleloomError, match="less than one step"):
        TrainingRun(tmp_path, data, tiny_config, TrainingConfig(rows_per_step=4096))


def test_the_learning_rate_warms_up_stays_and_decays():
    config = TrainingConfig(warmup_steps=10, decay_fraction=0.25)
    scales = [config.lr_scale(step, 100) for step in range(100)]
    assert scales[0] == 0.1 and scales[9] == scales[50] == scales[75] == 1.0
    assert scales[76] < 1 and scales[99] == pytest.approx(0.04)
    assert all(a >= b for a, b in itertools.pairwise(scales[75:]))


@pytest.mark.soak
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_it_learns_the_same(data, tiny_config, tmp_path, one_thread):
    """Fused operations round otherwise, so the curves drift apart slowly. Compiling takes half a minute."""
    TrainingRun(tmp_path / "plain", data, tiny_config, CONFIG).run()
    TrainingRun(tmp_path / "compiled", data, tiny_config, dataclasses.replace(CONFIG, compile=True)).run()
    compiled, plain = losses(tmp_path / "compiled"), losses(tmp_path / "plain")
    assert compiled[:50] == pytest.approx(plain[:50], rel=0.01)
    assert sum(compiled) == pytest.approx(sum(plain), rel=0.01)
