"""Adding a job: whether TrainingLimits allows it and the disk has room for it, and the writing of its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from model.checkpoint import write_atomically
from model.config import FineTuneSettings, TrainingLimits, user_home
from model.errors import BusyError, InputError, TaleloomError
from model.jobs.record import Job, JobState, Row, append_line, read_lines, write_request
from model.own_models import models_folder

DAY_S = 24 * 3600.0
ROOM_MB = 500  # a job of a model as large as the bundled one: checkpoints, the best model, both once more while written
CHARACTERS_PER_TOKEN = 4
LEDGER = ".created.jsonl"  # counts jobs of the last day, also those that were deleted


def visitor_key(visitor: str | None) -> str:
    """What is kept of a visitor: enough to know them again, not who they are."""
    return hashlib.sha256(visitor.encode()).hexdigest()[:16] if visitor else ""


def check_visitor(limits: TrainingLimits, visitor: str) -> None:
    """Raises TaleloomError when this visitor (a key) may not train at all."""
    if limits.mode == "off":
        raise TaleloomError(
            "Training is switched off here. Run Taleloom on your own computer, or set TALELOOM_TRAINING to limited or "
            "open if this is your site."
        )
    if limits.sign_in and not visitor:
        raise TaleloomError("Sign in to teach a storyteller: training is for signed-in visitors here.")


def check_size(
    limits: TrainingLimits, rows: Sequence[Row], settings: FineTuneSettings, n_tokens: int | None = None
) -> None:
    """Raises InputError when the stories, the steps, or what is done at each are too many; `n_tokens` None estimates
    them from the length."""
    n_bytes = sum(len(row["text"].encode(errors="replace")) for row in rows)
    if n_bytes > limits.max_upload_mb * 1e6:
        raise InputError(
            f"The stories have {n_bytes / 1e6:.1f} MB; {limits.max_upload_mb} MB are allowed here. Take fewer of them."
        )
    if n_tokens is None:
        n_tokens = sum(len(row["text"]) for row in rows if row["split"] == "train") // CHARACTERS_PER_TOKEN
    if limits.max_job_tokens is not None and n_tokens > limits.max_job_tokens:
        raise InputError(
            f"The stories have about {n_tokens:,} tokens; {limits.max_job_tokens:,} are allowed here. Take fewer of "
            "them."
        )
    most = limits.max_job_steps
    if most is not None and (settings.max_steps is None or settings.max_steps > most):
        wanted = f"{settings.max_steps:,} steps are" if settings.max_steps else "No greatest number of steps is"
        raise InputError(f"{wanted} asked for; set max_steps to {most:,} or less, which is what is allowed here.")
    for name, value, most in (
        ("rows_per_step", settings.rows_per_step, limits.max_rows_per_step),
        ("rows_per_pass", settings.rows_per_pass, limits.max_rows_per_pass),
        ("evaluations", settings.evaluations, limits.max_evaluations),
    ):
        if most is not None and value > most:
            raise InputError(f"{name} is {value:,}; set it to {most:,} or less, which is what is allowed here.")


def check_queue(limits: TrainingLimits, jobs: Sequence[Job]) -> None:
    """Raises BusyError when nobody more may wait."""
    waiting = sum(job.state is JobState.QUEUED for job in jobs)
    if limits.max_queue is not None and waiting >= limits.max_queue:
        raise BusyError(f"{waiting} jobs wait already, which is all that is allowed here. Try again later.")


def check_disk(limits: TrainingLimits, root: Path) -> None:
    """Raises TaleloomError when a job would not fit on the disk or into the quota."""
    free_mb = shutil.disk_usage(root).free / 1e6
    if free_mb < ROOM_MB:
        raise TaleloomError(
            f"The disk has {free_mb:.0f} MB left and a job needs {ROOM_MB}. Delete old jobs or other files first."
        )
    if limits.disk_quota_mb is not None:
        used_mb = sum(map(_n_bytes, (root, models_folder(), user_home() / "hub"))) / 1e6
        if used_mb + ROOM_MB > limits.disk_quota_mb:
            raise TaleloomError(
                f"All jobs, storytellers and downloads together take {used_mb:.0f} MB and a new job up to {ROOM_MB}; "
                f"{limits.disk_quota_mb} MB are allowed here. Delete old jobs and storytellers first."
            )


def _n_bytes(folder: Path) -> int:
    """Of all files below a folder, as far as they stay there meanwhile."""
    n_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                n_bytes += os.lstat(os.path.join(parent, name)).st_size
    return n_bytes


def check_day(limits: TrainingLimits, root: Path, visitor: str) -> None:
    """Raises BusyError when enough jobs were added in the last 24 hours, by this visitor (a key) or by all."""
    today = _today(root)
    mine = sum(entry.get("visitor") == visitor for entry in today)
    if limits.max_jobs_per_visitor is not None and mine >= limits.max_jobs_per_visitor:
        raise BusyError(f"You have started {mine} jobs in 24 hours, which is all that is allowed here. Come tomorrow.")
    if limits.max_jobs_per_day is not None and len(today) >= limits.max_jobs_per_day:
        raise BusyError(
            f"{len(today)} jobs were started here in 24 hours, which is all that is allowed. Come tomorrow."
        )


def count_job(root: Path, visitor: str) -> None:
    """Remember that a job was added just now."""
    today = _today(root)
    if len(today) < len(read_lines(root / LEDGER)):
        write_atomically(root / LEDGER, "".join(json.dumps(entry) + "\n" for entry in today))
    append_line(root / LEDGER, {"time": time.time(), "visitor": visitor})


def _today(root: Path) -> list[dict[str, object]]:
    now = time.time()
    times = ((entry, entry.get("time")) for entry in read_lines(root / LEDGER))
    # One from the future was written before the clock was set back; it ages from here on as all others do.
    return [entry for entry, at in times if isinstance(at, int | float) and now - DAY_S < at < now + DAY_S]


def check_free(name: str, jobs: Iterable[Job]) -> None:
    """Raises InputError when one of the jobs or a storyteller is called so.

    Names that differ only in capitals would be one folder on some disks.
    """
    taken = [job.name for job in jobs if not job.retried_as]
    if models_folder().is_dir():
        taken += [path.name for path in models_folder().iterdir()]
    if name.casefold() in {each.casefold() for each in taken}:
        raise InputError(f"There is a storyteller or a job called {name!r} already. Choose another name.")


def after_all(jobs: Iterable[Job]) -> float:
    """A time to be queued at that is behind all others', whatever was done to the clock."""
    return max([time.time(), *(job.queued_at + 1e-3 for job in jobs if job.state is JobState.QUEUED)])


