"""What a job's folder says: read it, derive the job's state, append to its files. No torch, no processes started.

The manager alone writes job.json, the worker alone status.json; both atomically, so that readers need no lock. An
*attempt* is one go from the queue: each time a job is queued job.json's number rises, and a status of an earlier
attempt no longer counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from model.checkpoint import write_atomically
from model.config import FineTuneSettings
from model.errors import InputError, TaleloomError
from model.jobs.process import Process, is_alive
from model.jobs.state import AT_WORK, JobState, state_of

Row = dict[str, Any]  # text, prompt (or None), split ("train" | "test")
Wish = Literal["run", "pause", "cancel"]
TAIL_BYTES = 256 * 1024


@dataclass(frozen=True)
class Job:
    """A fine-tune as its folder describes it at one moment."""

    id: str
    folder: Path
    name: str  # of the storyteller that comes out
    settings: FineTuneSettings = field(default_factory=FineTuneSettings)
    base: str | None = None  # the model to start from as it was named; None: the bundled one
    note: str = ""
    source: str = ""  # where the stories come from, in words
    device: str = "auto"
    test_ideas: tuple[str, ...] = ()
    created: float = 0.0  # seconds, time of day
    queued_at: float = 0.0
    wanted: Wish = "run"
    wanted_at: float = 0.0  # boottime_s()
    attempt: int = 1
    retry_of: str | None = None
    clone_of: str | None = None
    retried_as: str | None = None  # the job that took this one's place and name
    visitor: str = ""  # whose it is on a public site: visitor_key()
    launched: Mapping[str, Any] | None = None  # the manager's last start of a worker
    # Derived.
    state: JobState = JobState.QUEUED
    message: str = ""
    step: int = 0
    steps: int = 0
    process: Process | None = None  # the worker's, where it is alive

    @property
    def progress(self) -> float:
        if self.state is JobState.DONE:
            return 1.0
        return min(1.0, self.step / self.steps) if self.steps > 0 else 0.0

    @property
    def is_active(self) -> bool:
        """Whether something is still to happen without anybody doing anything."""
        return self.state in (JobState.QUEUED, JobState.RUNNING)

    @property
    def can_pause(self) -> bool:
        return self.is_active and self.wanted == "run"

    @property
    def can_resume(self) -> bool:
        if self.state is JobState.RUNNING:
            return self.wanted == "pause"  # it goes on after the pause
        return self.state in (JobState.PAUSED, JobState.LOST, JobState.FAILED) and not self._is_closed

    @property
    def can_cancel(self) -> bool:
        return self.state in (JobState.QUEUED, JobState.RUNNING, JobState.PAUSED, JobState.LOST) and (
            self.wanted != "cancel"
        )

    @property
    def can_retry(self) -> bool:
        return self.state in (JobState.FAILED, JobState.CANCELLED, JobState.LOST) and not self._is_closed

    @property
    def can_delete(self) -> bool:
        return self.state is not JobState.RUNNING and self.process is None

    @property
    def _is_closed(self) -> bool:
        return self.retried_as is not None or not self.name  # without a name: job.json is damaged


def read_job(folder: Path, alive: Callable[[Process], bool] = is_alive) -> Job:
    """The job of a folder, its state derived from what is on disk and whether its worker lives (`alive`).

    Raises:
        InputError: there is no job.json, or it is damaged.
    """
    return _with_state(read_request(folder), alive)


def read_request(folder: Path) -> Job:
    """Only what was asked for, from job.json; the state is not derived.

    Raises:
        InputError: there is no job.json, or it is damaged.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        known = {f.name for f in dataclasses.fields(FineTuneSettings)}
        settings = {name: value for name, value in record.pop("settings").items() if name in known}
        fields = {f.name for f in dataclasses.fields(Job)} - {"id", "folder", "settings", "test_ideas", *DERIVED}
        job = Job(
            id=folder.name,
            folder=folder,
            settings=FineTuneSettings(**settings),
            test_ideas=tuple(record.get("test_ideas") or ()),
            **{name: value for name, value in record.items() if name in fields},
        )
        for name, kind in FIELD_TYPES.items():
            value = getattr(job, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}")
        if (launched := job.launched) and launched["process"] is not None:
            _checked_process(launched["process"])
        if launched and not all(isinstance(launched[name], int | float) for name in ("attempt", "boottime")):
            raise TypeError(f"launched is {launched!r}")
        if not job.name or job.wanted not in get_args(Wish) or not all(isinstance(i, str) for i in job.test_ideas):
            raise ValueError("name, wanted or test_ideas cannot be used")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"The job.json of job {folder.name} cannot be read ({error}). Delete the job.") from error
    return job


