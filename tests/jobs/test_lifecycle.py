"""Jobs in processes of their own, which are killed, paused, and left alone by their app."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from model.config import CHECKOUT
from model.jobs import manager as manager_module
from model.jobs.launcher import LocalLauncher
from model.jobs.process import HAS_PROC, is_alive
from model.jobs.record import JobState, read_status

N_STEPS = 30
APP = """
import sys, time
from pathlib import Path
from model.config import TrainingLimits
from model.jobs.launcher import LocalLauncher
from model.jobs.manager import JobManager
launcher = LocalLauncher([sys.executable, "-m", "tests.jobs.stand_in"])
JobManager(Path(sys.argv[1]), launcher, TrainingLimits()).keep_tending(0.02)
print("tending", flush=True)
time.sleep(600)
"""


@pytest.fixture
def app(real):
    """Starts an app that tends the jobs, a process of its own."""
    apps = []

    def start():
        app = subprocess.Popen([sys.executable, "-c", APP, real.root], stdout=subprocess.PIPE, cwd=CHECKOUT)
        apps.append(app)
        assert app.stdout.readline() == b"tending\n"
        return app

    yield start
    for app in apps:
        app.kill()
        app.wait()
        app.stdout.close()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)


def wait_for(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_at_random(real, stand_in, n_kills, seed):
    """Kill a job's worker n times and resume it; the loss curve is an undisturbed run's."""
    rng = random.Random(seed)
    n_steps = 8 * n_kills + 20
    job = real.add(n_steps=n_steps)
    for _ in range(n_kills):
        real.until(job, JobState.RUNNING)
        if rng.random() < 0.7:
            real.until_step(job, min(n_steps, len(real.manager.metrics(job.id)) + rng.randint(0, 12)))
        time.sleep(rng.random() * 0.05)
        process = real.manager.get(job.id).process
        if process is None:  # it had not been heard of yet, or was done
            break
        kill(process)
        # Killed before its first word it has failed, else it is lost: either can be resumed.
        real.until(job, JobState.LOST, JobState.FAILED)
        real.manager.resume(job.id)
    done = real.until(job, JobState.DONE)
    assert real.losses(job) == stand_in.undisturbed(n_steps)
    assert (done.step, done.progress) == (n_steps, 1)


def test_two_jobs_one_after_the_other(real, stand_in):
    first, second = real.add("first", N_STEPS), real.add("second", N_STEPS)
    real.until_step(first, 1)
    assert real.state(second) is JobState.QUEUED
    real.until(second, JobState.DONE)
    assert real.state(first) is JobState.DONE
    for job in (first, second):
        assert real.losses(job) == stand_in.undisturbed(N_STEPS)
        assert real.manager.result(job.id)["steps"] == N_STEPS
        assert "attempt 1" in real.manager.log(job.id)


def test_pause_and_resume_keep_the_exact_state(real, stand_in):
    job = real.add(n_steps=200)
    real.until_step(job, 5)
    real.manager.pause(job.id)
    paused = real.until(job, JobState.PAUSED)
    n = len(real.manager.metrics(job.id))
    assert 5 <= n < 200
    assert paused.step == n
    real.manager.resume(job.id)
    real.until_step(job, n + 1)
    real.manager.pause(job.id)
    real.manager.resume(job.id)  # at once
    real.until(job, JobState.DONE)
    assert real.losses(job) == stand_in.undisturbed(200)


def test_cancel_ends_the_worker(real):
    job = real.add(n_steps=5000)
    process = real.until_step(job, 2)
    real.manager.cancel(job.id)
    real.until(job, JobState.CANCELLED)
    wait_for(lambda: not is_alive(process))
    assert not real.manager.get(job.id).can_resume
    again = real.manager.retry(job.id)
    real.until_step(again, 1)
    real.manager.cancel(again.id)
    real.until(again, JobState.CANCELLED)
    for each in (job, again):
        real.manager.delete(each.id)
    assert real.manager.list() == []


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_and_resumed_it_learns_the_same(real, stand_in, seed):
    kill_at_random(real, stand_in, 2, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_killed_20_times_and_resumed_it_learns_the_same(real, stand_in, seed):
    kill_at_random(real, stand_in, 20, seed)


def test_a_lost_job_does_not_hold_up_the_queue(real):
    first, second = real.add("first", 5000), real.add("second", 5)
    kill(real.until_step(first, 2))
    real.until(second, JobState.DONE)
    assert real.state(first) is JobState.LOST


def test_a_killed_worker_whose_parent_has_not_reaped_it_is_lost(real):
    """It is a zombie: its number and its start time are still there."""
    job = real.add(n_steps=5000)
    process = real.until_step(job, 2)
    kill(process)
    wait_for(lambda: real.state(job) is JobState.LOST)
    if HAS_PROC:
        os.kill(process.pid, 0)  # still there


def test_sigterm_pauses_with_exact_state(real, stand_in):
    job = real.add(n_steps=100)
    process = real.until_step(job, 5)
    os.kill(process.pid, signal.SIGTERM)
    paused = real.until(job, JobState.PAUSED)
    assert "shutting down" in paused.message
    assert paused.can_resume
    real.manager.resume(job.id)
    real.until(job, JobState.DONE)
    assert real.losses(job) == stand_in.undisturbed(100)


def test_a_worker_outlives_its_app_and_a_new_one_knows_it(real, another, app, stand_in):
    job, waiting = real.add(n_steps=150), real.add("waiting", 5)
    first = app()
    wait_for(lambda: len(real.manager.metrics(job.id)) > 3)
    process = real.manager.get(job.id).process
    first.kill()
    first.wait()
    new = another()
    assert new.state(job) is JobState.RUNNING
    assert new.manager.get(job.id).process == process
    new.until(waiting, JobState.DONE)
    assert new.state(job) is JobState.DONE
    assert new.losses(job) == stand_in.undisturbed(150)
    assert new.manager.log(job.id).count("--- attempt") == 1


def kill_apps(real, app, stand_in, n_kills, seed):
    """Kill the app at random moments, of the start of a worker too; no job is lost, doubled or stuck."""
    rng = random.Random(seed)
    jobs = [real.add(f"job{i}", 10) for i in range(4)]
    for _ in range(n_kills):
        its = app()
        time.sleep(rng.random() * 0.4)
        its.kill()
        its.wait()
    app()
    wait_for(lambda: all(job.state is JobState.DONE for job in real.manager.list()), 60)
    assert [job.id for job in real.manager.list()] == [job.id for job in jobs]
    for job in jobs:
        assert real.losses(job) == stand_in.undisturbed(10)
        assert real.manager.log(job.id).count("--- attempt") == 1


def test_apps_killed_at_random_moments(real, app, stand_in):
    kill_apps(real, app, stand_in, 2, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_five_apps_killed_at_random_moments(real, app, stand_in, seed):
    kill_apps(real, app, stand_in, 5, seed)


def test_two_apps_start_each_job_once(real, app, stand_in):
    jobs = [real.add(f"job{i}", 5) for i in range(3)]
    app(), app()
    wait_for(lambda: all(job.state is JobState.DONE for job in real.manager.list()))
    for job in jobs:
        assert real.losses(job) == stand_in.undisturbed(5)
        assert real.manager.log(job.id).count("--- attempt") == 1


def test_a_second_worker_of_a_job_leaves_it_alone(real, stand_in):
    job = real.add(n_steps=100)
    real.until_step(job, 2)
    second = real.launcher.start(job.folder)
    wait_for(lambda: not is_alive(second))
    assert real.state(job) is JobState.RUNNING
    real.until(job, JobState.DONE)
    assert real.losses(job) == stand_in.undisturbed(100)


def test_a_job_whose_start_was_not_recorded_is_not_done_twice(real, another, stand_in):
    """The app died right after it had started a worker: the next one starts a second, and only one of them works."""
    job = real.add(n_steps=40)
    orphan = real.launcher.start(job.folder)
    another().manager.tend()
    real.until(job, JobState.DONE)
    wait_for(lambda: not is_alive(orphan))
    assert real.losses(job) == stand_in.undisturbed(40)
    assert real.manager.log(job.id).count("--- attempt") == 1


def test_a_stopped_worker_is_running_and_a_cancel_ends_it_all_the_same(real, monkeypatch):
    job = real.add(n_steps=5000)
    process = real.until_step(job, 2)
    os.kill(process.pid, signal.SIGSTOP)
    assert real.state(job) is JobState.RUNNING
    real.manager.cancel(job.id)
    monkeypatch.setattr(manager_module, "CANCEL_TIMEOUT_S", 0.1)
    time.sleep(0.15)
    real.until(job, JobState.CANCELLED)
    wait_for(lambda: not is_alive(process))


def test_a_worker_that_cannot_begin_has_failed_with_the_end_of_its_log(real):
    job = real.add()
    real.manager.launcher = LocalLauncher([sys.executable, "-c", "raise ImportError('no torch here')"])
    failed = real.until(job, JobState.FAILED)
    assert "no torch here" in failed.message
    real.manager.launcher = LocalLauncher(["/no/such/program"])
    real.manager.resume(job.id)
    assert "could not be started" in real.until(job, JobState.FAILED).message
    real.manager.launcher = real.launcher
    real.manager.resume(job.id)
    real.until(job, JobState.DONE)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_stops_nothing(real):
    job = real.add(n_steps=5)
    (job.folder / "log.txt").symlink_to("/dev/full")
    real.until(job, JobState.DONE)
    (real.manager.get(job.id).folder / "log.txt").unlink()


def test_a_detached_tender_drains_the_queue_and_ends(real):
    """What `--detach` starts, but with quick workers; while one is there a second one leaves at once."""
    job = real.add(n_steps=5000)
    code = APP.replace(".keep_tending(0.02)", ".tend_until_idle(0.02)").replace("time.sleep(600)", "")
    command = [sys.executable, "-c", code, real.root]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=CHECKOUT))
        wait_for(lambda: real.manager.metrics(job.id))
        second = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=CHECKOUT))
        assert second.wait(10) == 0
        assert first.poll() is None
        later = real.add("later", 20)
        real.manager.cancel(job.id)
        assert first.wait(30) == 0
    assert (real.state(job), real.state(later)) == (JobState.CANCELLED, JobState.DONE)


def test_the_manager_runs_as_a_module_and_ends_when_there_is_nothing_to_do(real):
    real.add(start=False)
    real.manager.detach()
    wait_for(lambda: (real.root / ".tending").exists())
    subprocess.run([sys.executable, "-m", "model.jobs.manager", real.root], cwd=CHECKOUT, timeout=30, check=True)


def test_the_real_worker_says_at_low_priority_that_it_cannot_do_a_job(real):
    job = real.add()
    (job.folder / "data.jsonl").unlink()
    with subprocess.Popen([sys.executable, "-m", "model.jobs.worker", job.folder], cwd=CHECKOUT) as worker:
        wait_for(lambda: read_status(job.folder))
        assert os.getpriority(os.PRIO_PROCESS, worker.pid) >= 10
        assert worker.wait(120) == 0
    assert read_status(job.folder)["state"] == "failed"
    assert "stories of this job cannot be read" in real.manager.get(job.id).message


def test_neither_the_manager_nor_the_workers_first_word_waits_for_torch():
    code = "import sys, model.jobs.manager, model.jobs.worker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True)
