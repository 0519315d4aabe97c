"""Who runs next: a bounded queue in front of the slots. Plain bookkeeping, no torch, no threads of its own."""

from __future__ import annotations

from collections import deque

from model.engine.request import Request
from model.errors import BusyError


class Scheduler:
    """First come, first served; stories join and leave between any two steps.

    Raises BusyError on `add` when the queue is full.
    """

    def __init__(self, n_slots: int, max_waiting: int):
        self._free_slots = list(range(n_slots))[::-1]
        self._max_waiting = max_waiting
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        assert request not in self.running and request not in self.waiting, "a request is queued once"
        if len(self.waiting) >= self._max_waiting:
            raise BusyError(f"{len(self.waiting)} stories are waiting already. Try again in a minute.")
        self.waiting.append(request)

    def admit(self) -> None:
        """Move waiting requests into free slots."""
        while self.can_admit:
            request = self.waiting.popleft()
            request.slot = self._free_slots.pop()
            request.n_cached = 0
            self.running.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is; its slot is free at once."""
        if request in self.running:
            self.running.remove(request)
            assert request.slot is not None
            self._free_slots.append(request.slot)
            request.slot = None
        elif request in self.waiting:
            self.waiting.remove(request)

    def place_in_queue(self, request: Request) -> int:
        """1 for the next to run, 0 when it is not waiting."""
        return self.waiting.index(request) + 1 if request in self.waiting else 0

    @property
    def can_admit(self) -> bool:
        return bool(self.waiting and self._free_slots)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running
