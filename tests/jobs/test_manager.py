"""The queue and what can be done to a job, with workers that only exist on paper."""

import threading

import pytest

from model.config import FineTuneSettings
from model.errors import InputError, TaleloomError
from model.jobs import admission
from model.jobs import manager as manager_module
from model.jobs.manager import JobManager
from model.jobs.process import boottime_s
from model.jobs.record import JobState


def test_one_at_a_time_in_the_order_of_the_queue(paper):
    jobs = [paper.add(f"job{i}") for i in range(3)]
    paper.manager.tend()
    paper.manager.tend()
    assert paper.launcher.started == [jobs[0].id]
    paper.say(jobs[0], "done")
    paper.manager.tend()
    assert paper.launcher.started == [job.id for job in jobs[:2]]
    paper.say(jobs[1], "failed")
    paper.manager.tend()
    assert paper.launcher.started == [job.id for job in jobs]
    assert [job.id for job in paper.manager.list()] == [job.id for job in jobs]


def test_the_order_of_the_queue_does_not_hang_on_the_clock(paper, monkeypatch):
    first = paper.add("first")
    monkeypatch.setattr(manager_module.time, "time", lambda: 1000.0)  # set back by years
    second, third = paper.add("second"), paper.add("third")
    paper.manager.pause(first.id)
    paper.manager.resume(first.id)
    for expected in (second, third, first):
        paper.manager.tend()
        assert paper.launcher.started[-1] == expected.id
        paper.say(expected, "done")


def test_devices_have_a_job_each(paper):
    jobs = [paper.add(f"job{i}", device=device) for i, device in enumerate(["cpu", "cuda", "cpu", "auto"])]
    paper.manager.tend()
    assert paper.launcher.started == [jobs[0].id, jobs[1].id]
    paper.say(jobs[0], "done")
    paper.manager.tend()
    assert paper.launcher.started[2:] == [jobs[2].id]
    paper.say(jobs[2], "done")
    paper.manager.tend()
    assert paper.launcher.started[3:] == []  # which device "auto" takes is not known here
    paper.say(jobs[1], "done")
    paper.manager.tend()
    assert paper.launcher.started[3:] == [jobs[3].id]


def test_managers_that_race_start_each_job_once(paper, home):
    for i in range(8):
        paper.add(f"job{i}", device=f"cuda:{i}")
    managers = [JobManager(launcher=paper.launcher, limits=paper.manager.limits) for _ in range(6)]
    threads = [threading.Thread(target=manager.tend) for manager in managers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paper.launcher.started) == len(set(paper.launcher.started)) == 8


def test_a_job_added_without_a_start_waits_for_resume(paper):
    job = paper.add(start=False)
    paper.manager.tend()
    assert (paper.state(job), paper.launcher.started) == (JobState.PAUSED, [])
    paper.manager.resume(job.id)
    paper.manager.tend()
    assert paper.launcher.started == [job.id]


def test_a_waiting_job_can_be_paused_and_cancelled(paper):
    first, second = paper.add("first"), paper.add("second")
    paper.manager.pause(first.id)
    assert paper.state(first) is JobState.PAUSED
    paper.manager.cancel(second.id)
    assert paper.state(second) is JobState.CANCELLED
    paper.manager.tend()
    assert paper.launcher.started == []
    paper.manager.cancel(first.id)
    assert paper.state(first) is JobState.CANCELLED


def test_resumed_while_it_still_pauses_it_pauses_and_goes_on(paper):
    """A wish to run on would be lost on a worker that has already begun to end."""
    job = paper.add()
    paper.manager.tend()
    paper.say(job, "running")
    paper.manager.pause(job.id)
    paper.manager.resume(job.id)
    assert paper.state(job) is JobState.QUEUED
    assert not paper.manager.get(job.id).can_delete
    paper.manager.tend()
    assert len(paper.launcher.started) == 1  # the first worker is still there
    paper.say(job, "paused", attempt=1)
    paper.manager.tend()
    assert len(paper.launcher.started) == 2


@pytest.mark.parametrize("wish, end", [("pause", JobState.PAUSED), ("cancel", JobState.CANCELLED)])
def test_resumed_and_then_not_wanted_after_all(paper, wish, end):
    job = paper.add()
    paper.manager.tend()
    paper.say(job, "running")
    paper.manager.pause(job.id)
    paper.manager.resume(job.id)
    getattr(paper.manager, wish)(job.id)
    assert paper.state(job) is JobState.RUNNING
    paper.say(job, "paused" if wish == "pause" else "cancelled", attempt=1)
    assert paper.state(job) is end


def test_a_cancelled_worker_that_does_not_end_is_ended(paper, monkeypatch):
    job = paper.add()
    paper.manager.tend()
    process = paper.say(job, "running")
    paper.manager.cancel(job.id)
    paper.manager.tend()
    assert paper.launcher.terminated == []
    monkeypatch.setattr(manager_module, "boottime_s", lambda: boottime_s() + 21)
    paper.manager.tend()
    assert paper.launcher.terminated == [process]
    assert paper.state(job) is JobState.CANCELLED


def test_a_worker_that_cannot_be_started_is_a_failed_job(paper, monkeypatch):
    def start(folder):
        raise OSError("no more processes")

    job = paper.add()
    monkeypatch.setattr(paper.launcher, "start", start)
    paper.manager.tend()
    failed = paper.manager.get(job.id)
    assert failed.state is JobState.FAILED
    assert "no more processes" in failed.message
    monkeypatch.undo()
    paper.manager.resume(job.id)
    paper.manager.tend()
    assert paper.launcher.started == [job.id]


