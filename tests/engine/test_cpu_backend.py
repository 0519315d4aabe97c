"""The CPU kernels against the torch decoder, and their promise: no neighbour changes a bit of a story."""

import dataclasses
import os
import platform
import random
import subprocess
import sys
import threading

import llvmlite.binding
import numba
import numpy as np
import pytest
import torch

from model.config import ModelConfig, SamplingParams
from model.decoder import Decoder
from model.engine import cpu_kernels
from model.engine.cpu_backend import CpuBackend, quantise
from model.engine.cpu_kernels import pick
from model.engine.engine import Engine
from model.engine.request import Feed, Request, uniform_noise
from model.errors import ModelError
from model.sampling import penalise_repetition, sample

SHAPES = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "own head": {"tie_word_embeddings": False},
    "odd sizes": {"hidden_size": 36, "head_dim": 6, "intermediate_size": 50},
}


def numpy_weights(decoder):
    return {name: weight.numpy() for name, weight in decoder.state_dict().items()}


def make_decoder(config):
    torch.manual_seed(1)
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(8) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
    return decoder


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_logits_equal_those_of_the_decoder(tiny_config, shape):
    config = dataclasses.replace(tiny_config, **SHAPES[shape])
    decoder = make_decoder(config)
    backend = CpuBackend(config, numpy_weights(decoder), n_slots=3, int8=False)
    tokens = torch.randint(0, 300, (50,))
    with torch.inference_mode():
        expected = decoder(tokens.unsqueeze(0))[0].numpy()
    np.testing.assert_allclose(backend.logits(tokens[:20].tolist(), slot=2), expected[:20], atol=1e-4)
    for i in range(20, 50):
        np.testing.assert_allclose(backend.logits([int(tokens[i])], 2, i)[0], expected[i], atol=1e-4)


def round_to_int8(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale) * scale


def test_int8_logits_equal_those_of_a_decoder_that_rounds_alike(tiny_config, monkeypatch):
    """Weights and activations to int8, keys and values to float16."""
    decoder = make_decoder(tiny_config)
    backend = CpuBackend(tiny_config, numpy_weights(decoder), n_slots=1)
    attention = torch.nn.functional.scaled_dot_product_attention

    def attention_over_half(q, k, v, **options):
        return attention(q, k.half().float(), v.half().float(), **options)

    with torch.no_grad():
        tokens = torch.randint(0, 300, (40,))
        exact = decoder(tokens.unsqueeze(0))[0].numpy()
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                rounded, scale = quantise(parameter.numpy())
                parameter.copy_(torch.from_numpy(rounded * scale[:, None]))
        for module in decoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, inputs: (round_to_int8(inputs[0]),))
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention_over_half)
        expected = decoder(tokens.unsqueeze(0))[0].numpy()
        expected_alone = decoder(tokens.unsqueeze(1))[:, 0].numpy()
    # A value on the edge between two steps may round either way, and all that follows differs by that step: most
    # tokens on their own meet no such value, a text does.
    alone = np.concatenate([backend.logits([token]) for token in tokens.tolist()])
    assert np.median(np.abs(alone - expected_alone).max(1)) < 1e-4
    assert np.abs(backend.logits(tokens.tolist()) - expected).mean() < 0.6 * np.abs(expected - exact).mean()


def test_rounding_is_to_half_a_step():
    weight = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    weight[3] = 0
    rounded, scale = quantise(weight)
    assert rounded.dtype == np.int8 and np.abs(rounded).max() == 127
    assert (np.abs(rounded * scale[:, None] - weight) <= scale[:, None] / 2 * 1.001).all()


