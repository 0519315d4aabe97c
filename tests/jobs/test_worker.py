"""The worker in this process: each way to end is a state with a sentence."""

import errno
import json
import os
import threading
import time

import pytest

from model.jobs import worker
from model.jobs.process import identify, try_lock
from model.jobs.record import JobState, read_status
from model.jobs.state import AT_WORK


@pytest.fixture
def job(paper, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return paper.add(source="")


@pytest.fixture
def ended(paper):
    """State and message of a job as a manager sees it."""
    return lambda job: (paper.state(job), paper.manager.get(job.id).message)


def test_it_says_that_it_starts_runs_and_is_done(paper, job, ended):
    seen = []

    def task(folder, report, should_stop):
        seen.append(read_status(folder))
        report({"step": 1, "steps": 3})
        seen.append(read_status(folder))
        report({"step": 3, "steps": 3, "message": "It tells the test ideas."})
        return "done"

    worker.main(job.folder, task)
    assert [status["state"] for status in seen] == ["starting", "running"]
    assert seen[0]["process"] == list(identify(os.getpid()))
    assert ended(job) == (JobState.DONE, "It is done.")
    assert paper.manager.get(job.id).progress == 1
    assert read_status(job.folder)["step"] == 3


@pytest.mark.parametrize(
    "how, sentence",
    [
        ("disk full", "The disk is full. Make room, for example by deleting old jobs, and resume."),
        ("nan", "The loss at step 3 is not a number. Try again with a lower learning rate."),
        ("memory", "The memory ran out. Close other programs and resume, or clone the job with fewer rows per pass."),
        ("bug", "Something went wrong: KeyError: 'a bug'. The log has the details."),
        ("exit", "Something went wrong: SystemExit: 3. The log has the details."),
    ],
)
def test_whatever_goes_wrong_is_said(paper, monkeypatch, ended, stand_in, capsys, how, sentence):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = paper.add(source=how)
    worker.main(job.folder, stand_in.learn)
    assert ended(job) == (JobState.FAILED, sentence)
    assert "Traceback" in capsys.readouterr().err
    assert paper.manager.get(job.id).step == 3
    assert paper.manager.get(job.id).can_resume


def test_torchs_own_ways_of_running_out_of_memory_are_known():
    assert "memory" in worker.sentence(type("OutOfMemoryError", (RuntimeError,), {})("CUDA"))
    assert "memory" in worker.sentence(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"))
    assert "Something" in worker.sentence(OSError(errno.ENOENT, "No such file"))


def test_a_damaged_checkpoint_is_said(paper, job, ended, stand_in):
    (job.folder / "checkpoint.json").write_text("{")
    worker.main(job.folder, stand_in.learn)
    state, message = ended(job)
    assert state is JobState.FAILED
    assert "damaged" in message


def test_on_a_full_disk_the_last_word_is_written_over_the_old_one(paper, job, ended, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def task(folder, report, should_stop):
        monkeypatch.setattr(worker, "write_atomically", full)
        full(folder, "")

    worker.main(job.folder, task)
    state, message = ended(job)
    assert state is JobState.FAILED
    assert "disk is full" in message


def test_the_heart_beats_while_a_step_takes_long(job, monkeypatch):
    monkeypatch.setattr(worker, "HEARTBEAT_S", 0.02)
    beats = []

    def task(folder, report, should_stop):
        for _ in range(3):
            beats.append(read_status(folder)["heartbeat"]["boottime"])
            time.sleep(0.2)
        return "done"

    worker.main(job.folder, task)
    assert beats == sorted(set(beats))


@pytest.mark.parametrize("wish, state", [("pause", JobState.PAUSED), ("cancel", JobState.CANCELLED)])
def test_wishes_arrive(paper, job, ended, wish, state):
    def task(folder, report, should_stop):
        report({"step": 1, "steps": 3})
        assert should_stop() is None
        paper.request(job, wanted=wish)
        deadline = time.monotonic() + 10
        while not (seen := should_stop()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert seen == wish
        return {"pause": "paused", "cancel": "cancelled"}[wish]

    worker.main(job.folder, task)
    assert ended(job)[0] is state


def test_a_later_attempt_means_pause_and_a_damaged_request_nothing_new(paper, job, monkeypatch):
    monkeypatch.setattr(worker, "WISH_S", 0)
    wishes = worker.Wishes(job.folder, 1)
    assert wishes.should_stop() is None
    content = (job.folder / "job.json").read_text()
    (job.folder / "job.json").write_text("{")
    assert wishes.should_stop() is None
    (job.folder / "job.json").write_text(content)
    paper.request(job, attempt=2)
    assert wishes.should_stop() == "pause"
    paper.request(job, attempt=2, wanted="cancel")
    assert wishes.should_stop() == "cancel"
    (job.folder / "job.json").unlink()
    assert wishes.should_stop() == "cancel"


def test_looking_for_wishes_is_cheap(job, monkeypatch):
    looks, read = [], worker.read_request
    monkeypatch.setattr(worker, "read_request", lambda folder: looks.append(1) or read(folder))
    monkeypatch.setattr(worker, "WISH_S", 0)
    wishes = worker.Wishes(job.folder, 1)
    for _ in range(1000):
        wishes.should_stop()
    assert len(looks) == 1


def test_cancelled_while_it_was_being_started_it_does_nothing(paper, job, ended, stand_in):
    paper.request(job, wanted="cancel")
    worker.main(job.folder, stand_in.learn)
    assert ended(job)[0] is JobState.CANCELLED
    assert not (job.folder / "metrics.jsonl").exists()


def test_a_second_worker_goes_when_the_first_has_said_that_it_is_there(job):
    lock = try_lock(job.folder / ".worker")
    second = threading.Thread(target=worker.main, args=(job.folder, None))
    second.start()
    second.join(0.3)
    assert second.is_alive()  # the first could still end without a word
    status = {"state": "running", "message": "", "step": 0, "steps": 1, "attempt": 1, "process": [5, 5, "x"]}
    (job.folder / "status.json").write_text(json.dumps({**status, "heartbeat": {"boottime": 0}}))
    second.join(10)
    assert not second.is_alive()
    assert read_status(job.folder)["process"] == [5, 5, "x"]
    lock.close()


def test_a_worker_that_comes_when_the_attempt_is_over_does_not_repeat_it(job, stand_in):
    worker.main(job.folder, stand_in.learn)
    before = read_status(job.folder)
    assert before["state"] not in AT_WORK
    worker.main(job.folder, lambda folder, report, should_stop: pytest.fail("again"))
    assert read_status(job.folder) == before


def test_a_resumption_has_as_many_threads_as_the_first_attempt(paper, job, monkeypatch):
    """Sums in another order are other sums: the loss curve would not go on exactly."""
    threads = []

    def task(folder, report, should_stop):
        threads.append(os.environ["OMP_NUM_THREADS"])
        return "paused"

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    worker.main(job.folder, task)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paper.request(job, attempt=2)
    worker.main(job.folder, task)
    assert threads == ["3", "3"]


def test_what_a_killed_worker_left_is_removed_but_for_what_the_manager_writes(paper, job):
    best = job.folder / "best"
    best.mkdir()
    left = [job.folder / name for name in (".checkpoint.safetensors.abcdefgh", ".status.json.a1b2_c3d")]
    left += [best / ".adapter_model.safetensors.abcdefgh", job.folder / ".best.abcdefgh"]
    left[-1].mkdir()
    (left[-1] / "model.safetensors").write_bytes(b"half")
    managers = job.folder / ".job.json.abcdefgh"
    for path in (*left[:-1], managers, best / "model.safetensors"):
        path.write_bytes(b"half")
    seen = []

    def task(folder, report, should_stop):
        seen.extend(path for path in [*folder.iterdir(), *best.iterdir()])
        return "paused"

    lock = try_lock(job.folder / ".worker")
    second = threading.Thread(target=worker.main, args=(job.folder, task))
    second.start()
    time.sleep(0.2)
    assert all(path.exists() for path in left)  # the other worker's
    lock.close()
    second.join(10)
    assert not set(left) & set(seen) and {managers, best / "model.safetensors"} <= set(seen)
    paper.request(job, attempt=2)
    (paper.root / "..created.jsonl.abcdefgh").write_text("half")
    paper.manager.tend()
    assert not managers.exists() and not (paper.root / "..created.jsonl.abcdefgh").exists()
