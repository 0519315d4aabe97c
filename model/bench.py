"""How fast the engine writes: throughput, time to first token, load time, memory; on request beside `transformers`.

Absolute times depend on what else a machine does, so peers run in turn with us, and medians are compared.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.config import SamplingParams
from model.engine.engine import Engine
from model.engine.request import Request
from model.storyteller import Storyteller, find_model

N_TOKENS = 200  # written by each stream
STREAMS = (1, 4, 16, 64)
PROMPT_LENGTHS = (16, 128, 400)
N_ROUNDS = 5


def bench(model: str | None, device: str, peers: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure; `report` hears what is being done.

    Returns:
        load_s; tokens_per_second by number of streams, first_token_ms by prompt length (medians); peak_memory_mb; with
        peers also transformers_tokens_per_second for 1 and 16 rows, and the ratios.
    """
    started_s = time.perf_counter()
    storyteller = Storyteller.load(model, device, n_slots=max(STREAMS))
    results: dict[str, Any] = {"load_s": time.perf_counter() - started_s, "device": storyteller.device}
    storyteller.close()
    engine = Engine(storyteller.backend, eos_id=-1, n_slots=max(STREAMS))  # no story ends before its length
    prompt = storyteller.tokenizer.encode_opening("Once upon a time, there was a")
    hf = _transformers_generate(find_model(model), prompt) if peers else None

    speeds: dict[str, list[float]] = {}
    for number in range(N_ROUNDS):
        report(f"round {number + 1} of {N_ROUNDS} ...")
        for n_streams in STREAMS:
            seconds = _tell(engine, [prompt] * n_streams, N_TOKENS)
            speeds.setdefault(f"{n_streams}", []).append(n_streams * N_TOKENS / seconds)
            if hf and n_streams in (1, 16):
                speeds.setdefault(f"transformers {n_streams}", []).append(n_streams * N_TOKENS / hf(n_streams))
        for n_prompt in PROMPT_LENGTHS:
            long_prompt = (prompt * n_prompt)[:n_prompt]
            speeds.setdefault(f"first {n_prompt}", []).append(1e3 * _tell(engine, [long_prompt], 1))
    engine.close()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    results["tokens_per_second"] = {n: medians[f"{n}"] for n in STREAMS}
    results["first_token_ms"] = {n: medians[f"first {n}"] for n in PROMPT_LENGTHS}
    if hf:
        results["transformers_tokens_per_second"] = {n: medians[f"transformers {n}"] for n in (1, 16)}
        results["times_transformers"] = {n: medians[f"{n}"] / medians[f"transformers {n}"] for n in (1, 16)}
    else:
        results["peak_memory_mb"] = _peak_memory_mb()
    return results


def _tell(engine: Engine, prompts: list[list[int]], max_tokens: int) -> float:
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


def _transformers_generate(folder: Path, prompt: list[int]) -> Callable[[int], float]:
    """A function that gives the seconds `transformers` takes for n rows, with our sampling settings, on one thread."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    params = SamplingParams()
    settings = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}

    def generate(n_rows: int) -> float:
        inputs_bt = torch.tensor([prompt] * n_rows)
        started_s = time.perf_counter()
        model.generate(
            inputs_bt,
            attention_mask=torch.ones_like(inputs_bt),
            do_sample=True,
            min_new_tokens=N_TOKENS,
            max_new_tokens=N_TOKENS,
            repetition_penalty=params.repetition_penalty,
            **settings,
        )
        return time.perf_counter() - started_s

    return generate


def _peak_memory_mb() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
