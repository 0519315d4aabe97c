"""What may be asked for: TrainingLimits from the environment, and what a new job is refused for."""

import dataclasses
import json
import os
import shutil
import time
from collections import namedtuple

import pytest

from model.config import FINE_TUNE_PRESETS, LIMITED, FineTuneSettings, TrainingLimits
from model.errors import BusyError, InputError, TaleloomError
from model.jobs import admission
from model.jobs.record import JobState
from tests.paper import ROWS


def test_one_owns_machine_is_open_and_a_space_is_off_until_it_is_asked_for():
    assert TrainingLimits.from_environment({}) == TrainingLimits()
    assert TrainingLimits.from_environment({}).mode == "open"
    assert TrainingLimits.from_environment({"SPACE_ID": "a/b"}).mode == "off"
    assert TrainingLimits.from_environment({"SPACE_ID": "a/b", "TALELOOM_TRAINING": ""}).mode == "off"
    assert TrainingLimits.from_environment({"SPACE_ID": "a/b", "TALELOOM_TRAINING": "open"}).mode == "open"


def test_limited_has_limits_and_each_can_be_set():
    limits = TrainingLimits.from_environment({"TALELOOM_TRAINING": "limited", "TALELOOM_TRAINING_SIGN_IN": "1"})
    assert limits == TrainingLimits("limited", sign_in=True, **LIMITED)
    assert None not in LIMITED.values()
    numbers = {f"TALELOOM_{name.upper()}": str(i) for i, name in enumerate(LIMITED)}
    limits = TrainingLimits.from_environment({"TALELOOM_TRAINING": "limited", **numbers})
    assert [getattr(limits, name) for name in LIMITED] == list(range(len(LIMITED)))
    assert TrainingLimits.from_environment({"TALELOOM_MAX_QUEUE": "2"}).max_queue == 2


@pytest.mark.parametrize(
    "environment",
    [{"TALELOOM_TRAINING": "maybe"}, {"TALELOOM_MAX_QUEUE": "two"}, {"TALELOOM_MAX_UPLOAD_MB": "-1"}],
)
def test_settings_of_the_environment_that_cannot_be_are_named(environment):
    with pytest.raises(InputError, match=next(iter(environment))):
        TrainingLimits.from_environment(environment)


def test_off_refuses_everything_that_trains(limited, paper):
    job = paper.add(start=False)
    off = limited(mode="off")
    for refused in (
        lambda: off.add("other"),
        lambda: off.manager.resume(job.id),
        lambda: off.manager.clone(job.id, "x"),
    ):
        with pytest.raises(TaleloomError, match="switched off"):
            refused()
    off.manager.cancel(job.id)  # what is there can be put in order
    with pytest.raises(TaleloomError, match="switched off"):
        off.manager.retry(job.id)
    off.manager.delete(job.id)


def test_sign_in(limited):
    jobs = limited(sign_in=True)
    with pytest.raises(TaleloomError, match="Sign in"):
        jobs.add()
    job = jobs.add(visitor="mia@example.org")
    assert "mia" not in (job.folder / "job.json").read_text()


def test_sizes(limited):
    long = [{"text": "word " * 1000, "prompt": None, "split": "train"}]
    with pytest.raises(InputError, match="0 MB are allowed"):
        limited(max_upload_mb=0).add()
    tokens = limited(max_job_tokens=1000)
    with pytest.raises(InputError, match="1,000 are allowed"):
        tokens.manager.create("long", long, FineTuneSettings())
    tokens.manager.create("counted", long, FineTuneSettings(), n_tokens=1000)
    steps = limited(max_job_steps=100)
    for max_steps in (101, None):
        with pytest.raises(InputError, match="max_steps to 100"):
            steps.add(n_steps=max_steps)
    steps.add(n_steps=100)


@pytest.mark.parametrize("name", ["rows_per_step", "rows_per_pass", "evaluations"])
def test_what_is_done_at_each_step_is_limited_too(limited, name):
    jobs = limited(mode="limited", **LIMITED)
    most = LIMITED["max_evaluations" if name == "evaluations" else f"max_{name}"]
    settings = FineTuneSettings(max_steps=100, **{name: most})
    job = jobs.manager.create("most", ROWS, settings)
    with pytest.raises(InputError, match=f"{name} is {most + 1}; set it to {most} or less"):
        jobs.manager.create("more", ROWS, dataclasses.replace(settings, **{name: most + 1}))
    with pytest.raises(InputError, match=name):
        jobs.manager.clone(job.id, "more", **{name: most + 1})


