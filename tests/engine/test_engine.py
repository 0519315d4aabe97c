"""The engine over a backend of plain Python: joining, leaving, fairness, faults."""

import itertools
import threading
import time

import pytest

from model.config import SamplingParams
from model.engine.engine import Engine
from model.engine.request import FinishReason, Request
from model.errors import BusyError, EngineError

EOS = 0


class CountingBackend:
    """Writes 1, 2, 3, ... after any prompt; logs its steps; can be told to wait or to fail."""

    context = 512
    prefill_tokens = 128

    def __init__(self):
        self.steps = []  # how many tokens each story was fed
        self.gate = threading.Event()
        self.gate.set()
        self.fail_when = lambda requests: False
        self.next_token = lambda request: len(request.generated) + 1

    def warm_up(self):
        pass

    def step(self, feeds):
        self.gate.wait(10)
        assert all(feed.request.n_cached + len(feed.tokens) <= self.context for feed in feeds)
        self.steps.append({feed.request: len(feed.tokens) for feed in feeds})
        if self.fail_when([feed.request for feed in feeds]):
            raise RuntimeError("injected")
        return [self.next_token(feed.request) for feed in feeds if feed.wants_next]


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
    backend.next_token = lambda request: 4 if len(request.generated) < 2 else EOS
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
    backend.next_token = lambda request: time.sleep(0.001) or 4  # nor to have ended, its prompt there to be shared
    first = Reader(max_tokens=4000)
    engine.submit(first.request)
    wait_until(lambda: len(first.tokens) > 3)
    backend.steps.clear()
    long = Reader(n_prompt=500, max_tokens=1)
    engine.submit(long.request)
    long.wait()
    steps = list(backend.steps)
    chunks = [i for i, fed in enumerate(steps) if long.request in fed]
    assert [steps[i][long.request] for i in chunks] == [128, 128, 128, 500 - 3 * 128]
    assert all(later - earlier == 2 for earlier, later in itertools.pairwise(chunks))


def test_prompts_are_read_together_within_one_budget(engine, backend):
    backend.gate.clear()
    readers = [Reader(max_tokens=1), Reader(n_prompt=100, max_tokens=1), Reader(n_prompt=100, max_tokens=1)]
    for i, reader in enumerate(readers):
        reader.request.prompt = [i] * len(reader.request.prompt)  # nothing to share
        engine.submit(reader.request)
    backend.gate.set()
    for reader in readers:
        reader.wait()
    assert all(sum(fed.values()) <= 128 for fed in backend.steps)
    assert [sum(fed.get(reader.request, 0) for fed in backend.steps) for reader in readers] == [3, 100, 100]


def test_another_story_from_the_same_prompt_reads_only_what_is_new(engine, backend):
    prompt = list(range(100))
    first = Reader(max_tokens=20)
    first.request.prompt = prompt
    engine.submit(first.request)
    first.wait()
    backend.steps.clear()
    again, other = Reader(max_tokens=1), Reader(max_tokens=1)
    again.request.prompt, other.request.prompt = prompt, prompt[:60] + [7] * 40
    engine.submit(again.request)
    again.wait()
    engine.submit(other.request)
    other.wait()
    assert backend.steps[0][again.request] == 1, "all but the last token lay in the slot"
    assert backend.steps[1][other.request] == 40


def test_a_continued_story_goes_on_in_its_slot(engine, backend):
    reader = Reader(n_prompt=30, max_tokens=10)
    engine.submit(reader.request)
    reader.wait()
    backend.steps.clear()
    reader.ended.clear()
    reader.request.max_tokens = 12
    engine.submit(reader.request)
    reader.wait()
    assert reader.tokens == list(range(1, 13)) and [*backend.steps[0].values()] == [1]


def test_a_story_that_filled_the_context_to_the_brim_can_be_continued(engine, backend):
    """It stopped with its newest token just beyond the context: the cache was full, and one token to be fed."""
    reader = Reader(n_prompt=12, max_tokens=501)
    engine.submit(reader.request)
    reader.wait()
    assert reader.request.n_window == backend.context + 1
    reader.ended.clear()
    reader.request.max_tokens = 550
    engine.submit(reader.request)
    assert reader.wait().reason is FinishReason.LENGTH and len(reader.tokens) == 550
    whole = Reader(n_prompt=12, max_tokens=550)
    engine.submit(whole.request)
    whole.wait()
    assert whole.request.n_forgotten == reader.request.n_forgotten > 0