@pytest.mark.parametrize("int8", [True, False])
def test_neither_chunks_nor_neighbours_change_a_bit(tiny_config, int8):
    backend = CpuBackend(tiny_config, numpy_weights(make_decoder(tiny_config)), n_slots=4, int8=int8)
    rng = random.Random(0)
    tokens = [rng.randrange(300) for _ in range(60)]
    whole = backend.logits(tokens)[-1]
    for slot, sizes in ((1, [1] * 60), (2, [7, 1, 30, 22])):
        start = 0
        for n in sizes:
            last = backend.logits(tokens[start : start + n], slot, start)[-1]
            start += n
        assert np.array_equal(last, whole)
    others = [rng.randrange(300) for _ in range(60)]
    for i in range(60):  # beside a story of another length
        together = backend._forward([others[i], tokens[i]], [0, 3], [59 - i, i], [0, 1])
    assert np.array_equal(together[1, : len(whole)], whole)


def tell(engine, seeds, tiny_config):
    """Stories of different seeds, prompts and settings, submitted at once; their tokens."""
    requests, ended = [], []
    for seed in seeds:
        rng = random.Random(seed)
        params = SamplingParams(
            max_tokens=rng.randint(20, 90), temperature=1.0, min_p=0.0, top_k=rng.choice([0, 30]), seed=seed
        )
        prompt = [1, *(rng.randrange(10, 300) for _ in range(rng.randint(1, 40)))]
        done = threading.Event()
        requests.append(Request(prompt, params, 1, lambda token: None, lambda reason, error, done=done: done.set()))
        ended.append(done)
    for request in requests:
        engine.submit(request)
    assert all(done.wait(60) for done in ended)
    return [request.generated for request in requests]


def test_stories_told_together_are_byte_identical_to_each_alone(tiny_config):
    """64 seeds over 16 slots; contexts slide, prompts and lengths differ."""
    backend = CpuBackend(tiny_config, numpy_weights(make_decoder(tiny_config)), n_slots=16)
    engine = Engine(backend, eos_id=2, n_slots=16)
    together = tell(engine, range(64), tiny_config)
    alone = [tell(engine, [seed], tiny_config)[0] for seed in range(64)]
    engine.close()
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 64


def test_the_token_picked_is_that_of_the_torch_sampler():
    rng = np.random.default_rng(0)
    for trial in range(600):
        logits_v = (rng.normal(size=200) * rng.choice([0.5, 2, 8])).astype(np.float32)
        if trial % 3 == 0:
            logits_v = np.round(logits_v) + np.float32(0)  # ties (and no negative zeros, which the heap puts last)
        params = SamplingParams(
            temperature=float(rng.choice([0, 0.3, 0.8, 2])),
            top_k=int(rng.choice([0, 1, 5, 40, 200, 1000])),
            top_p=float(rng.choice([0.1, 0.5, 0.9, 0.95, 1])),
            min_p=float(rng.choice([0, 0.02, 0.3, 1])),
        )
        noise = uniform_noise(trial, 5)
        settings = {name: [getattr(params, name)] for name in ("temperature", "top_k", "top_p", "min_p")}
        expected = sample(
            torch.from_numpy(logits_v)[None],
            torch.zeros(1, 200, dtype=torch.bool),
            **settings,
            repetition_penalty=[1.0],
            noise=[noise],
        )
        picked = pick(logits_v, params.temperature, params.top_k, params.top_p, params.min_p, noise)
        assert picked == expected.item(), params


def test_the_repetition_penalty_is_that_of_the_torch_sampler(tiny_config):
    """Stories with and without a penalty in one step, greedy, against penalised logits of the same backend."""
    backend = CpuBackend(tiny_config, numpy_weights(make_decoder(tiny_config)), n_slots=3)
    rng = random.Random(0)
    penalties, n_changed = [1.0, 1.3, 0.5], 0
    for _ in range(20):
        prompt = [rng.randrange(300) for _ in range(60)]
        feeds = []
        for slot, penalty in enumerate(penalties):
            params = SamplingParams(temperature=0, repetition_penalty=penalty, seed=1)
            feeds.append(Feed(Request(prompt, params, 1, print, print, slot=slot), prompt))
        seen_bv = torch.zeros(3, tiny_config.vocab_size, dtype=torch.bool)
        seen_bv[:, prompt] = True
        logits_bv = torch.from_numpy(backend.logits(prompt)[-1].copy()).expand(3, -1)
        expected = penalise_repetition(logits_bv, seen_bv, torch.tensor(penalties)).argmax(-1).tolist()
        assert backend.step(feeds) == expected
        n_changed += len(set(expected)) > 1
    assert n_changed > 5


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_weights_that_give_no_numbers_are_an_error_not_a_crash(tiny_config, tiny_decoder, temperature):
    weights = numpy_weights(tiny_decoder)
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    request = Request([1, 2], SamplingParams(temperature=temperature, seed=1), 1, print, print, slot=0)
    with pytest.raises(ModelError, match="no numbers"):
        CpuBackend(tiny_config, weights, n_slots=1).step([Feed(request, [1, 2])])


