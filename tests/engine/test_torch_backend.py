"""The torch backend against a plain loop without cache or batch, through the engine and step by step."""

import contextlib
import dataclasses
import threading
from unittest.mock import MagicMock

import pytest
import torch

from model.config import BUNDLED_WEIGHTS, SamplingParams
from model.decoder import Decoder
from model.engine import torch_backend
from model.engine.engine import Engine
from model.engine.joined_decoder import JoinedDecoder
from model.engine.kv_cache import KVCache, RowsView
from model.engine.request import Feed, FinishReason, Request, uniform_noise
from model.engine.torch_backend import TorchBackend
from model.errors import ModelError
from model.sampling import sample

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@torch.inference_mode()
def tell_plainly(decoder, prompt, params, n_ids=None):
    """The oracle: the whole text through the decoder at every step."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + params.max_tokens:
        logits_bv = decoder(torch.tensor([tokens]))[:, -1, :n_ids]
        seen_bv = torch.zeros(1, logits_bv.shape[1], dtype=torch.bool)
        seen_bv[0, tokens] = True
        token = sample(
            logits_bv,
            seen_bv,
            temperature=[params.temperature],
            top_k=[params.top_k],
            top_p=[params.top_p],
            min_p=[params.min_p],
            repetition_penalty=[params.repetition_penalty],
            noise=[uniform_noise(params.seed, len(tokens))],
        ).item()
        tokens.append(token)
    return tokens[len(prompt) :]


SETTINGS = [
    SamplingParams(max_tokens=30, temperature=0.0, repetition_penalty=1.0, seed=1),
    SamplingParams(max_tokens=17, temperature=1.0, top_k=40, top_p=1.0, min_p=0.0, seed=2),
    SamplingParams(max_tokens=40, temperature=0.8, repetition_penalty=1.2, seed=3),
    SamplingParams(max_tokens=25, temperature=1.5, top_p=0.9, seed=4),
    SamplingParams(max_tokens=30, temperature=0.9, seed=2**62),
    SamplingParams(max_tokens=5, temperature=0.9, seed=5),
]
PROMPTS = [[1, 20, 30], [1, 99], [1, 5, 6, 7, 8, 9, 10], [1], [1, *range(50, 80)], [1, 200]]


# Through the engine.


@pytest.fixture(params=[False, True], ids=["asked", "ahead"])
def engine(tiny_decoder, request):
    engine = Engine(TorchBackend(tiny_decoder, n_slots=4, look_ahead=request.param), eos_id=-1, n_slots=4)
    yield engine
    engine.close()


def start(engine, prompt, params, n_kept=1):
    """Submit; returns the request and the event of its end."""
    ended = threading.Event()
    request = Request(prompt, params, n_kept, lambda token: None, lambda reason, error: ended.set())
    engine.submit(request)
    return request, ended


@pytest.mark.parametrize("penalties", [False, True])
def test_stories_told_together_equal_the_plain_loop(engine, tiny_decoder, penalties):
    """Six stories on four slots: cache, batching, joining and leaving change nothing."""
    settings = SETTINGS if penalties else [dataclasses.replace(s, repetition_penalty=1.0) for s in SETTINGS]
    started = [start(engine, prompt, params) for prompt, params in zip(PROMPTS, settings, strict=True)]
    for (request, ended), prompt, params in zip(started, PROMPTS, settings, strict=True):
        assert ended.wait(30)
        assert request.generated == tell_plainly(tiny_decoder, prompt, params)


def test_a_slid_context_equals_starting_from_the_window(engine, tiny_decoder):
    """After a slide the model sees the kept tokens and the newest text, at positions from 0."""
    params = SamplingParams(max_tokens=80, temperature=0.0, repetition_penalty=1.0, seed=1)
    request, ended = start(engine, [1, 3, 50, 60], params, n_kept=2)
    assert ended.wait(30) and request.n_forgotten > 0
    window = request.window
    assert window[:2] == [1, 3]
    with torch.inference_mode():
        expected = tiny_decoder(torch.tensor([window[:-1]]))[0, -1].argmax().item()
    assert window[-1] == expected


def test_continuing_gives_the_story_a_larger_limit_would_have_given(engine):
    whole, ended = start(engine, [1, 20, 30], SamplingParams(max_tokens=100, temperature=0.8, seed=11))
    assert ended.wait(30)
    reasons = []
    first = Request(
        [1, 20, 30], SamplingParams(max_tokens=35, temperature=0.8, seed=11), 1, lambda t: None, lambda r, e: None
    )
    for limit in (35, 70, 100):
        done = threading.Event()

        def finish(reason, error, done=done):
            reasons.append(reason)
            done.set()

        first.max_tokens, first.n_cached, first.on_finish = limit, 0, finish
        engine.submit(first)
        assert done.wait(30)
    assert reasons == [FinishReason.LENGTH] * 3
    assert first.generated == whole.generated and first.n_forgotten == whole.n_forgotten > 0


# Step by step.


def new_request(prompt, params, slot, n_cached=0):
    return Request(list(prompt), params, 1, lambda token: None, lambda *_: None, slot=slot, n_cached=n_cached)


def advance(backend, requests, n_most=1000):
    """A step for all, as the engine would ask for it; at most `n_most` tokens of each prompt."""
    feeds = []
    for request in requests:
        missing = request.window[request.n_cached :]
        feeds.append(Feed(request, missing[:n_most], len(missing) <= n_most))
    tokens = iter(backend.step(feeds))
    for feed in feeds:
        feed.request.n_cached += len(feed.tokens)
        if feed.wants_next:
            feed.request.generated.append(next(tokens))
    assert next(tokens, None) is None


def tell(backend, request):
    while len(request.generated) < request.max_tokens:
        advance(backend, [request])
    return request.generated


@pytest.fixture
def short_reads(monkeypatch):
    """Attention reads 8, 16, 32 or 64 positions of the tiny model's 64."""
    monkeypatch.setattr(torch_backend, "LEAST_READ", 8)