def test_a_failed_story_leaves_nothing_to_go_on_from(engine, backend):
    victim = Reader(n_prompt=40, max_tokens=10)
    backend.fail_when = lambda requests: len(requests[0].generated) == 5
    engine.submit(victim.request)
    assert victim.wait().reason is FinishReason.ERROR
    backend.steps.clear()
    again = Reader(n_prompt=40, max_tokens=1)
    engine.submit(again.request)
    assert again.wait().reason is FinishReason.LENGTH and backend.steps[0][again.request] == 40


def test_stories_come_also_when_warming_up_failed(backend, caplog):
    backend.warm_up = lambda: 1 / 0
    engine = Engine(backend, EOS, n_slots=1)
    reader = Reader()
    engine.submit(reader.request)
    assert reader.wait().reason is FinishReason.LENGTH and "warm up" in caplog.text
    engine.close()


def test_a_thread_that_dies_is_replaced_and_its_stories_are_told(engine, backend, caplog):
    """No fault outside a step is known; should there be one, nobody may wait for ever."""
    running = [Reader(max_tokens=4000), Reader(max_tokens=4000), Reader()]
    for reader in running:
        engine.submit(reader.request)
    wait_until(lambda: running[0].tokens and running[1].tokens)
    engine._scheduler.admit = lambda: 1 / 0
    for reader in running:
        assert reader.wait().reason is FinishReason.ERROR and "start afresh" in reader.error
    assert "thread died" in caplog.text
    late = Reader()
    engine.submit(late.request)
    assert late.wait().reason is FinishReason.LENGTH


def test_a_thousand_submits_against_64_slots(backend):
    """Each is told or refused at once; places are exact; nothing is lost."""
    engine = Engine(backend, EOS, n_slots=64, max_waiting=64)
    backend.gate.clear()
    readers = [Reader(max_tokens=3) for _ in range(1000)]
    accepted, refused = [], 0

    def submit(some):
        nonlocal refused
        for reader in some:
            try:
                engine.submit(reader.request)
                accepted.append(reader)
            except BusyError:
                refused += 1

    threads = [threading.Thread(target=submit, args=(readers[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(accepted) == 64 + 64 and refused == 1000 - 128
    backend.gate.set()
    assert all(reader.wait().reason is FinishReason.LENGTH and reader.n_ends == 1 for reader in accepted)
    assert max(len(fed) for fed in backend.steps) <= 64
    engine.close()


def test_an_exception_ends_only_the_stories_that_cause_it(engine, backend):
    survivor, victim = Reader(max_tokens=300), Reader(n_prompt=7, max_tokens=5)
    backend.fail_when = lambda requests: any(len(request.prompt) == 7 for request in requests)
    backend.gate.clear()
    engine.submit(survivor.request)
    engine.submit(victim.request)
    backend.gate.set()
    assert victim.wait().reason is FinishReason.ERROR and "injected" in victim.error
    assert survivor.wait().reason is FinishReason.LENGTH and survivor.tokens == list(range(1, 301))
    late = Reader()
    engine.submit(late.request)  # the thread lives on
    assert late.wait().reason is FinishReason.LENGTH


def test_a_backend_that_fails_for_all_ends_all(engine, backend):
    backend.fail_when = lambda requests: True
    readers = [Reader(), Reader()]
    for reader in readers:
        engine.submit(reader.request)
    assert all(reader.wait().reason is FinishReason.ERROR and reader.n_ends == 1 for reader in readers)


def test_a_callback_that_fails_ends_its_own_story(engine):
    first, second = Reader(max_tokens=300), Reader(max_tokens=300)
    first.request.on_token = lambda token: 1 / 0
    engine.submit(first.request)
    engine.submit(second.request)
    assert first.wait().reason is FinishReason.ERROR and first.n_ends == 1
    assert second.wait().reason is FinishReason.LENGTH


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
    assert reader.request.n_forgotten > 900 and all(max(fed.values()) <= 128 for fed in backend.steps)


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
    with pytest.raises(EngineError):  # nobody is left to run it: whoever waited would wait for ever
        engine.submit(Reader().request, accepted=True)


def test_what_was_accepted_is_refused_neither_by_a_full_queue_nor_by_retirement(engine, backend):
    backend.gate.clear()
    readers = [Reader() for _ in range(5)]  # two slots, three waiting
    for reader in readers:
        engine.submit(reader.request)
    with pytest.raises(BusyError):
        engine.submit(Reader().request)
    engine.retire()
    readers.append(Reader())
    engine.submit(readers[-1].request, accepted=True)
    backend.gate.set()
    assert all(reader.wait().reason is FinishReason.LENGTH for reader in readers)


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