def test_a_worker_that_nobody_would_know_of_is_ended(paper, monkeypatch):
    """The disk was full when its number was to be written down."""
    job = paper.add()

    def write(request):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manager_module, "write_request", write)
        with pytest.raises(OSError, match="No space"):
            paper.manager.tend()
    assert len(paper.launcher.terminated) == 1
    paper.manager.tend()
    assert paper.launcher.started == [job.id, job.id]


def test_retry_starts_anew_under_the_same_name_once(paper):
    job = paper.add(source="a file", test_ideas=["a whale"])
    paper.manager.tend()
    paper.say(job, "failed")
    again = paper.manager.retry(job.id)
    assert (again.retry_of, again.name, again.source, again.test_ideas) == (job.id, "pirates", "a file", ("a whale",))
    assert again.state is JobState.QUEUED
    assert paper.manager.stories(again.id) == paper.manager.stories(job.id)
    old = paper.manager.get(job.id)
    assert old.retried_as == again.id
    for refused in (paper.manager.retry, paper.manager.resume):
        with pytest.raises(InputError, match="failed"):
            refused(job.id)


def test_clone_with_changes(paper):
    job = paper.add(base="own")
    clone = paper.manager.clone(job.id, "corsairs", learning_rate=0.001, method="lora")
    assert (clone.clone_of, clone.name, clone.base) == (job.id, "corsairs", "own")
    assert clone.settings == FineTuneSettings(max_steps=20, learning_rate=0.001, method="lora")
    assert paper.manager.stories(clone.id) == paper.manager.stories(job.id)
    with pytest.raises(InputError, match="no setting speed"):
        paper.manager.clone(job.id, "third", speed=3)
    with pytest.raises(InputError, match="learning_rate"):
        paper.manager.clone(job.id, "third", learning_rate=7)
    with pytest.raises(InputError, match="already"):
        paper.manager.clone(job.id, "pirates")
    assert len(paper.manager.list()) == 2


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 80, "-x", "a\nb"])
def test_names_that_cannot_be_a_folders_are_refused(paper, name):
    with pytest.raises(InputError, match="name"):
        paper.add(name)
    assert paper.manager.list() == []


def test_names_are_given_once(paper, home):
    job = paper.add("pirates")
    (home / "models" / "Corsairs").mkdir(parents=True)
    for taken in ("pirates", "PIRATES", "Corsairs", "corsairs"):
        with pytest.raises(InputError, match="already"):
            paper.add(taken)
    other = paper.add("other")
    with pytest.raises(InputError, match="already"):
        paper.manager.rename(other.id, "pirates")
    paper.manager.rename(other.id, "other")
    paper.manager.rename(other.id, "Other")
    paper.manager.delete(job.id)
    paper.add("pirates")


def test_rename_and_note(paper):
    job = paper.add()
    paper.manager.rename(job.id, "corsairs")
    paper.manager.note(job.id, " lower rate ")
    assert (paper.manager.get(job.id).name, paper.manager.get(job.id).note) == ("corsairs", "lower rate")
    paper.manager.tend()
    paper.manager.note(job.id, "while it runs")
    with pytest.raises(InputError, match="being trained"):
        paper.manager.rename(job.id, "buccaneers")


def test_delete_removes_the_folder_and_nothing_else(paper, home, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    job, other = paper.add(), paper.add("other")
    (job.folder / "link").symlink_to(elsewhere)
    paper.manager.delete(job.id)
    assert not job.folder.exists()
    assert (elsewhere / "kept").read_text() == "kept"
    assert [each.id for each in paper.manager.list()] == [other.id]
    assert not list(paper.root.glob(".deleted-*"))
    with pytest.raises(InputError, match="no job"):
        paper.manager.get(job.id)


def test_a_running_job_cannot_be_deleted(paper):
    job = paper.add()
    paper.manager.tend()
    with pytest.raises(InputError, match="running"):
        paper.manager.delete(job.id)


@pytest.mark.parametrize("id", ["", ".", "..", "../jobs", ".lock", "no-such-job", "a/b", "x" * 300, "a\0b"])
def test_ids_are_names_of_jobs_only(paper, id):
    paper.add()
    for method in (paper.manager.get, paper.manager.delete, paper.manager.pause, paper.manager.metrics):
        with pytest.raises(InputError, match="no job"):
            method(id)


def test_what_a_crash_left_is_no_job_and_goes(paper):
    job = paper.add()
    for name in (".new-1", ".deleted-2"):
        (paper.root / name).mkdir()
        (paper.root / name / "data.jsonl").write_text("half")
    assert [each.id for each in paper.manager.list()] == [job.id]
    paper.manager.tend()
    assert not list(paper.root.glob(".new-*")) + list(paper.root.glob(".deleted-*"))


def test_a_full_disk_leaves_no_half_job(paper, monkeypatch):
    def write(request):
        raise OSError("No space left on device")

    monkeypatch.setattr(admission, "write_request", write)
    with pytest.raises(TaleloomError, match="Make room"):
        paper.add()
    assert paper.manager.list() == []
    assert not list(paper.root.glob(".new-*"))


def test_the_queue_is_tended_by_one_thread_that_survives_errors(paper, monkeypatch):
    job = paper.add()
    errors, launch = [OSError("disk full")], paper.launcher.start

    def start(folder):
        if errors:
            raise RuntimeError(errors.pop())
        return launch(folder)

    monkeypatch.setattr(paper.launcher, "start", start)
    thread = paper.manager.keep_tending(0.01)
    assert paper.manager.keep_tending() is thread
    for _ in range(500):
        if paper.launcher.started:
            break
        thread.join(0.01)
    assert paper.launcher.started == [job.id]


def test_no_jobs_yet(paper):
    assert paper.manager.list() == []
    paper.manager.tend()