@pytest.mark.parametrize("look_ahead", [False, True])
@torch.inference_mode()
def test_rows_that_take_no_part_keep_their_cache(tiny_decoder, look_ahead):
    """Free slots hold prompts for reuse, paced stories rest, long prompts are read in pieces."""
    backend = TorchBackend(tiny_decoder, n_slots=5, look_ahead=look_ahead)
    backend.cache.keys.normal_()
    backend.cache.values.normal_()
    request = new_request([1, 5, 6, 7], SETTINGS[0], slot=3)
    before = backend.cache.rows_lbcsk.clone()
    for _ in range(6):
        advance(backend, [request])
    changed_bs = (backend.cache.rows_lbcsk != before).any(dim=4).any(dim=2).any(dim=0)
    changed_bs[:, backend.cache.scratch] = False
    n_written = request.n_cached + look_ahead
    assert changed_bs[3].tolist() == [i < n_written for i in range(len(changed_bs[3]))]
    assert changed_bs.any(dim=1).tolist() == [False, False, False, True, False]


def test_a_growing_batch_and_growing_texts_equal_the_plain_loop(tiny_decoder, short_reads):
    """1 to 8 rows and 8 to 64 positions: every size a step can have."""
    backend = TorchBackend(tiny_decoder, n_slots=6)
    sizes = []
    backend._run, run = lambda *size: (sizes.append(size[:2]), run(*size)), backend._run
    stories = []
    for slot, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=1000, temperature=1.0, seed=slot)
        stories.append(new_request(prompt, params, slot))
        advance(backend, stories[-1:])
        for _ in range(3):
            advance(backend, stories)
    while stories[0].n_window < 64:
        advance(backend, [story for story in stories if story.n_window < 64])
    assert {rows for rows, _ in sizes} == {1, 2, 4, 6} and {read for _, read in sizes} == {8, 16, 32, 64}
    for story in stories:
        params = dataclasses.replace(story.params, max_tokens=len(story.generated))
        assert story.generated == tell_plainly(tiny_decoder, story.prompt, params)


