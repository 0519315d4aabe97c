"""What a folder says: every state from its files and its worker's life, and files that are damaged."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.errors import InputError
from model.jobs import state as state_module
from model.jobs.process import boottime_s
from model.jobs.record import (
    JobState,
    append_line,
    read_job,
    read_lines,
    read_log,
    read_request,
    read_result,
    read_status,
    read_stories,
)


@pytest.fixture
def running(paper):
    job = paper.add()
    paper.manager.tend()
    paper.say(job, "running")
    return job


def test_a_job_reads_as_it_was_written(paper):
    job = paper.add(base="own", source="a file", test_ideas=["a whale", " "], device="cpu", note=" my note ")
    read = read_job(job.folder)
    assert (read.name, read.base, read.source, read.device, read.note) == ("pirates", "own", "a file", "cpu", "my note")
    assert read.test_ideas == ("a whale",)
    assert read.settings == job.settings
    assert read.settings.max_steps == 20
    assert read == job
    assert read.state is JobState.QUEUED
    assert read_stories(job.folder)[0] == {"text": "We sailed at dawn.", "prompt": None, "split": "train"}


def test_a_worker_that_says_it_runs_and_lives_is_running(paper, running):
    job = paper.manager.get(running.id)
    assert (job.state, job.step, job.steps, job.progress) == (JobState.RUNNING, 5, 20, 0.25)
    assert job.message == "A sentence."
    assert job.can_pause and job.can_cancel
    assert not (job.can_delete or job.can_retry or job.can_resume)


@pytest.mark.parametrize("state", ["paused", "done", "failed", "cancelled"])
def test_the_workers_last_word_counts(paper, running, state):
    paper.say(running, state)
    job = paper.manager.get(running.id)
    assert (job.state, job.message) == (state, "A sentence.")
    assert job.can_delete


def test_a_worker_that_is_gone_without_a_word_is_lost(paper, running):
    paper.launcher.living.clear()
    job = paper.manager.get(running.id)
    assert job.state is JobState.LOST
    assert "resume it" in job.message
    assert job.can_resume and job.can_retry and job.can_delete


def test_after_a_restart_of_the_machine_running_jobs_are_lost_and_waiting_ones_wait(paper, running, monkeypatch):
    """Pid and start time may be another process's after a reboot; the boot id tells."""
    waiting = paper.add("next")
    status = json.loads((running.folder / "status.json").read_text())
    status["process"][2] = "the start of the machine before"
    (running.folder / "status.json").write_text(json.dumps(status))
    lost = read_job(running.folder)  # by the real look at processes
    assert (lost.state, lost.message) == (JobState.LOST, "The computer was restarted; resume it.")
    assert paper.state(waiting) is JobState.QUEUED


def test_last_words_that_come_between_two_looks_are_heard(paper, running):
    """Status read, worker ends well, worker looked for: that was no loss."""

    def alive(process):
        paper.say(running, "done")
        return False

    assert read_job(running.folder, alive).state is JobState.DONE


def test_a_silent_worker_is_running_and_said_to_be_silent(paper, running):
    paper.say(running, "running", heartbeat={"time": time.time(), "boottime": boottime_s() - 100})
    job = paper.manager.get(running.id)
    assert job.state is JobState.RUNNING
    assert "not been heard of for 100 s" in job.message


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_setting_the_clock_changes_no_state(paper, running, monkeypatch, jump_s):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump_s)
    job = paper.manager.get(running.id)
    assert (job.state, job.message) == (JobState.RUNNING, "A sentence.")


@pytest.mark.parametrize("wish, state", [("pause", JobState.PAUSED), ("cancel", JobState.CANCELLED)])
def test_a_wish_is_fulfilled_by_the_end_of_the_worker(paper, running, wish, state):
    getattr(paper.manager, wish)(running.id)
    assert paper.state(running) is JobState.RUNNING
    paper.launcher.living.clear()
    assert paper.state(running) is state


def test_a_worker_that_ends_before_its_first_word_has_failed_and_the_log_is_quoted(paper):
    job = paper.add()
    paper.manager.tend()
    assert paper.state(job) is JobState.RUNNING
    (job.folder / "log.txt").write_text("Traceback\nImportError: no module named torch\n")
    paper.launcher.living.clear()
    failed = paper.manager.get(job.id)
    assert failed.state is JobState.FAILED
    assert "ended before it began" in failed.message
    assert "no module named torch" in failed.message
    assert failed.can_resume and failed.can_retry


def test_a_worker_that_does_not_begin_in_time_has_failed_and_is_ended(paper, monkeypatch):
    job = paper.add()
    paper.manager.tend()
    monkeypatch.setattr(state_module, "boottime_s", lambda: boottime_s() + 61)
    failed = paper.manager.get(job.id)
    assert failed.state is JobState.FAILED
    assert "did not begin within 60 s" in failed.message
    paper.manager.tend()
    assert paper.launcher.terminated == [failed.process]


