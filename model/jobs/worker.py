"""The process that does one job: `python -m model.jobs.worker FOLDER`. However it ends, status.json says so.

Torch is imported by the task, after the first status was written. A worker that is killed outright writes nothing; the
manager sees that its process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from model.checkpoint import remove_leftovers, write_atomically
from model.errors import TaleloomError
from model.jobs.process import boottime_s, identify, try_lock
from model.jobs.record import read_request, read_status
from model.jobs.state import AT_WORK

HEARTBEAT_S = 2.0
WISH_S = 0.2  # at most so often job.json is looked at
NICENESS = 10  # readers' stories come first

Outcome = Literal["done", "paused", "cancelled"]
Wish = Literal["pause", "cancel"] | None


class Task(Protocol):
    def __call__(
        self, folder: Path, report: Callable[[dict[str, Any]], None], should_stop: Callable[[], Wish]
    ) -> Outcome: ...


class Status:
    """status.json, written again every HEARTBEAT_S by a thread of its own, also while an evaluation takes long."""

    def __init__(self, folder: Path, attempt: int, threads: str | None):
        earlier = read_status(folder) or {}
        self._path = folder / "status.json"
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._record: dict[str, Any] = {
            "state": "starting",
            "message": "It is loading the storyteller.",
            "step": earlier.get("step", 0),
            "steps": earlier.get("steps", 0),
            "attempt": attempt,
            "process": list(identify(os.getpid())),
            "threads": earlier.get("threads") or threads,
        }

    @property
    def threads(self) -> str | None:
        """OMP_NUM_THREADS of the first attempt: sums come out the same only with as many threads."""
        return self._record["threads"]

    def report(self, record: dict[str, Any]) -> None:
        """Take over what a step says of step, steps and message; the first one means that it runs."""
        is_first = self._record["state"] == "starting"
        if is_first:
            self._record["message"] = "It is learning."
        self._record["state"] = "running"
        self._record |= {name: record[name] for name in ("step", "steps", "message") if name in record}
        if is_first:
            self.write()

    def write(self) -> None:
        with self._lock:
            heartbeat = {"time": time.time(), "boottime": boottime_s()}
            content = json.dumps({**self._record, "heartbeat": heartbeat})
            try:
                write_atomically(self._path, content)
            except OSError:
                # On a full disk the old file's place is still there to be written over.
                with contextlib.suppress(OSError), self._path.open("r+") as file:
                    file.write(content)
                    file.truncate()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        def beat() -> None:
            while not self._ended.wait(HEARTBEAT_S):
                self.write()

        self.write()
        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self.write()

    def end(self, state: str, message: str) -> None:
        """What the last status is to say."""
        self._record |= {"state": state, "message": message}


class Wishes:
    """What the worker is asked to do meanwhile: by job.json, or by SIGTERM."""

    def __init__(self, folder: Path, attempt: int):
        self._path, self._attempt = folder / "job.json", attempt
        self._looked_s = -WISH_S
        self._seen: tuple[int, int] | None = None
        self._wish: Wish = None
        self.is_terminated = False

    def should_stop(self) -> Wish:
        now = time.monotonic()
        if now - self._looked_s >= WISH_S:
            self._looked_s = now
            with contextlib.suppress(OSError, TaleloomError):  # unreadable: as it was
                stat = self._path.stat()
                if (seen := (stat.st_mtime_ns, stat.st_ino)) != self._seen:
                    job = read_request(self._path.parent)
                    self._seen = seen
                    # A later attempt means: paused and already queued again.
                    is_over = job.attempt != self._attempt and job.wanted == "run"
                    self._wish = "pause" if is_over else None if job.wanted == "run" else job.wanted
        return self._wish or ("pause" if self.is_terminated else None)


def main(folder: Path, task: Task | None = None) -> None:
    """Do the job in `folder` until it ends, one way or another; does nothing when another worker has it.

    Args:
        task: instead of model.jobs.task.fine_tune, for tests.
    """
    folder = Path(folder)
    attempt = read_request(folder).attempt
    with _sole_worker(folder, attempt) as is_mine:
        if not is_mine:
            return
        remove_leftovers(folder, lambda name: name != "job.json")  # which is the manager's
        remove_leftovers(folder / "best")
        status = Status(folder, attempt, os.environ.get("OMP_NUM_THREADS") or str(_n_cpus()))
        wishes = Wishes(folder, attempt)
        with status.beating(), _on_sigterm(lambda: setattr(wishes, "is_terminated", True)):
            _log(f"--- attempt {attempt}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
            try:
                status.end(*_do(folder, status, wishes, task))
            except BaseException as error:  # the edge: whatever it was, the status says it
                with contextlib.suppress(OSError):
                    traceback.print_exc()
                status.end("failed", sentence(error))


def _do(folder: Path, status: Status, wishes: Wishes, task: Task | None) -> tuple[str, str]:
    """Run the task; returns the state it ended in, and a sentence."""
    if wishes.should_stop() == "cancel":  # while it was being started
        return "cancelled", "It was cancelled."
    if status.threads:
        os.environ["OMP_NUM_THREADS"] = status.threads
    if task is None:
        from model.jobs.task import fine_tune

        task = fine_tune
    outcome = task(folder, report=status.report, should_stop=wishes.should_stop)
    if outcome == "paused" and wishes.is_terminated:
        return outcome, "It was paused because the computer or the service was shutting down; resume it."
    messages = {"done": "It is done.", "paused": "It is paused.", "cancelled": "It was cancelled."}
    return outcome, messages[outcome]


def sentence(error: BaseException) -> str:
    """What to say of a job that an exception ended, and what to do next."""
    if isinstance(error, TaleloomError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full. Make room, for example by deleting old jobs, and resume."
    # Torch's own kinds: OutOfMemoryError on a GPU, a RuntimeError on the CPU.
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "not enough memory" in str(error):
        return "The memory ran out. Close other programs and resume, or clone the job with fewer rows per pass."
    return f"Something went wrong: {type(error).__name__}: {error}. The log has the details."


@contextlib.contextmanager
def _sole_worker(folder: Path, attempt: int) -> Iterator[bool]:
    """Whether this process has the job to itself.

    A manager that was killed right after it had started a worker leaves the next one to start a second. The second goes
    when the first has said that it is there; it stays in case the first ends before that. A worker of the attempt
    before, which is about to end, is waited for.
    """
    while not (lock := try_lock(folder / ".worker")):
        if (status := read_status(folder)) and status["attempt"] >= attempt:
            yield False
            return
        time.sleep(0.05)
    with lock:
        status = read_status(folder)
        has_ended = status and status["attempt"] >= attempt and status["state"] not in AT_WORK
        yield not has_ended


@contextlib.contextmanager
def _on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # in tests
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _n_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _step_back() -> None:
    """Let readers' stories go first.

    Where Linux groups processes by session (sched_autogroup), a worker's niceness counts only among its own session's:
    the group has one of its own.
    """
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICENESS))


def _log(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, flush=True)


if __name__ == "__main__":
    _step_back()
    main(Path(sys.argv[1]))