@pytest.mark.parametrize("prefill_tokens", [1, 40, 1000])
@torch.inference_mode()
def test_prompts_read_together_equal_each_alone(tiny_decoder, prefill_tokens):
    together = TorchBackend(tiny_decoder, n_slots=6)
    together.prefill_tokens = prefill_tokens
    alone = TorchBackend(tiny_decoder, n_slots=6)
    slots = [4, 0, 3, 5, 1, 2]
    stories = [new_request(*story) for story in zip(PROMPTS, SETTINGS, slots, strict=True)]
    advance(together, stories)
    for prompt, params, slot in zip(PROMPTS, SETTINGS, slots, strict=True):
        request = new_request(prompt, params, slot)
        advance(alone, [request])
        assert request.generated == stories[slots.index(slot)].generated
        read = slice(0, len(prompt))
        for mine, theirs in ((together.cache.keys, alone.cache.keys), (together.cache.values, alone.cache.values)):
            torch.testing.assert_close(mine[:, slot, :, read], theirs[:, slot, :, read], atol=1e-4, rtol=0)


def test_a_prompt_read_in_pieces_beside_others_gives_the_same_story(tiny_decoder):
    backend = TorchBackend(tiny_decoder, n_slots=3)
    long = new_request(PROMPTS[4], SETTINGS[4], slot=2)
    short = new_request(PROMPTS[0], SETTINGS[0], slot=0)
    while not long.generated:
        advance(backend, [long, short], n_most=7)  # a piece of the one, a step of the other
    assert tell(backend, long) == tell_plainly(tiny_decoder, long.prompt, long.params)
    assert tell(backend, short) == tell_plainly(tiny_decoder, short.prompt, short.params)


@pytest.mark.parametrize("n_cached", [9, 30])
def test_a_story_goes_on_from_what_the_slot_holds(tiny_decoder, n_cached):
    """The engine starts a story at n_cached > 0 where a free slot holds its beginning; a penalty counts that, too."""
    backend = TorchBackend(tiny_decoder, n_slots=2)
    prompt = PROMPTS[4]
    tell(backend, new_request(prompt, SETTINGS[0], slot=1))
    for params in SETTINGS[2:4]:
        params = dataclasses.replace(params, max_tokens=30)
        second = new_request(prompt, params, slot=1, n_cached=n_cached)
        assert tell(backend, second) == tell_plainly(tiny_decoder, prompt, params)


def test_rows_with_a_penalty_and_without_share_steps(tiny_decoder):
    backend = TorchBackend(tiny_decoder, n_slots=4, look_ahead=True)
    plain = SamplingParams(max_tokens=20, temperature=0.0, seed=1)
    stories = [
        new_request([1, 40 + slot], dataclasses.replace(plain, repetition_penalty=penalty), slot)
        for slot, penalty in enumerate([1.0, 1.3, 0.7, 1.0])
    ]
    for _ in range(20):
        advance(backend, stories)
    for story in stories:
        assert story.generated == tell_plainly(tiny_decoder, story.prompt, story.params)
    for penalty in (1.0, 1.3):  # what the slot's story has left in the mask does not count for the next
        params = dataclasses.replace(plain, temperature=1.5, repetition_penalty=penalty)
        assert tell(backend, new_request([1, 77], params, slot=1)) == tell_plainly(tiny_decoder, [1, 77], params)


def test_a_padded_vocabulary_never_gives_a_token_without_text(tiny_decoder):
    params = SamplingParams(max_tokens=60, temperature=5.0, top_p=1.0, min_p=0.0, seed=1)
    request = new_request([1, 2], params, slot=0)
    tokens = tell(TorchBackend(tiny_decoder, n_slots=1, n_ids=250), request)
    assert max(tokens) < 250 and tokens == tell_plainly(tiny_decoder, [1, 2], params, n_ids=250)


def test_weights_that_give_no_numbers_are_an_error(tiny_decoder):
    decoder = Decoder(tiny_decoder.config)
    with torch.no_grad():
        decoder.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="no numbers"):
        advance(TorchBackend(decoder, n_slots=1), [new_request([1, 2], SETTINGS[0], slot=0)])


# Steps started before they are asked for.


@pytest.fixture
def counted(tiny_decoder):
    """A backend that looks ahead, and the list its steps on the device are counted in."""
    backend, steps = TorchBackend(tiny_decoder, n_slots=3, look_ahead=True), []
    backend._run, run = lambda *size: (steps.append(size), run(*size)), backend._run
    return backend, steps


