"""The torch backend through the engine against a plain loop without cache or batch."""

import threading

import pytest
import torch

from model.config import SamplingParams
from model.engine.engine import Engine
from model.engine.request import FinishReason, Request, uniform_noise
from model.engine.torch_backend import TorchBackend
from model.sampling import sample


@torch.inference_mode()
def tell_plainly(decoder, prompt, params):
    """The oracle: the whole text through the decoder at every step."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + params.max_tokens:
        logits_bv = decoder(torch.tensor([tokens]))[:, -1]
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


@pytest.fixture
def engine(tiny_decoder):
    engine = Engine(TorchBackend(tiny_decoder, n_slots=4), eos_id=-1, n_slots=4)
    yield engine
    engine.close()


def start(engine, prompt, params, n_kept=1):
    """Submit; returns the request and the event of its end."""
    ended = threading.Event()
    request = Request(prompt, params, n_kept, lambda token: None, lambda reason, error: ended.set())
    engine.submit(request)
    return request, ended


SETTINGS = [
    SamplingParams(max_tokens=30, temperature=0.0, repetition_penalty=1.0, seed=1),
    SamplingParams(max_tokens=17, temperature=1.0, top_k=40, top_p=1.0, min_p=0.0, seed=2),
    SamplingParams(max_tokens=40, temperature=0.8, repetition_penalty=1.2, seed=3),
    SamplingParams(max_tokens=25, temperature=1.5, top_p=0.9, seed=4),
    SamplingParams(max_tokens=30, temperature=0.9, seed=2**62),
    SamplingParams(max_tokens=5, temperature=0.9, seed=5),
]
PROMPTS = [[1, 20, 30], [1, 99], [1, 5, 6, 7, 8, 9, 10], [1], [1, *range(50, 80)], [1, 200]]


def test_stories_told_together_equal_the_plain_loop(engine, tiny_decoder):
    """Six stories on four slots: cache, batching, joining and leaving change nothing."""
    started = [start(engine, prompt, params) for prompt, params in zip(PROMPTS, SETTINGS, strict=True)]
    for (request, ended), prompt, params in zip(started, PROMPTS, SETTINGS, strict=True):
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
