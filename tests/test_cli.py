"""The command line as scripts use it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from click.testing import CliRunner

from model.cli import main


def taleloom(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_tell_streams_text(tiny_model):
    done = taleloom("tell", "Mia found", "--opening", "--seed", 7, "--max-tokens", 12, "--model", tiny_model)
    assert done.exit_code == 0 and done.stdout.strip()


def test_tell_prints_one_json_object_and_a_seed_repeats_it(tiny_model):
    command = ("tell", "a fox", "--idea", "--seed", 7, "--max-tokens", 12, "--model", tiny_model, "--json")
    first, second = (json.loads(taleloom(*command).stdout) for _ in range(2))
    assert set(first) == {"text", "prompt", "seed", "tokens", "finish_reason", "seconds", "tokens_per_second"}
    assert (first["prompt"], first["seed"], first["tokens"], first["finish_reason"]) == ("a fox", 7, 12, "length")
    assert first["text"] == second["text"] and first["seconds"] > 0


def test_evaluate_prints_json(tiny_model, jsonl):
    done = taleloom("evaluate", "--data", jsonl, "--model", tiny_model, "--json")
    scores = json.loads(done.stdout)
    assert set(scores) == {"bits_per_byte", "perplexity", "bytes", "tokens", "stories"}
    assert scores["stories"] == 60 and 1 < scores["bits_per_byte"] < 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tell", ""), "empty"),
        (("tell", "x", "--temperature", "nan"), "temperature"),
        (("tell", "x", "--max-tokens", "0"), "max_tokens"),
        (("tell", "x", "--model", "no-such-model"), "no model"),
        (("tell", "x", "--model", "."), "config.json"),
        (("evaluate", "--data", "none.jsonl"), "no file"),
        (("train", "--dataset", "none.jsonl", "--out", "{tmp}/run"), "no file"),
        (("train", "--dataset", "none.jsonl", "--out", "{tmp}/run", "--heads", "7"), "does not divide"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(arguments, words, tmp_path, tiny_model):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--model" not in arguments and arguments[0] == "tell":
        arguments += ["--model", str(tiny_model)]
    done = taleloom(*arguments)
    assert done.exit_code == 1 and words in done.stderr and "Traceback" not in done.output
    assert done.stderr.splitlines()[-1].startswith("taleloom: ") and not done.stdout


def test_a_reader_who_leaves_the_pipe_leaves_no_trace_behind(tiny_model):
    """`taleloom tell ... | head -c 1`"""
    command = [sys.executable, "-m", "model.cli", "tell", "Mia", "--opening", "--max-tokens", "4000", "--seed", "1"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--model", str(tiny_model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    process.stdout.read(1)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    assert process.wait(60) is not None


def test_other_data_in_the_same_folder_is_refused(jsonl, tmp_path):
    shape = "--context 64 --vocab-size 320 --width 32 --layers 1 --heads 4 --kv-heads 2 --mlp-width 64".split()
    command = ["train", "--out", tmp_path / "run", *shape, "--rows-per-step", 2, "--max-steps", 1, "--device", "cpu"]
    first = taleloom(*command, "--dataset", jsonl)
    assert first.exit_code == 0, first.stderr
    (tmp_path / "other.jsonl").write_text('{"text": "Another story."}\n')
    done = taleloom(*command, "--dataset", tmp_path / "other.jsonl")
    assert done.exit_code == 1 and "other data or settings" in done.stderr


@pytest.mark.parametrize("option", ["--rows-per-step", "--rows-per-pass", "--heads", "--max-steps", "--context"])
def test_training_numbers_are_checked(jsonl, tmp_path, option):
    done = taleloom("train", "--dataset", jsonl, "--out", tmp_path / "run", option, "0")
    assert done.exit_code == 2 and option in done.stderr and not (tmp_path / "run").exists()


def test_the_app_serves_at_once_and_ends_with_its_process(tmp_path):
    """On a desktop Streamlit would ask for an e-mail address first; and whoever stops the app stops the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HOME": str(tmp_path), "DISPLAY": ":0", "TALELOOM_HOME": str(tmp_path / "taleloom")}
    command = [sys.executable, "-m", "model.cli", "app", "--port", str(port), "--address", "127.0.0.1"]
    app = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def healthy():
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1).status == 200
        except OSError:
            return False

    try:
        deadline_s = time.monotonic() + 30
        while not healthy():
            assert app.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.2)
    finally:
        app.terminate()
        app.wait(20)
    assert not healthy()


def test_bench_prints_its_figures(tiny_model, monkeypatch):
    from model import bench

    monkeypatch.setattr(bench, "N_TOKENS", 5)
    monkeypatch.setattr(bench, "N_ROUNDS", 1)
    monkeypatch.setattr(bench, "PROMPT_LENGTHS", (16,))
    results = json.loads(taleloom("bench", "--model", tiny_model, "--device", "cpu", "--json").stdout)
    assert set(results["tokens_per_second"]) == {"1", "4", "16", "64"}
    assert all(speed > 0 for speed in results["tokens_per_second"].values())
    assert all(speed > 0 for speed in results["fp32_tokens_per_second"].values())
    assert results["first_token_ms"]["16"] > 0 and results["load_s"] > 0
    assert 10 < results["memory_mb"]["1"] <= results["memory_mb"]["64"]