def test_a_logit_that_is_no_number_picks_nothing():
    logits_v = np.arange(10, dtype=np.float32)
    logits_v[3] = np.nan
    assert pick(logits_v, 1.0, 0, 1.0, 0.0, 0.5) == -1


def test_settings_in_whole_numbers_compile_nothing_anew(tiny_config, tiny_decoder):
    backend = CpuBackend(tiny_config, numpy_weights(tiny_decoder), n_slots=1)
    for params in (
        SamplingParams(seed=1),
        SamplingParams(temperature=0, top_p=1, min_p=0, repetition_penalty=1, seed=1),
    ):
        backend.step([Feed(Request([1, 2], params, 1, print, print, slot=0), [1, 2])])
        backend.step([Feed(Request([1, 2], params, 1, print, print, slot=0), [1], wants_next=False)])
    kinds = {str(signature) for signature in cpu_kernels.sample.signatures}
    assert len(kinds) == 1, kinds


def test_a_token_beyond_the_context_is_refused_before_it_is_written(tiny_config, tiny_decoder):
    backend = CpuBackend(tiny_config, numpy_weights(tiny_decoder), n_slots=1)
    request = Request([1] * 65, SamplingParams(seed=1), 1, print, print, slot=0, n_cached=64)
    with pytest.raises(IndexError):
        backend.step([Feed(request, [1])])


def test_a_padded_model_never_writes_a_token_without_text(tiny_config):
    decoder = make_decoder(tiny_config)
    backend = CpuBackend(tiny_config, numpy_weights(decoder), n_slots=1, n_ids=250)
    assert backend.logits([1]).shape == (1, 250)
    params = SamplingParams(max_tokens=50, temperature=5.0, top_p=1.0, min_p=0.0, seed=1)
    request, done = Request([1], params, 1, lambda token: None, lambda reason, error: done.set()), threading.Event()
    engine = Engine(backend, eos_id=-1, n_slots=1)
    engine.submit(request)
    assert done.wait(30) and len(request.generated) == 50 and max(request.generated) < 250
    engine.close()


def test_kernels_compile_where_no_cache_can_be_written(monkeypatch):
    """numba raises at once when neither the package's folder nor the user's cache is writable."""
    real = numba.njit

    def njit(*arguments, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*arguments, **options)

    monkeypatch.setattr(numba, "njit", njit)
    assert cpu_kernels.kernel(lambda x: x + 1)(2) == 3


def test_a_full_disk_does_not_end_stories(monkeypatch):
    """numba keeps what it compiled, and then raises for not having saved it: every first call would fail."""

    def save(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba.core.caching.FunctionCache, "save_overload", save)

    def twice(x):
        return 2 * x

    assert cpu_kernels.kernel(twice)(4) == 8


