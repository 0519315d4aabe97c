"""Long runs: `make soak`."""

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.config import SamplingParams
from model.storyteller import N_SLOTS, Storyteller

pytestmark = pytest.mark.soak


def memory_growth_mb(model: str) -> float:
    """How much the process's peak grows from the four-thousandth to the ten-thousandth story."""

    def peak_mb() -> float:
        # Linux's; getrusage's peak is inherited from the process that started this one.
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    rng = random.Random(0)
    with Storyteller.load(model, device="cpu") as storyteller:

        def tell(n):
            for seed in range(n):
                prompt = "Ben " * rng.randint(1, 30)
                stories = [
                    storyteller.tell(prompt, SamplingParams(max_tokens=rng.randint(1, 60), seed=seed), mode="opening")
                    for _ in range(100)
                ]
                stories[0].stop()
                next(iter(stories[1]), None)  # the iterator is dropped
                assert all(story.wait(30) for story in stories)
                assert not any(story.error for story in stories)

        tell(40)  # every slot was used, and the storyteller remembers as many stories as it ever will
        before = peak_mb()
        tell(60)
        assert len(storyteller.engine._scheduler._free) == N_SLOTS
        return peak_mb() - before


def test_ten_thousand_stories_leave_memory_where_it_was(tiny_model):
    """Finished, stopped and dropped stories all give their slots back.

    In a process of its own: the peak of one that other tests ran in says little.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(memory_growth_mb, (str(tiny_model),)) < 15


def test_training_killed_at_random_moments_keeps_its_curve(jsonl, tmp_path):
    jsonl.write_text(jsonl.read_text() * 20)
    shape = "--context 64 --vocab-size 320 --width 32 --layers 2 --heads 4 --kv-heads 2 --mlp-width 64".split()
    shape += "--rows-per-step 2 --rows-per-pass 1 --save-every 5 --device cpu".split()
    rng = random.Random(1)

    def command(name):
        return [
            sys.executable,
            "-m",
            "model.cli",
            "train",
            "--dataset",
            str(jsonl),
            "--out",
            str(tmp_path / name),
            *shape,
        ]

    for _ in range(12):
        process = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL, env={"OMP_NUM_THREADS": "1"})
        time.sleep(rng.uniform(2, 8))
        process.send_signal(signal.SIGKILL)
        process.wait()
    curves = []
    for name in ("killed", "whole"):
        subprocess.run(command(name), check=True, timeout=600, env={"OMP_NUM_THREADS": "1"})
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    assert curves[0] == curves[1]
