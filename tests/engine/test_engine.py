"""The engine over a backend of plain Python: joining, leaving, fairness, faults."""

import itertools
import threading
import time

import pytest

from model.config import SamplingParams
from model.engine.engine import PREFILL_CHUNK, Engine
from model.engine.request import FinishReason, Request
from model.errors import BusyError, EngineError

EOS = 0


class CountingBackend:
    """Writes 1, 2, 3, ... after any prompt; logs its steps; can be told to wait or to fail."""

    context = 512

    def __init__(self):
        self.steps = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail_when = lambda requests: False

    def prefill(self, request, tokens, start):
        self.gate.wait(10)
        self.steps.append(("prefill", len(tokens), request))
        return self._logits([request])

    def decode(self, requests):
        self.gate.wait(10)
        self.steps.append(("decode", len(requests), None))
        return self._logits(requests)

    def _logits(self, requests):
        if self.fail_when(requests):
            raise RuntimeError("injected")
        return requests

    def sample(self, requests, logits_bv):
        return [len(request.generated) + 1 for request in requests]


@pytest.fixture
def backend():
    return CountingBackend()


@pytest.fixture
def engine(backend):
    engine = Engine(backend, EOS, n_slots=2, max_waiting=3)
    yield engine
    backend.gate.set()
    engine.close()


class Reader:
    """A request with its end to wait for."""

    def __init__(self, n_prompt=3, max_tokens=5):
        self.ended = threading.Event()
        self.n_ends = 0
        self.reason = self.error = None
        self.tokens = []
        params = SamplingParams(max_tokens=max_tokens, seed=1)
        self.request = Request([9] * n_prompt, params, 1, self.tokens.append, self._finish)

    def _finish(self, reason, error):
        self.n_ends += 1
        self.reason, self.error = reason, error
        self.ended.set()

    def wait(self):
        assert self.ended.wait(10), "the story never ended"
        return self


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def test_a_story_ends_at_its_length(engine):
    reader = Reader(max_tokens=5)
    engine.submit(reader.request)
    assert reader.wait().reason is FinishReason.LENGTH and reader.tokens == [1, 2, 3, 4, 5]


def test_a_story_ends_at_its_end_token(engine, backend):
    backend.sample = lambda requests, logits: [4 if len(r.generated) < 2 else EOS for r in requests]
    reader = Reader(max_tokens=50)
    engine.submit(reader.request)
    assert reader.wait().reason is FinishReason.STOP and reader.tokens == [4, 4]


def test_more_stories_than_slots_all_end(engine):
    readers = [Reader(max_tokens=n) for n in (2, 40, 3)]
    for reader in readers:
        engine.submit(reader.request)
    assert [len(reader.wait().tokens) for reader in readers] == [2, 40, 3]


def test_the_queue_is_bounded_and_tells_places(engine, backend):
    running = [Reader(max_tokens=4000), Reader(max_tokens=4000)]
    for reader in running:
        engine.submit(reader.request)
    wait_until(lambda: all(reader.tokens for reader in running))
    backend.gate.clear()
    waiting = [Reader() for _ in range(3)]
    for reader in waiting:
        engine.submit(reader.request)
    with pytest.raises(BusyError, match="waiting"):
        engine.submit(Reader().request)
    assert [engine.place_in_queue(reader.request) for reader in waiting] == [1, 2, 3]
    engine.cancel(waiting[1].request)
    backend.gate.set()
    assert waiting[1].wait().reason is FinishReason.CANCELLED and not waiting[1].tokens
    assert waiting[0].wait().reason is waiting[2].wait().reason is FinishReason.LENGTH


def test_cancelling_frees_the_slot_and_keeps_the_tokens(engine):
    endless = [Reader(max_tokens=4000), Reader(max_tokens=4000)]
    for reader in endless:
        engine.submit(reader.request)
    wait_until(lambda: all(reader.tokens for reader in endless))
    engine.cancel(endless[0].request)
    engine.cancel(endless[0].request)  # twice is harmless
    assert endless[0].wait().reason is FinishReason.CANCELLED and endless[0].tokens
    late = Reader()
    engine.submit(late.request)
    assert late.wait().reason is FinishReason.LENGTH


def test_a_paced_story_keeps_its_pace_and_others_do_not_wait(engine):
    paced, free = Reader(max_tokens=20), Reader(max_tokens=400)
    paced.request.pace = 100.0
    started_s = time.monotonic()
    engine.submit(paced.request)
    engine.submit(free.request)
    free.wait()
    assert len(paced.tokens) < 20, "400 free tokens take less time than 20 paced ones"
    paced.wait()
    assert time.monotonic() - started_s >= 0.18 and paced.tokens == list(range(1, 21))


