"""What state a job is in, from what was asked for, what its worker last said, and whether that worker lives."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from model.jobs.process import Process, boot_id, boottime_s

if TYPE_CHECKING:
    from model.jobs.record import Job

AT_WORK = ("starting", "running")  # states in status.json of a worker that has not ended
START_TIMEOUT_S = 60.0  # until a worker must have written its first status
SILENCE_S = 60.0  # without a heartbeat, after which a living worker is said to be silent

LOST_MESSAGE = "The computer or the app was stopped, or memory ran out; resume it."
DAMAGED_STATUS = "Its status.json cannot be read; resume it."
QUIET_END = "It was stopped before its last steps were saved; resuming repeats those."


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


def state_of(
    job: Job, status: Mapping[str, Any] | None, process: Process | None, log_tail: str
) -> tuple[JobState, str]:
    """The job's state and a sentence about it.

    Args:
        job: what was asked for.
        status: what the worker last wrote; None when nothing, empty when it is damaged.
        process: the worker, of whichever attempt, if it lives.
        log_tail: the last words of the log, for a worker that never wrote a status.
    """
    launched = job.launched if job.launched and job.launched["attempt"] == job.attempt else None
    if status and int(status["attempt"]) >= job.attempt:
        if status["state"] in AT_WORK:
            return _at_work(job, status) if process else _ended(job, _how_lost(status["process"][2]))
        if status["state"] == "paused" and job.wanted == "cancel":
            return JobState.CANCELLED, "It was cancelled."
        return JobState(status["state"]), status["message"]
    if launched and status == {}:
        if process:
            return JobState.RUNNING, "It is running; its status.json cannot be read just now."
        return _ended(job, DAMAGED_STATUS)
    if job.wanted == "cancel" and process is None:
        return JobState.CANCELLED, "It was cancelled."
    if launched:
        return _starting(job, launched, process, log_tail)
    if process and status and job.wanted != "run":
        return _at_work(job, status)
    if process:
        return JobState.QUEUED, "It goes on when it has paused."
    if job.wanted == "pause":
        return JobState.PAUSED, "It waits until it is resumed."
    return JobState.QUEUED, "It waits for its turn."


def _at_work(job: Job, status: Mapping[str, Any]) -> tuple[JobState, str]:
    silent_s = boottime_s() - float(status["heartbeat"]["boottime"])
    message = status["message"]
    if job.wanted != "run":
        message = "It pauses after this step." if job.wanted == "pause" else "It ends after this step."
    if silent_s > SILENCE_S:
        message = f"It has not been heard of for {silent_s:.0f} s, though its process is there. {message}".rstrip()
    return JobState.RUNNING, message


def _ended(job: Job, lost: str) -> tuple[JobState, str]:
    """State of a job whose worker ended without a word."""
    if job.wanted == "cancel":
        return JobState.CANCELLED, "It was cancelled."
    if job.wanted == "pause":
        return JobState.PAUSED, QUIET_END
    return JobState.LOST, lost


def _how_lost(its_boot_id: str) -> str:
    return "The computer was restarted; resume it." if its_boot_id != boot_id() else LOST_MESSAGE


def _starting(job: Job, launched: Mapping[str, Any], process: Process | None, tail: str) -> tuple[JobState, str]:
    """State of a job whose worker was started and has not written a status."""
    if launched["process"] is None:
        return JobState.FAILED, f"It could not be started: {launched.get('error')}"
    if launched["process"][2] != boot_id():
        return _ended(job, _how_lost(launched["process"][2]))
    if process and boottime_s() - launched["boottime"] <= START_TIMEOUT_S:
        return JobState.RUNNING, "It is starting."
    what = f"did not begin within {START_TIMEOUT_S:.0f} s" if process else "ended before it began"
    return JobState.FAILED, f"Its worker {what}. {f'The log ends: {tail}' if tail else 'Its log is empty.'}"
