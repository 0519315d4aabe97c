"""What is said of stories before anything starts."""

import json

import pytest

from model.config import FineTuneSettings
from model.errors import ModelError
from model.intake import read_paste, read_sample
from model.jobs.plan import measured_speed, plan


def learned(paper, name, speeds, **more):
    job = paper.add(name, **more)
    lines = [json.dumps({"step": i, "loss": 2.0, "tokens_per_second": speed}) for i, speed in enumerate(speeds)]
    (job.folder / "metrics.jsonl").write_text(
        "\n".join([json.dumps({"step": 0, "evaluation": True}), *lines]) + '\n{"st'
    )
    return job


def test_the_sample_set(home):
    check, estimate = plan(read_sample(), FineTuneSettings(max_steps=200, epochs=8))
    assert (check.n_stories, check.n_train, check.n_test) == (44, 34, 10)
    assert 0 < estimate.n_steps < 200 and estimate.seconds > 10 and estimate.memory_mb > 300
    assert not (home / "jobs").exists(), "looking writes nothing"


def test_the_base_decides_the_tokens_and_the_speed(tiny_model, stories):
    intake = read_paste("\n---\n".join(stories[:10]))
    settings = FineTuneSettings()
    with pytest.raises(ModelError):
        plan(intake, settings, str(tiny_model))  # on a page a path is no model
    check, estimate = plan(intake, settings, str(tiny_model), folders=True)
    bundled_check, bundled = plan(intake, settings)
    assert check.context == 64 and bundled_check.context == 512 and check.n_tokens > bundled_check.n_tokens
    assert estimate.memory_mb < bundled.memory_mb


def test_the_latest_speed_of_that_base_counts(paper):
    assert measured_speed() is None
    learned(paper, "old", [500.0] * 20)
    learned(paper, "new", [1000.0] * 4 + [1.0, 1000.0, 9000.0])
    learned(paper, "too-short", [5.0] * 4)
    learned(paper, "other", [7.0] * 20, base="owls")
    damaged = learned(paper, "damaged", [9.0] * 20)
    (damaged.folder / "job.json").write_text("{half")
    assert measured_speed() == 1000 and measured_speed("owls") == 7 and measured_speed("mice") is None
    at_typical_speed = plan(read_sample(), FineTuneSettings(), root=paper.root / "none")[1].seconds
    assert plan(read_sample(), FineTuneSettings())[1].seconds > at_typical_speed, "this machine is a slow one"