def test_a_paced_story_stops_at_once(engine):
    reader = Reader(max_tokens=20)
    reader.request.pace = 0.2  # a token every five seconds
    engine.submit(reader.request)
    wait_until(lambda: reader.tokens)
    started_s = time.monotonic()
    engine.cancel(reader.request)
    assert reader.wait().reason is FinishReason.CANCELLED and time.monotonic() - started_s < 2


def test_a_long_prompt_is_read_between_the_steps_of_others(engine, backend):
    backend.context = 10_000  # the first story must not have to read again itself
    first = Reader(max_tokens=4000)
    engine.submit(first.request)
    wait_until(lambda: len(first.tokens) > 3)
    backend.steps.clear()
    long = Reader(n_prompt=500, max_tokens=1)
    engine.submit(long.request)
    long.wait()
    steps = list(backend.steps)
    chunks = [i for i, (_, _, request) in enumerate(steps) if request is long.request]
    assert [steps[i][1] for i in chunks] == [PREFILL_CHUNK] * 3 + [500 - 3 * PREFILL_CHUNK]
    assert all(later - earlier == 2 for earlier, later in itertools.pairwise(chunks))


def test_an_exception_ends_the_stories_of_its_step_only(engine, backend):
    survivor, victim = Reader(max_tokens=300), Reader(n_prompt=7, max_tokens=5)
    backend.fail_when = lambda requests: len(requests) == 1 and len(requests[0].prompt) == 7
    engine.submit(survivor.request)
    engine.submit(victim.request)
    assert victim.wait().reason is FinishReason.ERROR and "injected" in victim.error
    assert survivor.wait().reason is FinishReason.LENGTH
    late = Reader()
    engine.submit(late.request)  # the thread lives on
    assert late.wait().reason is FinishReason.LENGTH


def test_a_story_that_ended_in_the_failing_step_ends_once(engine, backend):
    """Sampling for a batch hands tokens out row by row; a failure half way must not end the first row again."""
    first, second = Reader(max_tokens=4000), Reader(max_tokens=4000)
    engine.submit(first.request)
    engine.submit(second.request)
    wait_until(lambda: first.tokens and second.tokens)

    def sample(requests, logits):
        if len(requests) == 2:
            requests[0].max_tokens = 1  # its story ends with this token ...
            requests[1].on_token = lambda token: 1 / 0  # ... and the next row fails
        return [5] * len(requests)

    backend.sample = sample
    ends = {first.wait().reason, second.wait().reason}
    late = Reader(max_tokens=1)
    engine.submit(late.request)
    late.wait()
    assert ends == {FinishReason.LENGTH, FinishReason.ERROR} and first.n_ends == second.n_ends == 1


def test_the_context_slides_when_it_is_full(engine, backend):
    reader = Reader(n_prompt=500, max_tokens=600)
    engine.submit(reader.request)
    reader.wait()
    assert len(reader.tokens) == 600 and reader.request.n_forgotten > 0
    assert reader.request.n_window <= backend.context
    assert reader.request.window[0] == 9 and reader.request.window[-1] == 600


def test_a_prompt_longer_than_the_context_loses_its_oldest_part(engine, backend):
    reader = Reader(n_prompt=1500, max_tokens=3)
    engine.submit(reader.request)
    reader.wait()
    assert reader.reason is FinishReason.LENGTH
    assert reader.request.n_forgotten > 900 and all(step[1] <= PREFILL_CHUNK for step in backend.steps)


def test_a_retired_engine_tells_its_stories_to_the_end(backend):
    engine = Engine(backend, EOS, n_slots=1)
    reader = Reader(max_tokens=300)
    engine.submit(reader.request)
    engine.retire()
    with pytest.raises(EngineError):
        engine.submit(Reader().request)
    assert reader.wait().reason is FinishReason.LENGTH
    engine._thread.join(10)
    assert not engine._thread.is_alive()


def test_closing_cancels_and_refuses(backend):
    engine = Engine(backend, EOS, n_slots=1)
    readers = [Reader(max_tokens=4000), Reader()]
    for reader in readers:
        engine.submit(reader.request)
    engine.close()
    engine.close()  # twice is harmless
    assert all(reader.wait().reason is FinishReason.CANCELLED for reader in readers)
    with pytest.raises(EngineError, match="no longer here"):
        engine.submit(Reader().request)
