"""Fixtures: a manager whose workers are quick, one whose workers only exist on paper, and the patience to wait."""

import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from model.config import FineTuneSettings, TrainingLimits
from model.jobs.launcher import LocalLauncher
from model.jobs.manager import JobManager
from model.jobs.process import Process, boot_id, boottime_s, is_alive

ROWS = [{"text": "We sailed at dawn.", "prompt": None, "split": "train"}] * 3
STAND_IN = (sys.executable, "-m", "tests.jobs.stand_in")


class PaperLauncher:
    """Starts nothing; a worker is alive for as long as its process is in `living`."""

    def __init__(self):
        self.started, self.living, self.terminated = [], set(), []

    def start(self, folder):
        process = Process(100_000 + len(self.started), 7, boot_id())
        self.started.append(folder.name)
        self.living.add(process)
        return process

    def is_alive(self, process):
        return process in self.living

    def terminate(self, process):
        self.terminated.append(process)
        self.living.discard(process)

    def reap(self):
        pass


class Jobs:
    """A manager with what tests do again and again."""

    def __init__(self, manager):
        self.manager = manager
        self.root, self.launcher = manager.root, manager.launcher

    def add(self, name="pirates", n_steps=20, **more):
        return self.manager.create(name, ROWS, FineTuneSettings(max_steps=n_steps), **more)

    def state(self, job):
        return self.manager.get(job.id).state

    def until(self, job, *states, timeout_s=30.0):
        """Tend until the job is in one of the states."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.manager.tend()
            now = self.manager.get(job.id)
            if now.state in states:
                return now
            time.sleep(0.02)
        raise AssertionError(f"{now.state} ({now.message}) instead of {states}\n{self.manager.log(job.id)}")

    def until_step(self, job, step, timeout_s=30.0):
        """Tend until the job has got so far; returns its worker's process."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.manager.tend()
            now = self.manager.get(job.id)
            if now.process and len(self.manager.metrics(job.id)) >= step:
                return now.process
            time.sleep(0.005)
        raise AssertionError(f"{now.state} ({now.message}) before step {step}\n{self.manager.log(job.id)}")

    def losses(self, job):
        metrics = self.manager.metrics(job.id)
        assert [record["step"] for record in metrics] == list(range(1, len(metrics) + 1))
        return [record["loss"] for record in metrics]

    def say(self, job, state, attempt=None, **more):
        """Write the status that the job's worker would."""
        job = self.manager.get(job.id)
        process = Process(*job.launched["process"])
        status = {"state": state, "message": "A sentence.", "step": 5, "steps": 20, "process": list(process)}
        status |= {"attempt": attempt or job.attempt, "heartbeat": {"time": time.time(), "boottime": boottime_s()}}
        (job.folder / "status.json").write_text(json.dumps({**status, **more}))
        if state not in ("starting", "running"):
            self.launcher.living.discard(process)
        return process

    def request(self, job, **changes):
        """Change job.json behind the manager's back."""
        path = job.folder / "job.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    for name in [name for name in os.environ if name.startswith("TALELOOM_") or name == "SPACE_ID"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TALELOOM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def paper(home) -> Jobs:
    """Jobs whose workers only exist on paper."""
    return Jobs(JobManager(launcher=PaperLauncher(), limits=TrainingLimits()))


@pytest.fixture
def another(home):
    """Makes one more manager of the same jobs, as a restarted app or a command line has it."""
    return lambda: Jobs(JobManager(launcher=LocalLauncher(STAND_IN), limits=TrainingLimits()))


@pytest.fixture
def real(another):
    """Jobs with real, quick workers; those that are still there in the end are killed."""
    jobs = another()
    yield jobs
    for job in jobs.manager.list():
        if job.process and is_alive(job.process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def stand_in():
    """The module of the quick worker, also where the tests' folder is not on the path."""
    spec = importlib.util.spec_from_file_location("stand_in", Path(__file__).with_name("stand_in.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def limited(home):
    """Makes paper jobs within limits."""
    return lambda **limits: Jobs(JobManager(launcher=PaperLauncher(), limits=TrainingLimits(**limits)))