def test_presets_fit_what_is_limited_but_for_their_steps(limited):
    jobs = limited(**{**LIMITED, "max_jobs_per_visitor": 10})
    for name in ("quick", "good"):
        settings = dataclasses.replace(FINE_TUNE_PRESETS[name], max_steps=LIMITED["max_job_steps"])
        jobs.manager.create(name, ROWS, settings)


def test_queue(limited):
    jobs = limited(max_queue=1)
    first = jobs.add("first")
    with pytest.raises(BusyError, match="wait already"):
        jobs.add("second")
    second = jobs.add("second", start=False)
    with pytest.raises(BusyError, match="wait already"):
        jobs.manager.resume(second.id)
    jobs.manager.tend()
    jobs.manager.resume(second.id)
    assert jobs.state(first) is JobState.RUNNING


def test_jobs_a_day_are_counted_by_visitor_and_by_all_though_deleted(limited, monkeypatch):
    jobs = limited(max_jobs_per_visitor=2, max_jobs_per_day=3)
    for i in range(2):
        jobs.manager.delete(jobs.add(f"job{i}", visitor="mia").id)
    with pytest.raises(BusyError, match="You have started 2 jobs"):
        jobs.add("more", visitor="mia")
    job = jobs.add("others", visitor="tom")
    with pytest.raises(BusyError, match="3 jobs were started here"):
        jobs.add("more", visitor="ben")
    jobs.manager.cancel(job.id)
    with pytest.raises(BusyError):
        jobs.manager.retry(job.id)
    now = time.time()
    monkeypatch.setattr(admission.time, "time", lambda: now + 25 * 3600)
    jobs.add("tomorrow", visitor="mia")
    ledger = (jobs.root / admission.LEDGER).read_text().splitlines()
    assert [json.loads(line)["visitor"] for line in ledger] == [admission.visitor_key("mia")]


def test_disk(limited, paper, monkeypatch):
    with pytest.raises(TaleloomError, match="400 MB are allowed"):
        limited(disk_quota_mb=400).add()
    free = namedtuple("Usage", "total used free")(10**12, 10**12, 3 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(TaleloomError, match="3 MB left"):
        paper.add()
    assert paper.manager.list() == []


@pytest.mark.parametrize("place", ["jobs/x/checkpoint.safetensors", "models/mia/model.safetensors", "hub/blobs/1"])
def test_jobs_storytellers_and_downloads_fill_the_quota(limited, home, place):
    jobs = limited(disk_quota_mb=520)
    (home / place).parent.mkdir(parents=True)
    with (home / place).open("wb") as file:
        file.truncate(19_000_000)
        jobs.add("fits")
        file.truncate(25_000_000)
    with pytest.raises(TaleloomError, match=r"take 25 MB and a new job up to 500; 520 MB are allowed"):
        jobs.add("too-much")


def test_the_quota_is_counted_though_files_go_meanwhile(limited, home, monkeypatch):
    jobs = limited(disk_quota_mb=10_000)
    folder = home / "jobs" / "running"
    folder.mkdir(parents=True)
    for name in ("status.json", ".status.json.abcdefgh"):
        (folder / name).write_text("{}")
    looked_at, real = [], admission.os.lstat

    def lstat(path):
        looked_at.append(os.path.basename(path))
        if looked_at[-1].startswith("."):
            os.unlink(path)
        return real(path)

    monkeypatch.setattr(admission.os, "lstat", lstat)
    admission.check_disk(jobs.manager.limits, home / "jobs")
    assert {"status.json", ".status.json.abcdefgh"} <= set(looked_at)


def test_stories_and_ideas_that_cannot_be_used(paper):
    held_out, blank = {"text": "a", "prompt": None, "split": "test"}, {"text": " ", "prompt": None, "split": "train"}
    for rows in ([], [held_out], [blank]):
        with pytest.raises(InputError, match="no story"):
            paper.manager.create("x", rows, FineTuneSettings())
    with pytest.raises(InputError, match="5 test ideas"):
        paper.add(test_ideas=["a", "b", "c", "d", "e"])
    with pytest.raises(InputError, match="301 characters; 300 are the most"):
        paper.add(test_ideas=["a fox", "x" * 301])
    paper.add(test_ideas=[" " + "x" * 300 + " "])
