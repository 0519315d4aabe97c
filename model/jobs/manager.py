"""The jobs and their queue: add, pause, resume, cancel; start the next one when there is room. Never imports training.

All of it stands in the jobs' folders, so any number of managers (the app's, a command line's) may look after the same
jobs: every change is made under one file lock. `python -m model.jobs.manager ROOT` tends them until none is left to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.checkpoint import remove_leftovers
from model.config import CHECKOUT, FineTuneSettings, TrainingLimits, user_home
from model.errors import InputError, TaleloomError
from model.jobs.admission import add_job, after_all, check_free, check_queue, check_visitor, remove, visitor_key
from model.jobs.launcher import Launcher, LocalLauncher
from model.jobs.process import boottime_s, locked, try_lock
from model.jobs.record import (
    Job,
    JobState,
    Row,
    Wish,
    damaged_job,
    read_job,
    read_lines,
    read_log,
    read_result,
    read_stories,
    write_request,
)
from model.own_models import check_name

MAX_TEST_IDEAS = 4
MAX_IDEA_CHARACTERS = 300
CANCEL_TIMEOUT_S = 20.0  # for a worker to end by itself; nothing of a cancelled job is worth waiting for
Records = list[dict[str, Any]]
_logger = logging.getLogger(__name__)


class JobManager:
    """The jobs in `root`.

    Every method that names a job raises InputError when there is none of that id, and when the job is in no state for
    what is asked; TaleloomError children say what `limits` does not allow.
    """

    def __init__(
        self, root: Path | None = None, launcher: Launcher | None = None, limits: TrainingLimits | None = None
    ):
        self.root = Path(root) if root else user_home() / "jobs"
        self.launcher = launcher or LocalLauncher()
        self.limits = limits or TrainingLimits.from_environment()
        self._tending: threading.Thread | None = None
        self._tending_lock = threading.Lock()

    # Looking.

    def list(self) -> list[Job]:
        """All jobs, the oldest first."""
        if not self.root.is_dir():
            return []
        # Hidden folders are jobs that are not written completely, or not deleted completely.
        folders = [p for p in sorted(self.root.iterdir()) if not p.name.startswith(".") and p.is_dir()]
        return [job for folder in folders if (job := self._read(folder))]

    def get(self, id: str) -> Job:
        folder = self.root / id
        is_name = bool(id) and Path(id).name == id and not id.startswith(".")
        if not is_name or not os.path.isdir(folder) or not (job := self._read(folder)):
            raise InputError(f"There is no job {id[:60]!r}. It may have been deleted.")
        return job

    def metrics(self, id: str) -> Records:
        return read_lines(self.get(id).folder / "metrics.jsonl")

    def samples(self, id: str) -> Records:
        return read_lines(self.get(id).folder / "samples.jsonl")

    def stories(self, id: str) -> Records:
        return read_stories(self.get(id).folder)

    def result(self, id: str) -> dict[str, Any] | None:
        """What came out; None before the job is done."""
        return read_result(self.get(id).folder)

    def log(self, id: str, n_lines: int = 200) -> str:
        return read_log(self.get(id).folder, n_lines)

    def _read(self, folder: Path) -> Job | None:
        try:
            return read_job(folder, self.launcher.is_alive)
        except InputError as error:
            return damaged_job(folder, error) if folder.is_dir() else None

    # Changing.

    def create(
        self,
        name: str,
        rows: Sequence[Row],
        settings: FineTuneSettings,
        base: str | None = None,
        source: str = "",
        test_ideas: Sequence[str] = (),
        start: bool = True,
        *,
        device: str = "auto",
        note: str = "",
        visitor: str | None = None,
        n_tokens: int | None = None,
    ) -> Job:
        """Add a job, queued or (`start` False) paused.

        Args:
            name: of the storyteller that comes out.
            rows: stories with text, prompt (or None) and split.
            base: model to start from, as people name it; None: the bundled one.
            source: where the stories come from, in words.
            test_ideas: told again at each evaluation; without any, the worker takes its own.
            visitor: who asks, on a public site; with limits.sign_in only for those who are signed in.
            n_tokens: in the stories to train on, as intake counts them; None estimates them.

        Raises:
            InputError: the name is taken or cannot be one, or the stories cannot be used.
            BusyError: waiting helps.
            TaleloomError: the limits or the disk do not allow it.
        """
        ideas = tuple(idea.strip() for idea in test_ideas if idea.strip())
        if len(ideas) > MAX_TEST_IDEAS:
            raise InputError(f"There are {len(ideas)} test ideas; {MAX_TEST_IDEAS} can be told at each evaluation.")
        if (longest := max(map(len, ideas), default=0)) > MAX_IDEA_CHARACTERS:
            raise InputError(f"A test idea has {longest:,} characters; {MAX_IDEA_CHARACTERS} are the most. Shorten it.")
        job = Job(
            id="",
            folder=self.root,
            name=check_name(name),
            settings=settings,
            base=base,
            note=note.strip(),
            source=source,
            device=device,
            test_ideas=ideas,
            wanted="run" if start else "pause",
            visitor=visitor_key(visitor),
        )
        with self._lock():
            return self._add(job, rows, n_tokens)

    def retry(self, id: str) -> Job:
        """Start a failed, cancelled or lost job anew, as a new job of that name; the old one stays to look at."""
        with self._lock():
            old = self._get_for(id, "can_retry", "started anew")
            job = self._add(dataclasses.replace(_copy(old), retry_of=id), read_stories(old.folder))
            self._write(old, retried_as=job.id)
            return job

    def clone(self, id: str, name: str, **changes: Any) -> Job:
        """A new job with the same stories and changed settings.

        Raises:
            InputError: there is no such setting, or create() would.
        """
        with self._lock():
            old = self.get(id)
            if not old.name:  # damaged
                raise InputError(old.message)
            known = {field.name for field in dataclasses.fields(FineTuneSettings)}
            if unknown := sorted(changes.keys() - known):
                raise InputError(f"There is no setting {unknown[0]}. There are {', '.join(sorted(known))}.")
            settings = dataclasses.replace(old.settings, **changes)
            copy = dataclasses.replace(_copy(old), name=check_name(name), settings=settings, clone_of=id)
            return self._add(copy, read_stories(old.folder))

    def pause(self, id: str) -> None:
        """Keep a running job's exact state and stop it; take a waiting one out of the queue."""
        with self._lock():
            self._wish(self._get_for(id, "can_pause", "paused"), "pause")

    def resume(self, id: str) -> None:
        """Queue a paused, lost or failed job again; it goes on from its last checkpoint."""
        with self._lock():
            job = self._get_for(id, "can_resume", "resumed")
            check_visitor(self.limits, job.visitor)
            jobs = self.list()
            check_queue(self.limits, jobs)
            if job.process and self._hangs(job):
                self.launcher.terminate(job.process)
            self._write(job, wanted="run", attempt=job.attempt + 1, queued_at=after_all(jobs))

    def cancel(self, id: str) -> None:
        """End a job for good."""
        with self._lock():
            self._wish(self._get_for(id, "can_cancel", "cancelled"), "cancel")

    def rename(self, id: str, name: str) -> None:
        """Give the storyteller of a job that has not begun to make it, or is done with it, another name."""
        name = check_name(name)
        with self._lock():
            job = self.get(id)
            if job.state is JobState.RUNNING:
                raise InputError(f"{job.name} is being trained. Rename it when it is done, or pause it first.")
            if name != job.name:
                check_free(name, [other for other in self.list() if other.id != id])
                self._write(job, name=name)

    def note(self, id: str, text: str) -> None:
        with self._lock():
            self._write(self.get(id), note=text.strip())

    def delete(self, id: str) -> None:
        """Delete the job's folder; the storyteller that came out of it stays."""
        with self._lock():
            job = self._get_for(id, "can_delete", "deleted")
            doomed = self.root / f".deleted-{secrets.token_hex(8)}"  # gone at once, whatever happens to the rest
            os.rename(job.folder, doomed)
        remove(doomed)

    # Tending the queue.

    def tend(self) -> None:
        """One round: take leave of workers that ended, end those that hang, start the next jobs."""
        with self._lock():
            self.launcher.reap()
            for leftover in [*self.root.glob(".deleted-*"), *self.root.glob(".new-*")]:
                remove(leftover)
            remove_leftovers(self.root)
            jobs = self.list()
            for job in jobs:
                if job.process and self._hangs(job):
                    self.launcher.terminate(job.process)
            busy = [job.device for job in jobs if job.process or job.state is JobState.RUNNING]
            queued = sorted((job for job in jobs if job.state is JobState.QUEUED), key=lambda job: job.queued_at)
            for job in queued:
                if not any(job.device == device or "auto" in (job.device, device) for device in busy):
                    self._launch(job)
                    busy.append(job.device)

    def keep_tending(self, interval_s: float = 1.0) -> threading.Thread:
        """Tend every so often in a thread that ends with the process; asked again it is the same thread."""

        def run() -> None:
            while True:
                self._try_to_tend()
                time.sleep(interval_s)

        with self._tending_lock:
            if self._tending is None or not self._tending.is_alive():
                self._tending = threading.Thread(target=run, name="jobs", daemon=True)
                self._tending.start()
            return self._tending

    def tend_until_idle(self, interval_s: float = 1.0) -> None:
        """Tend until no job waits or runs; returns at once when another process does so already."""
        lock = try_lock(self.root / ".tending")
        while lock:
            self._try_to_tend()
            # Under the lock for changes: a job that is added after this look finds the other lock free.
            with self._lock():
                if not any(job.is_active or job.process for job in self.list()):
                    lock.close()
                    return
            time.sleep(interval_s)

    def detach(self) -> None:
        """Start a process that tends until no job waits or runs, whatever becomes of this one."""
        command = [sys.executable, "-m", "model.jobs.manager", str(self.root.resolve())]
        null = subprocess.DEVNULL
        subprocess.Popen(command, stdin=null, stdout=null, stderr=null, cwd=CHECKOUT, start_new_session=True)

    def _try_to_tend(self) -> None:
        try:
            self.tend()
        except Exception:  # a full disk, say: the queue must go on when there is room again
            _logger.exception("The queue of jobs could not be tended")

    def _hangs(self, job: Job) -> bool:
        if job.wanted == "cancel":
            return boottime_s() - job.wanted_at > CANCEL_TIMEOUT_S
        return job.state is JobState.FAILED  # it never began, see state_of

    def _launch(self, job: Job) -> None:
        launched: dict[str, Any] = {"attempt": job.attempt, "boottime": boottime_s(), "process": None}
        remove_leftovers(job.folder, lambda name: name == "job.json")  # the rest is the worker's
        try:
            process = self.launcher.start(job.folder)
        except (OSError, TaleloomError) as error:
            self._write(job, launched={**launched, "error": str(error)})
            return
        try:
            self._write(job, launched={**launched, "process": list(process)})
        except BaseException:  # nobody would know of it
            self.launcher.terminate(process)
            raise

    # Inside the lock.

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.root / ".lock")

    def _get_for(self, id: str, ability: str, done: str) -> Job:
        job = self.get(id)
        if not getattr(job, ability):
            raise InputError(f"{job.name or job.id} is {job.state} and cannot be {done} now.")
        return job

    def _write(self, job: Job, **changes: Any) -> None:
        if not job.name:  # damaged
            raise InputError(job.message)
        write_request(dataclasses.replace(job, **changes))

    def _add(self, job: Job, rows: Sequence[Row], n_tokens: int | None = None) -> Job:
        return self.get(add_job(self.root, job, rows, self.limits, self.list(), n_tokens))

    def _wish(self, job: Job, wanted: Wish) -> None:
        self._write(job, wanted=wanted, wanted_at=boottime_s())


def _copy(job: Job) -> Job:
    """What a new job takes over from another."""
    kept = ("name", "settings", "base", "source", "device", "test_ideas", "visitor")
    return Job(id="", folder=job.folder.parent, **{name: getattr(job, name) for name in kept})


if __name__ == "__main__":
    JobManager(Path(sys.argv[1])).tend_until_idle()