def add_job(
    root: Path, job: Job, rows: Sequence[Row], limits: TrainingLimits, jobs: Sequence[Job], n_tokens: int | None
) -> str:
    """Write the folder of a new job among `jobs`, whole or not at all; returns its id. The caller holds the lock.

    Raises:
        InputError, BusyError, TaleloomError: as the checks here do.
    """
    if not any(row["split"] == "train" and row["text"].strip() for row in rows):
        raise InputError("There is no story to train on. Give at least one.")
    check_visitor(limits, job.visitor)
    check_size(limits, rows, job.settings, n_tokens)
    check_free(job.name, [other for other in jobs if other.id != job.retry_of])
    if job.wanted == "run":
        check_queue(limits, jobs)
    check_day(limits, root, job.visitor)
    check_disk(limits, root)
    now = time.time()
    id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{int(now % 1 * 1e6):06d}-{secrets.token_hex(4)}"
    new = root / f".new-{id}"
    try:
        new.mkdir()
        lines = (json.dumps({"text": r["text"], "prompt": r.get("prompt"), "split": r["split"]}) for r in rows)
        write_atomically(new / "data.jsonl", "".join(line + "\n" for line in lines))
        write_request(dataclasses.replace(job, id=id, folder=new, created=now, queued_at=after_all(jobs)))
        count_job(root, job.visitor)
        os.rename(new, root / id)
    except OSError as error:
        remove(new)
        raise TaleloomError(f"The job could not be written ({error}). Make room on the disk and try again.") from error
    return id


def remove(folder: Path) -> None:
    """Delete a job's folder, and nothing outside it."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