STATUS_STATES = (*AT_WORK, "paused", "done", "failed", "cancelled")
DERIVED = ("state", "message", "step", "steps", "process")
FIELD_TYPES: dict[str, Any] = {
    **dict.fromkeys(("name", "note", "source", "device", "visitor"), str),
    **dict.fromkeys(("base", "retry_of", "clone_of", "retried_as"), (str, type(None))),
    **dict.fromkeys(("created", "queued_at", "wanted_at"), (int, float)),
    "attempt": int,
    "launched": (dict, type(None)),
}


def damaged_job(folder: Path, error: TaleloomError) -> Job:
    """What a list shows of a job whose job.json cannot be read; it can be deleted."""
    return Job(folder.name, Path(folder), "", state=JobState.FAILED, message=str(error))


def write_request(job: Job) -> None:
    """Write job.json; only the manager does."""
    record = {f.name: getattr(job, f.name) for f in dataclasses.fields(job) if f.name not in DERIVED}
    del record["id"], record["folder"]
    record |= {"settings": dataclasses.asdict(job.settings), "test_ideas": list(job.test_ideas)}
    write_atomically(job.folder / "job.json", json.dumps(record, indent=2))


def read_status(folder: Path) -> dict[str, Any] | None:
    """status.json; None when there is none; an empty dict when it is damaged."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        if not all(isinstance(status[name], int) and status[name] >= 0 for name in ("step", "steps", "attempt")):
            return {}
        _checked_process(status["process"])
        float(status["heartbeat"]["boottime"])
        return status if status["state"] in STATUS_STATES and isinstance(status["message"], str) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return {}


def _checked_process(value: Any) -> Process:
    """A process as JSON holds it; raises TypeError when it is none."""
    process = Process(*value)
    if not isinstance(process.pid, int) or not isinstance(process.started, int | None):
        raise TypeError(f"{value!r} is no process")
    return process


def _with_state(job: Job, alive: Callable[[Process], bool]) -> Job:
    status = read_status(job.folder)
    process = _living(job, status, alive)
    if process is None:  # its last words, if it has ended since they were read
        status = read_status(job.folder)
    has_begun = status and status["attempt"] >= job.attempt
    log_tail = "" if has_begun else " ".join(read_log(job.folder, 3).split())[-300:]
    state, message = state_of(job, status, process, log_tail)
    step, steps = (int(status["step"]), int(status["steps"])) if status else (0, 0)
    return dataclasses.replace(job, state=state, message=message, step=step, steps=steps, process=process)


def _living(job: Job, status: Mapping[str, Any] | None, alive: Callable[[Process], bool]) -> Process | None:
    """The worker's process, of whichever attempt: the one that took the job on, else the one that was last started."""
    candidates = [status["process"]] if status and status["state"] in AT_WORK else []
    if job.launched and job.launched["process"] and not (status and status["attempt"] >= job.launched["attempt"]):
        candidates.append(job.launched["process"])
    return next((process for each in candidates if alive(process := Process(*each))), None)


# The other files of the folder.


def read_stories(folder: Path) -> list[Row]:
    """The job's stories: text, prompt (or None), split.

    Raises:
        InputError: data.jsonl is missing or damaged.
    """
    rows = []
    try:
        with (Path(folder) / "data.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                rows.append({"text": row["text"], "prompt": row.get("prompt"), "split": row.get("split", "train")})
                if not isinstance(row["text"], str):
                    raise TypeError("a text is no text")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"The stories of this job cannot be read ({error}). Start it anew from your file.") from error
    return rows


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON object as a line; a half line that a crash left is closed first, so that only it is lost."""
    with Path(path).open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; lines that are none (half-written ones, say) are left out."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_log(folder: Path, n_lines: int = 200) -> str:
    """The end of the worker's log."""
    try:
        with (Path(folder) / "log.txt").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-n_lines:])


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json; None until the job is done."""
    try:
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) else None
