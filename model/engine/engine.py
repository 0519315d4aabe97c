"""The engine: one thread that steps every running story, so any number of readers share one model.

Between two steps stories join and leave. A long prompt is read in chunks between decode steps, so that nobody waits
for it. A story can be given a pace: what its reader could not follow anyway is time for others. An exception in a step
ends the stories of that step with its message; the thread lives on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from model.engine.request import FinishReason, Request
from model.engine.scheduler import Scheduler
from model.errors import EngineError

log = logging.getLogger(__name__)
PREFILL_CHUNK = 128  # prompt tokens read between two decode steps
PACE_SLACK_S = 0.005  # stories due within this time share a step


class Backend(Protocol):
    """What runs the model; logits are the backend's own kind of array."""

    context: int

    def prefill(self, request: Request, tokens: Sequence[int], start: int) -> Any: ...
    def decode(self, requests: Sequence[Request]) -> Any: ...
    def sample(self, requests: Sequence[Request], logits_bv: Any) -> list[int]: ...


class Engine:
    """Accepts requests from any thread; calls their callbacks on its own."""

    def __init__(self, backend: Backend, eos_id: int, n_slots: int, max_waiting: int = 64):
        self._backend, self._eos_id = backend, eos_id
        self._scheduler = Scheduler(n_slots, max_waiting)
        self._changed = threading.Condition()
        self._closing = self._retiring = False
        self._thread = threading.Thread(target=self._run, name="taleloom-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            BusyError: too many are waiting.
            EngineError: the engine was closed.
        """
        with self._changed:
            if self._closing or self._retiring or not self._thread.is_alive():
                raise EngineError("This storyteller is no longer here. Load it again.")
            self._scheduler.add(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Ask for an early end; harmless when the request has ended. `on_finish` follows within a step."""
        request.cancelled.set()
        with self._changed:
            self._changed.notify()

    def place_in_queue(self, request: Request) -> int:
        """How many requests, this one included, are to start before it runs; 0 when it is not waiting."""
        with self._changed:
            return self._scheduler.place_in_queue(request)

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def retire(self) -> None:
        """Accept nothing more; the thread ends when the last story has."""
        with self._changed:
            self._retiring = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._scheduler.is_idle and not self._closing and not self._retiring:
                    self._changed.wait()
                closing = self._closing or self._scheduler.is_idle
                everyone = [*self._scheduler.running, *self._scheduler.waiting]
            for request in everyone:
                if closing or request.cancelled.is_set():
                    self._finish(request, FinishReason.CANCELLED)
            if closing:
                return
            with self._changed:
                self._scheduler.admit()
                running = list(self._scheduler.running)
            reading = [r for r in running if r.n_window - r.n_cached > 1 or not r.generated]
            soon_s = time.monotonic() + PACE_SLACK_S
            writing = [r for r in running if r not in reading and r.due_s <= soon_s]
            if running and not reading and not writing:
                self._rest(running)
                continue
            # One chunk of one long prompt, then a step for all who are writing: nobody waits more than that.
            for group in (reading[:1], writing):
                if group:
                    self._guarded_step(group, prefill=group[0] in reading)

    def _rest(self, running: list[Request]) -> None:
        """Everyone is ahead of the pace that was asked for: sleep until the first is due or something happens."""
        with self._changed:
            # Looked at again under the lock: what happened since is not announced twice.
            something_happened = (
                self._closing or self._scheduler.can_admit or any(r.cancelled.is_set() for r in running)
            )
            rest_s = min(r.due_s for r in running) - time.monotonic()
            if not something_happened and rest_s > 0:
                self._changed.wait(rest_s)

    def _guarded_step(self, requests: list[Request], prefill: bool) -> None:
        started_s = time.monotonic()
        try:
            if prefill:
                self._prefill(requests[0])
            else:
                self._decode(requests)
            for request in requests:
                request.busy_s += time.monotonic() - started_s
        except Exception as error:  # the edge of the engine: recorded, told to the readers, survived
            log.exception("a step failed")
            for request in [r for r in requests if r.slot is not None]:  # those that did not end in this very step
                self._finish(request, FinishReason.ERROR, f"The storyteller stumbled: {error}")

    def _prefill(self, request: Request) -> None:
        request.slide(self._backend.context)
        window = request.window
        chunk = window[request.n_cached : request.n_cached + PREFILL_CHUNK]
        logits_bv = self._backend.prefill(request, chunk, request.n_cached)
        request.n_cached += len(chunk)
        if request.n_cached == len(window):
            self._accept([request], logits_bv)

    def _decode(self, requests: list[Request]) -> None:
        logits_bv = self._backend.decode(requests)
        for request in requests:
            request.n_cached += 1
        self._accept(requests, logits_bv)

    def _accept(self, requests: list[Request], logits_bv: Any) -> None:
        """Sample a token for each, hand it out, and end the stories that are over."""
        for request, token in zip(requests, self._backend.sample(requests, logits_bv), strict=True):
            if token == self._eos_id:
                self._finish(request, FinishReason.STOP)
                continue
            request.generated.append(token)
            if request.pace:
                request.due_s = max(request.due_s, time.monotonic() - 1 / request.pace) + 1 / request.pace
            request.on_token(token)
            if len(request.generated) >= request.max_tokens:
                self._finish(request, FinishReason.LENGTH)
            else:
                request.slide(self._backend.context)

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        with self._changed:
            self._scheduler.remove(request)
        try:
            request.on_finish(reason, error)
        except Exception:  # a reader's callback must not end the thread
            log.exception("on_finish failed")