def test_looking_ahead_runs_each_step_once(counted, tiny_decoder):
    backend, steps = counted
    stories = [new_request([1, 20 + slot], SamplingParams(max_tokens=30, seed=slot), slot) for slot in range(3)]
    for _ in range(30):
        advance(backend, stories)
    assert len(steps) == 30, "29 steps after the prompts, and one that nobody asked for"
    for story in stories:
        assert story.generated == tell_plainly(tiny_decoder, story.prompt, story.params)


def test_a_wrong_guess_changes_nothing(counted, tiny_decoder):
    """Stories leave, rest, and come back between steps."""
    backend, _ = counted
    stories = [new_request([1, 20 + slot], SamplingParams(max_tokens=21, seed=slot), slot) for slot in range(3)]
    advance(backend, stories)
    for i in range(30):
        advance(backend, [story for slot, story in enumerate(stories) if i % 3 != slot])
    for story in stories:
        assert story.generated == tell_plainly(tiny_decoder, story.prompt, story.params)


def test_a_guess_counts_only_for_its_token_and_slot(counted, tiny_decoder):
    backend, _ = counted
    moving, forced = (new_request([1, 20], SamplingParams(max_tokens=20, temperature=0.8, seed=3), 0) for _ in "ab")
    for _ in range(10):
        advance(backend, [moving])
    backend.cache.rows_lbcsk[:, 2] = backend.cache.rows_lbcsk[:, 0]
    moving.slot = 2
    assert tell(backend, moving) == tell_plainly(tiny_decoder, moving.prompt, moving.params)
    advance(backend, [forced])
    advance(backend, [forced])
    forced.generated[-1] = 123  # not what was drawn
    prompt = forced.window
    expected = tell_plainly(tiny_decoder, prompt, dataclasses.replace(forced.params, max_tokens=18))
    assert tell(backend, forced) == prompt[2:] + expected


def test_a_guess_is_dropped_when_its_slot_is_read_into(counted, tiny_decoder):
    """A story stops; another with the same beginning overwrites one position; then the first goes on."""
    backend, _ = counted
    first = new_request([1, 20], SamplingParams(max_tokens=20, temperature=0.8, seed=3), slot=0)
    for _ in range(10):
        advance(backend, [first])
    other = new_request([*first.window[:-1], 200, 201], SETTINGS[0], slot=0, n_cached=first.n_cached)
    advance(backend, [other])
    assert tell(backend, first) == tell_plainly(tiny_decoder, first.prompt, first.params)


def test_the_last_position_of_the_context_is_not_passed(counted, tiny_decoder):
    backend, _ = counted
    request = new_request(range(1, 61), SamplingParams(max_tokens=5, temperature=0.0, seed=1), slot=0)
    assert tell(backend, request) == tell_plainly(tiny_decoder, request.prompt, request.params)
    assert request.n_cached == backend.context


def test_noise_of_many_is_that_of_each(tiny_decoder):
    backend = TorchBackend(tiny_decoder, n_slots=5)
    seeds = [0, 1, 2**31, 2**62 + 12345, 2**63 - 1]
    requests = [new_request([1] * (i + 1), SamplingParams(seed=seed), i) for i, seed in enumerate(seeds)]
    backend._settle(requests)
    assert backend._noise(requests, list(range(5))).tolist() == [request.noise for request in requests]
    expected = [uniform_noise(seed, i + 4) for i, seed in enumerate(seeds)]
    assert backend._noise(requests, list(range(5)), n_ahead=3).tolist() == expected


# Graphs.


class PretendedGraph:
    """Runs again what was called while it was captured, and runs it when it is captured, too."""

    capturing = None

    @contextlib.contextmanager
    def capture(self, **_):
        PretendedGraph.capturing, self.calls = self, []
        yield
        PretendedGraph.capturing = None

    def replay(self):
        for call in self.calls:
            call()


