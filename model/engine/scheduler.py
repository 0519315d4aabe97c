"""Who runs next: a bounded queue in front of the slots. Plain bookkeeping, no torch, no threads of its own."""

from __future__ import annotations

from collections import deque

from model.engine.request import Request
from model.errors import BusyError

WORTH_A_SLOT = 16  # cached tokens; for fewer in common the lowest slot is better, whose memory is in use already


def n_common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # compared without Python's loop, as whole prompts are
        return n
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return n


class Scheduler:
    """First come, first served; stories join and leave between any two steps.

    A free slot keeps what was read into it: a story that begins with the same tokens ("tell another", "continue") goes
    on from there. Raises BusyError on `add` when the queue is full.
    """

    def __init__(self, n_slots: int, max_waiting: int):
        self._free: dict[int, list[int]] = {slot: [] for slot in range(n_slots)}  # slot: tokens in its cache
        self._max_waiting = max_waiting
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request, accepted: bool = False) -> None:
        """Queue a request; one that is `accepted` already is never refused."""
        assert request not in self.running and request not in self.waiting, "a request is queued once"
        # Those for whom a slot is free leave the queue before the next step.
        if (n_waiting := len(self.waiting) - len(self._free)) >= self._max_waiting and not accepted:
            raise BusyError(f"{n_waiting} stories are waiting already. Try again in a minute.")
        self.waiting.append(request)

    def admit(self) -> None:
        """Move waiting requests into free slots."""
        while self.can_admit:
            request = self.waiting.popleft()
            window = request.window
            common = {slot: n_common(cached, window) for slot, cached in self._free.items()}
            longest = max(common, key=lambda slot: (common[slot], -slot))
            request.slot = longest if common[longest] >= WORTH_A_SLOT else min(common)
            # The last token is read again, for what comes after it.
            request.n_cached = min(common[request.slot], len(window) - 1)
            del self._free[request.slot]
            self.running.append(request)

    def remove(self, request: Request, keep_cache: bool = True) -> None:
        """Take a request out, wherever it is; its slot is free at once."""
        if request in self.running:
            self.running.remove(request)
            assert request.slot is not None
            self._free[request.slot] = request.window[: request.n_cached] if keep_cache else []
            request.slot = None
        elif request in self.waiting:
            self.waiting.remove(request)

    def place_in_queue(self, request: Request) -> int:
        """1 for the next to run, 0 when it runs or is about to."""
        return max(0, self.waiting.index(request) + 1 - len(self._free)) if request in self.waiting else 0

    @property
    def n_free(self) -> int:
        """Slots that nobody holds or waits for."""
        return max(0, len(self._free) - len(self.waiting))

    @property
    def can_admit(self) -> bool:
        return bool(self.waiting and self._free)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running
