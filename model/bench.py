"""How fast the engine writes: throughput, time to first token, load time, memory; on request beside other programs.

Absolute times depend on what else a machine does, so all that is compared runs in turn, and medians are compared.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.checkpoint import read_weights
from model.config import SamplingParams
from model.engine.engine import Engine
from model.engine.request import Request
from model.find import find_model
from model.storyteller import Storyteller

N_TOKENS = 200  # written by each stream
STREAMS = (1, 4, 16, 64)
PEER_STREAMS = (1, 16)
PROMPT_LENGTHS = (16, 128, 400)
N_ROUNDS = 5


def bench(model: str | None, device: str, peers: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure; `report` hears what is being done.

    Returns:
        device; load_s, until the first word; memory_mb, the process' peak after the first story and after 64 together;
        tokens_per_second by number of streams; first_token_ms by prompt length (engine time). On a CPU also
        fp32_tokens_per_second. With peers, theirs by name and streams, and the ratios of ours to theirs.

    Raises:
        ModelError: there is no such model.
        TaleloomError: a peer is not installed.
    """
    folder = find_model(model)
    started_s = time.perf_counter()
    storyteller = Storyteller.load(str(folder), device, n_slots=max(STREAMS))
    next(iter(storyteller.tell("Once upon a time, there was a", mode="opening")))
    results: dict[str, Any] = {"device": storyteller.device, "load_s": time.perf_counter() - started_s}
    storyteller.close()
    prompt = storyteller.tokenizer.encode_opening("Once upon a time, there was a")
    n_ids = storyteller.tokenizer.vocab_size
    engines = {"tokens_per_second": Engine(storyteller.backend, eos_id=-1, n_slots=max(STREAMS))}  # none ends early
    results["memory_mb"] = {}
    for n_streams in (1, 64):
        seconds_to_tell(engines["tokens_per_second"], [prompt] * n_streams, N_TOKENS)
        results["memory_mb"][n_streams] = _peak_memory_mb()
    if storyteller.device == "cpu":
        from model.engine.cpu_backend import CpuBackend

        weights = read_weights(folder, storyteller.config)
        exact = CpuBackend(storyteller.config, weights, max(STREAMS), n_ids, int8=False)
        engines["fp32_tokens_per_second"] = Engine(exact, eos_id=-1, n_slots=max(STREAMS))

    with tempfile.TemporaryDirectory() as temporary:
        others = _load_peers(folder, Path(temporary), prompt, report) if peers else {}
        figures: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        fresh = 0  # the token after the begin token, so that no prompt finds its beginning in the cache
        for number in range(N_ROUNDS):
            report(f"round {number + 1} of {N_ROUNDS} ...")
            for n_streams in STREAMS:
                for name, engine in engines.items():
                    fresh += 1
                    seconds = seconds_to_tell(engine, [[prompt[0], n_ids - fresh, *prompt[2:]]] * n_streams, N_TOKENS)
                    figures[name][n_streams].append(n_streams * N_TOKENS / seconds)
                if n_streams in PEER_STREAMS:
                    for name, generate in others.items():
                        figures[name][n_streams].append(n_streams * N_TOKENS / generate(n_streams))
            for n_prompt in PROMPT_LENGTHS:
                fresh += 1
                long_prompt = [prompt[0], n_ids - fresh, *(prompt * n_prompt)][:n_prompt]
                seconds = seconds_to_tell(engines["tokens_per_second"], [long_prompt], 1)
                figures["first_token_ms"][n_prompt].append(1e3 * seconds)
    for engine in engines.values():
        engine.close()
    for name, by_size in figures.items():
        results[name] = {size: statistics.median(values) for size, values in by_size.items()}
    for name in others:
        ours = "fp32_tokens_per_second" if name in ("llama.cpp f32", "llama.cpp f16") else "tokens_per_second"
        ratios = {n: results[ours][n] / results[name][n] for n in PEER_STREAMS}
        results[f"{'fp32' if ours.startswith('fp32') else 'ours'} / {name}"] = ratios
    return results


def _load_peers(
    folder: Path, temporary: Path, prompt: list[int], report: Callable[[str], None]
) -> dict[str, Callable[[int], float]]:
    """What to compare with, all with the same weights; ours in fp32 is compared with llama.cpp's, else in int8."""
    from model.hub.export import export_gguf
    from model.peers import llama_cpp_generate, transformers_generate

    report("loading transformers and llama.cpp ...")
    peers = {"transformers": transformers_generate(folder, prompt, N_TOKENS)}
    for kind in ("f32", "f16", "q8_0"):
        export_gguf(folder, temporary / f"{kind}.gguf", kind)
        peers[f"llama.cpp {kind}"] = llama_cpp_generate(temporary / f"{kind}.gguf", prompt, N_TOKENS)
    return peers


def seconds_to_tell(engine: Engine, prompts: list[list[int]], max_tokens: int) -> float:
    """Seconds until stories from all the prompts, submitted at once, have ended."""
    ended = threading.Semaphore(0)
    requests = [
        Request(prompt, SamplingParams(max_tokens=max_tokens, seed=i), 1, lambda _: None, lambda *_: ended.release())
        for i, prompt in enumerate(prompts)
    ]
    started_s = time.perf_counter()
    for request in requests:
        engine.submit(request)
    for _ in requests:
        ended.acquire()
    return time.perf_counter() - started_s


def _peak_memory_mb() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