@pytest.mark.parametrize("look_ahead", [False, True])
def test_capturing_leaves_no_trace(tiny_decoder, short_reads, monkeypatch, look_ahead):
    """A new size is rehearsed in the midst of stories, some of their tokens only on the device."""
    for name in ("Stream", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "graph", PretendedGraph.capture)
    backend = TorchBackend(tiny_decoder, n_slots=4, capture=True, look_ahead=look_ahead)
    decode = backend._decode

    def recorded(*size):
        decode(*size)
        if PretendedGraph.capturing:
            PretendedGraph.capturing.calls.append(lambda: decode(*size))

    backend._decode = recorded
    stories = []
    for slot in range(4):
        stories.append(new_request([1, 20 + slot], SamplingParams(max_tokens=30, temperature=0.9, seed=slot), slot))
        for _ in range(8):
            advance(backend, stories)
    assert len(backend._graphs) > 4
    for story in stories:
        params = dataclasses.replace(story.params, max_tokens=len(story.generated))
        assert story.generated == tell_plainly(tiny_decoder, story.prompt, params)


# The joined weights.


@pytest.mark.parametrize("change", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 6}])
@torch.inference_mode()
def test_logits_equal_those_of_the_decoder(tiny_config, change):
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(tiny_config, **change))
    for parameter in decoder.parameters():
        parameter.mul_(8) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
    tokens = torch.randint(0, 300, (64,)).tolist()
    expected = decoder(torch.tensor([tokens]))[0]
    backend = TorchBackend(decoder, n_slots=2)
    pieces = [backend.logits(tokens[:40], slot=1), backend.logits(tokens[40:], slot=1, start=40)]
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


@torch.inference_mode()
def test_a_step_in_bfloat16_looks_at_no_value(tiny_config):
    """So that a graph can hold it: there are no values on the meta device."""
    decoder = Decoder(tiny_config).to("meta")
    joined = JoinedDecoder(decoder, n_ids=300, dtype=torch.bfloat16)
    cache = KVCache(tiny_config, 4, "meta", torch.bfloat16)
    tokens_bt, positions_bt = torch.empty(2, 4, 1, dtype=torch.int64, device="meta")
    x_btd = joined.hidden(tokens_bt, RowsView(cache, slice(0, 4), positions_bt, 64))
    assert x_btd.dtype == torch.bfloat16 and joined.logits(x_btd[:, -1]).dtype == torch.float32


# On CUDA.


@pytest.fixture(scope="module")
def cuda_decoder():
    from model.checkpoint import load_decoder

    return load_decoder(BUNDLED_WEIGHTS, "cuda")


def tell_bundled(backend, penalty, n_tokens=60):
    """Greedy and sampled stories of the bundled model, joining one after the other."""
    stories = []
    for slot, params in enumerate(SETTINGS * 2):
        params = dataclasses.replace(params, repetition_penalty=penalty)
        stories.append(new_request(PROMPTS[slot % 6], params, slot))
        advance(backend, stories[-1:])
        advance(backend, stories)
    while any(len(story.generated) < n_tokens for story in stories):
        advance(backend, stories)
    return [story.generated[:n_tokens] for story in stories]


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_captured_steps_equal_eager_ones(cuda_decoder, dtype, penalty):
    captured = tell_bundled(TorchBackend(cuda_decoder, 12, dtype=dtype), penalty)
    eager = tell_bundled(TorchBackend(cuda_decoder, 12, dtype=dtype, capture=False, look_ahead=False), penalty)
    assert captured == eager


@needs_cuda
def test_cuda_in_float32_tells_what_the_cpu_tells(cuda_decoder):
    from model.checkpoint import load_decoder

    greedy = SamplingParams(max_tokens=100, temperature=0.0, seed=1)
    stories = []
    for decoder in (cuda_decoder, load_decoder(BUNDLED_WEIGHTS)):
        backend = TorchBackend(decoder, n_slots=1, dtype=torch.float32)
        stories.append(tell(backend, new_request(PROMPTS[2], greedy, slot=0)))
    assert stories[0] == stories[1]


@needs_cuda
def test_bfloat16_logits_are_near_those_of_float32(cuda_decoder):
    tokens = torch.randint(10, 4000, (200,)).tolist()
    near, exact = (TorchBackend(cuda_decoder, 1, dtype=t).logits(tokens) for t in (torch.bfloat16, torch.float32))
    moved_t = (near.softmax(-1) - exact.softmax(-1)).abs().sum(-1) / 2
    assert moved_t.mean() < 0.02 and moved_t.max() < 0.2