def test_telling_on_a_cpu_imports_no_torch(tiny_model):
    code = (
        "import sys\nfrom model.storyteller import Storyteller\n"
        f"with Storyteller.load({str(tiny_model)!r}, 'cpu') as s: s.tell('Ben', mode='opening').wait(60)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_full_sized_shape_also_agrees():
    """The default shape takes other vector paths than the tiny one."""
    config = ModelConfig(vocab_size=512, num_hidden_layers=2)
    decoder = make_decoder(config)
    backend = CpuBackend(config, numpy_weights(decoder), n_slots=1, int8=False)
    tokens = torch.randint(0, 512, (512,))
    with torch.inference_mode():
        expected = decoder(tokens.unsqueeze(0))[0, -1].numpy()
    last = backend.logits(tokens.tolist())[-1]
    np.testing.assert_allclose(last, expected, atol=1e-3 * np.abs(expected).max())


HOST = {name for name, there in llvmlite.binding.get_host_cpu_features().items() if there}
PROCESSORS = {
    "this": {},
    "AVX-VNNI": {"NUMBA_CPU_NAME": "alderlake", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+avxvnni"},
    "AVX2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"},
    "oldest": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
}
EXACT = """
import numba, numpy as np
from model.engine import cpu_kernels as kernels
rng = np.random.default_rng(0)
weights = rng.choice(np.array([0, 1, 127, 128, 129, 254, 255], np.uint8), (1, 2, 12, 64, 4))
x = rng.choice(np.array([-128, -127, -1, 0, 1, 126, 127], np.int8), (7, 48))
ones, offset = np.ones((1, 128), np.float32), (128 * x.astype(np.int32).sum(1)).astype(np.int32)
out = np.empty((7, 128), np.float32)
kernels.project(weights, ones, 0, x, np.ones(7, np.float32), offset, out)
matrix = weights.transpose(0, 1, 3, 2, 4).reshape(128, 48).astype(np.int64) - 128
assert np.array_equal(out, x.astype(np.int64) @ matrix.T)

@numba.njit
def there_and_back(values, room):
    for i in range(len(values)):
        room[i] = kernels.stored_as(room, values[i])
        values[i] = kernels.value_of(room[i])

some = rng.normal(size=2000) * 10.0 ** rng.integers(-8, 4, 2000)
some = np.concatenate([some, [0, -0.0, 1, 6e-8]]).astype(np.float32)
halves, back = np.empty(len(some), np.uint16), some.copy()
there_and_back(back, halves)
assert np.array_equal(halves, some.astype(np.float16).view(np.uint16)) and np.array_equal(back, some.astype(np.float16))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the processors are x86's")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_integer_sums_and_halves_are_exact_on_every_processor(processor, tmp_path):
    """Older ones lack the instructions; the code that stands in for them gives the same numbers."""
    wanted = {name.strip("+") for name in PROCESSORS[processor].get("NUMBA_CPU_FEATURES", "").split(",") if name}
    if not wanted <= HOST:
        pytest.skip("this machine has not the instructions")
    environment = {**os.environ, **PROCESSORS[processor], "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", EXACT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


LOGITS = """
import hashlib
from model.checkpoint import read_config, read_weights
from model.config import BUNDLED_WEIGHTS
from model.engine.cpu_backend import CpuBackend
config = read_config(BUNDLED_WEIGHTS)
backend = CpuBackend(config, read_weights(BUNDLED_WEIGHTS, config), n_slots=1)
print(hashlib.sha256(backend.logits(list(range(20, 140))).tobytes()).hexdigest())
"""


@pytest.mark.skipif(not {"avx2", "fma", "f16c"} <= HOST, reason="the processors are x86's")
def test_a_seed_means_a_story_in_every_process_and_on_every_processor_with_fma(tmp_path):
    """Compiled with fast mathematics a process that compiled the kernels told slightly other stories than one that took
    them from their cache: the order of sums depended on what a function had been compiled into."""
    found = {}
    for processor, state in (("this", "compiles"), ("this", "from the cache"), ("AVX2", "compiles")):
        environment = {**os.environ, **PROCESSORS[processor], "NUMBA_CACHE_DIR": str(tmp_path / processor)}
        done = subprocess.run(
            [sys.executable, "-c", LOGITS], env=environment, capture_output=True, text=True, timeout=180, check=True
        )
        found[processor, state] = done.stdout
    assert len(set(found.values())) == 1, found
