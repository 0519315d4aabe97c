"""Fixtures: a manager whose workers are quick, one whose workers only exist on paper, and the patience to wait."""

import contextlib
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

from model.config import TrainingLimits
from model.jobs.launcher import LocalLauncher
from model.jobs.manager import JobManager
from model.jobs.process import is_alive
from tests.paper import Jobs, PaperLauncher

STAND_IN = (sys.executable, "-m", "tests.jobs.stand_in")


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