def test_a_status_of_the_attempt_before_does_not_count(paper, running):
    paper.say(running, "paused")
    paper.manager.resume(running.id)
    assert paper.state(running) is JobState.QUEUED
    paper.manager.tend()
    assert paper.manager.get(running.id).message == "It is starting."


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '{"state": "running"}', '{"state": 5, "step": "x"}'])
def test_a_damaged_status_ends_in_a_state_with_a_sentence(paper, running, content):
    (running.folder / "status.json").write_text(content)
    job = paper.manager.get(running.id)
    assert (job.state, bool(job.message)) == (JobState.RUNNING, True)
    paper.launcher.living.clear()
    job = paper.manager.get(running.id)
    assert job.state is JobState.LOST
    assert "status.json" in job.message
    paper.manager.resume(running.id)
    paper.manager.tend()
    assert paper.state(running) is JobState.RUNNING


DAMAGED_REQUESTS = ["", "{", "null", "[]", "{}", '{"name": "x", "settings": 5}', '{"name": 5, "settings": {}}']
DAMAGED_REQUESTS += ['{"name": "x", "settings": {}, "wanted": "fly"}', '{"name": "x", "settings": {"epochs": "many"}}']
DAMAGED_REQUESTS += ['{"name": "x", "settings": {}, "launched": {"attempt": 1}}']


@pytest.mark.parametrize("content", DAMAGED_REQUESTS)
def test_a_damaged_request_is_a_failed_job_that_can_be_deleted(paper, content):
    job, other = paper.add(), paper.add("other")
    (job.folder / "job.json").write_text(content)
    with pytest.raises(InputError, match="Delete the job"):
        read_request(job.folder)
    damaged = paper.manager.get(job.id)
    assert damaged.state is JobState.FAILED
    assert "job.json" in damaged.message
    assert not (damaged.can_retry or damaged.can_resume or damaged.can_pause or damaged.can_cancel)
    for refused in ("pause", "resume", "cancel", "retry"):
        with pytest.raises(InputError):
            getattr(paper.manager, refused)(job.id)
    with pytest.raises(InputError):
        paper.manager.clone(job.id, "more")
    with pytest.raises(InputError):
        paper.manager.note(job.id, "a note")
    paper.manager.tend()  # and the others go on
    assert paper.launcher.started == [other.id]
    paper.manager.delete(job.id)
    assert [each.id for each in paper.manager.list()] == [other.id]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
STATUS_FIELDS = ["state", "message", "step", "steps", "attempt", "process", "heartbeat"]
REQUEST_FIELDS = ["name", "settings", "base", "test_ideas", "wanted", "wanted_at", "queued_at", "attempt", "launched"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_the_files_a_list_can_be_shown(paper, data):
    jobs = paper.manager.list()
    job = jobs[0] if jobs else paper.add()
    status = {"state": "running", "message": "", "step": 1, "steps": 2, "attempt": 1, "process": [2, 3, "x"]}
    status["heartbeat"] = {"boottime": 1.0}
    request = {"name": "pirates", "settings": {}, "attempt": 1}
    status |= data.draw(st.dictionaries(st.sampled_from(STATUS_FIELDS), json_values, max_size=2))
    request |= data.draw(st.dictionaries(st.sampled_from(REQUEST_FIELDS), json_values, max_size=2))
    (job.folder / "status.json").write_text(json.dumps(status))
    (job.folder / "job.json").write_text(json.dumps(request))
    (shown,) = paper.manager.list()
    assert shown.state in JobState
    assert shown.message
    assert 0 <= shown.progress <= 1
    try:
        read_job(job.folder)  # with the real look at processes
    except InputError:
        assert shown.state is JobState.FAILED


def test_half_a_line_is_left_out_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    append_line(path, {"step": 2})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    append_line(path, {"step": 4})
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 4}]
    assert read_lines(tmp_path / "nothing") == []


def test_stories_that_cannot_be_read_are_an_error_for_people(paper):
    job = paper.add()
    (job.folder / "data.jsonl").write_text('{"text": "a"}\n{"te')
    with pytest.raises(InputError, match="cannot be read"):
        read_stories(job.folder)
    (job.folder / "data.jsonl").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        paper.manager.stories(job.id)


def test_the_log_is_read_from_its_end(tmp_path):
    assert read_log(tmp_path) == ""
    lines = [f"line {i} " + "x" * 100 for i in range(20_000)]
    (tmp_path / "log.txt").write_bytes("\n".join(lines).encode() + b"\xff\n")
    assert read_log(tmp_path, 2).splitlines()[0] == lines[-2]
    assert len(read_log(tmp_path, 200).splitlines()) == 200


@pytest.mark.parametrize("content, result", [("{", None), ("[]", None), ('{"name": "x"}', {"name": "x"})])
def test_a_result_is_there_or_not(tmp_path, content, result):
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text(content)
    assert read_result(tmp_path) == result


def test_no_status_and_a_damaged_one_are_told_apart(tmp_path):
    assert read_status(tmp_path) is None
    (tmp_path / "status.json").write_text("{")
    assert read_status(tmp_path) == {}
