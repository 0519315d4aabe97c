"""The engine: one thread that steps every running story, so any number of readers share one model.

Between two steps stories join and leave. Prompts are read in bounded pieces between decode steps, so that nobody waits
for a long one. A story can be given a pace: what its reader could not follow anyway is time for others. An exception in
a step ends the stories that cause it with its message; the thread lives on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from model.engine.request import Feed, FinishReason, Request
from model.engine.scheduler import Scheduler
from model.errors import EngineError

log = logging.getLogger(__name__)
PACE_SLACK_S = 0.005  # stories due within this time share a step


class Backend(Protocol):
    """What runs the model."""

    context: int
    prefill_tokens: int  # prompt tokens read in one step at most, over all its stories

    def warm_up(self) -> None:
        """Do what would delay the first step."""

    def step(self, feeds: Sequence[Feed]) -> list[int]:
        """Read each story's tokens into its slot; return the next token of those that want one, in order."""


class Engine:
    """Accepts requests from any thread; calls their callbacks on its own."""

    def __init__(self, backend: Backend, eos_id: int, n_slots: int, max_waiting: int = 64):
        self._backend, self._eos_id = backend, eos_id
        self._n_slots, self._max_waiting = n_slots, max_waiting
        self._changed = threading.Condition()
        self._closing = self._retiring = False
        self._start_thread()

    def _start_thread(self) -> None:
        self._scheduler = Scheduler(self._n_slots, self._max_waiting)
        self._thread = threading.Thread(target=self._run, name="taleloom-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, accepted: bool = False) -> None:
        """Queue a request.

        Args:
            accepted: it goes on with a story that was taken already: neither a full queue nor `retire` refuses it.

        Raises:
            BusyError: too many are waiting.
            EngineError: the engine was closed.
        """
        with self._changed:
            if self._closing or (self._retiring and not accepted):
                raise EngineError("This storyteller is no longer here. Load it again.")
            self._scheduler.add(request, accepted)
            self._changed.notify()

    @property
    def n_free(self) -> int:
        """How many requests could run beside those that are here."""
        with self._changed:
            return self._scheduler.n_free

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
        """The thread: should it ever die of a fault of ours, its stories are told so and another takes over."""
        try:
            self._backend.warm_up()
        except Exception:  # the first step will meet it again, and tell its reader
            log.exception("the backend did not warm up")
        try:
            self._loop()
        except BaseException as error:
            log.exception("the engine's thread died")
            with self._changed:
                left = [*self._scheduler.running, *self._scheduler.waiting]
                self._start_thread()
            for request in left:
                self._finish(request, FinishReason.ERROR, f"The storyteller had to start afresh: {error}. Try again.")

    def _loop(self) -> None:
        while True:
            with self._changed:
                while self._scheduler.is_idle and not self._closing and not self._retiring:
                    self._changed.wait()
                # Retired and idle: whatever is submitted from now on must be refused, for nobody would run it.
                closing = self._closing = self._closing or self._scheduler.is_idle
                everyone = [*self._scheduler.running, *self._scheduler.waiting]
            for request in everyone:
                if closing or request.cancelled.is_set():
                    self._finish(request, FinishReason.CANCELLED)
            if closing:
                return
            with self._changed:
                self._scheduler.admit()
                running = list(self._scheduler.running)
            soon_s = time.monotonic() + PACE_SLACK_S
            reading, writing = [], []
            for request in running:
                request.slide(self._backend.context)
                if request.is_reading:
                    reading.append(request)
                elif request.due_s <= soon_s:
                    writing.append(request)
            if running and not reading and not writing:
                self._rest(running)
            # A bounded piece of prompts, then a step for all who are writing: nobody waits more than that.
            if reading:
                self._guarded_step(self._prompt_feeds(reading))
            if writing:
                self._guarded_step([Feed(request, request.generated[-1:]) for request in writing])

    def _prompt_feeds(self, reading: list[Request]) -> list[Feed]:
        """The next piece of each prompt, the oldest first, as far as one step goes."""
        feeds = []
        n_left = self._backend.prefill_tokens
        for request in reading:
            window = request.window
            chunk = window[request.n_cached : request.n_cached + n_left]
            feeds.append(Feed(request, chunk, wants_next=request.n_cached + len(chunk) == len(window)))
            n_left -= len(chunk)
            if n_left <= 0:
                break
        return feeds

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

    def _guarded_step(self, feeds: list[Feed]) -> None:
        """A step whose failure ends only the stories that caused it: those that fail on their own, too."""
        started_s = time.monotonic()
        try:
            next_tokens = iter(self._backend.step(feeds))
        except Exception as error:  # the edge of the engine: recorded, told to the reader, survived
            if len(feeds) > 1:
                for feed in feeds:
                    self._guarded_step([feed])
            else:
                self._stumble(feeds[0].request, error)
            return
        busy_s = time.monotonic() - started_s
        for request, tokens, wants_next in feeds:
            request.busy_s += busy_s
            request.n_cached += len(tokens)
            if wants_next:
                token = next(next_tokens)
                try:
                    self._accept(request, token)
                except Exception as error:  # a reader's callback
                    self._stumble(request, error)

    def _stumble(self, request: Request, error: Exception) -> None:
        log.error("a story failed", exc_info=error)
        self._finish(request, FinishReason.ERROR, f"The storyteller stumbled: {error}")

    def _accept(self, request: Request, token: int) -> None:
        """Hand out a token, and end the story if it is over."""
        if token == self._eos_id:
            self._finish(request, FinishReason.STOP)
            return
        request.generated.append(token)
        if request.pace:
            request.due_s = max(request.due_s, time.monotonic() - 1 / request.pace) + 1 / request.pace
        request.on_token(token)
        if len(request.generated) >= request.max_tokens:
            self._finish(request, FinishReason.LENGTH)

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        with self._changed:
            self._scheduler.remove(request, keep_cache=reason is not FinishReason.ERROR)
        try:
            request.on_finish(reason, error)
        except Exception:  # a reader's callback must not end the thread
            log.exception("on_finish failed")
