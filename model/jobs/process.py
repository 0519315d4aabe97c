"""Which operating system process is meant: a number alone is given out again, and not only after a restart."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from model.errors import TaleloomError

HAS_PROC = Path("/proc/self/stat").exists()


class Process(NamedTuple):
    """A process of this machine, told apart from a later one with the same number."""

    pid: int
    started: int | None  # clock ticks after boot; None where the system does not say
    boot_id: str  # changes with every start of the machine; empty where the system does not say


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def boottime_s() -> float:
    """Seconds since the machine started, sleep included: unlike the time of day nobody sets it."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def identify(pid: int) -> Process:
    """The process that has this number now."""
    stat = _stat(pid)
    return Process(pid, stat[1] if stat else None, boot_id())


def is_alive(process: Process) -> bool:
    """Whether it still runs; one that has ended but was not yet reaped (a zombie) does not."""
    if process.pid <= 1 or process.boot_id != boot_id():
        return False
    if HAS_PROC:
        stat = _stat(process.pid)
        return stat is not None and stat[0] not in "ZX" and process.started == stat[1]
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def end(process: Process, force: bool = False) -> None:
    """Ask a process to end, or end it at once; nothing happens when it has ended already."""
    if is_alive(process):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL if force else signal.SIGTERM)


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time from /proc/<pid>/stat; None when there is no such process."""
    try:
        # The second field is the program's name in parentheses and may itself hold any character.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def try_lock(path: Path) -> IO[str] | None:
    """Lock a file until the returned object is closed or this process ends; None when somebody else holds it."""
    return _lock(path, wait=False)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file, waiting for it; two threads of one process exclude each other too."""
    file = _lock(path, wait=True)
    assert file is not None
    with file:
        yield


def _lock(path: Path, wait: bool) -> IO[str] | None:
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise TaleloomError("Training needs Linux or macOS (on Windows: the Linux subsystem).") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file
