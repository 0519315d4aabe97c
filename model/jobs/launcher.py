"""Where a job's worker runs: the one interface to fill for another place. Here: a process of this machine."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from model.config import CHECKOUT
from model.jobs.process import Process, end, identify, is_alive

WORKER = (sys.executable, "-m", "model.jobs.worker")


class Launcher(Protocol):
    """Starts workers. They share the job's folder with the manager, and nothing else."""

    def start(self, folder: Path) -> Process:
        """Start the worker of a job's folder; raises OSError when that cannot be done."""

    def is_alive(self, process: Process) -> bool:
        """Whether this very process still runs."""

    def terminate(self, process: Process) -> None:
        """End a worker at once."""

    def reap(self) -> None:
        """Take leave of the workers that have ended."""


class LocalLauncher:
    """Workers as processes in sessions of their own, so that they outlive the app; `command` gets the folder added."""

    def __init__(self, command: Sequence[str] = WORKER):
        self._command = list(command)
        self._children: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def start(self, folder: Path) -> Process:
        with (folder / "log.txt").open("ab") as log:
            child = subprocess.Popen(
                [*self._command, str(folder.resolve())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=CHECKOUT,
                start_new_session=True,
            )
        with self._lock:
            self._children.append(child)
        return identify(child.pid)

    def is_alive(self, process: Process) -> bool:
        return is_alive(process)

    def terminate(self, process: Process) -> None:
        end(process, force=True)

    def reap(self) -> None:
        with self._lock:
            self._children = [child for child in self._children if child.poll() is None]
