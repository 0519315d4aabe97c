"""Other programs that tell stories with the same weights, for `taleloom bench --peers`: one thread each.

A factory loads the weights once and returns `generate(n_rows)`, which gives the seconds for `n_rows` stories of
`n_tokens` tokens each, told at once from one prompt with Taleloom's default sampling. No story ends before its length.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.config import SamplingParams
from model.errors import ModelError, TaleloomError

INSTALL = "pip install 'taleloom[bench]'"


def transformers_generate(folder: Path, prompt: list[int], n_tokens: int) -> Callable[[int], float]:
    """`transformers`' generate in float32.

    Raises:
        TaleloomError: it is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise TaleloomError(f"To compare with transformers, install it: {INSTALL}") from error
    import torch

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
            min_new_tokens=n_tokens,
            max_new_tokens=n_tokens,
            repetition_penalty=params.repetition_penalty,
            **settings,
        )
        return time.perf_counter() - started_s

    return generate


def llama_cpp_generate(gguf_path: Path, prompt: list[int], n_tokens: int) -> Callable[[int], float]:
    """llama.cpp from a GGUF file, through its C interface: its Python wrapper would add work to every token.

    What it loads stays in memory until the process ends.

    Raises:
        TaleloomError: it is not installed.
        ModelError: it cannot open the file.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise TaleloomError(f"To compare with llama.cpp, install it (it compiles for minutes): {INSTALL}") from error
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)  # it prints what this level lets through
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(gguf_path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise ModelError(f"llama.cpp cannot open {gguf_path}. Write it again: taleloom export --format gguf")
    contexts: dict[int, Any] = {}
    seeds = itertools.count()

    def generate(n_rows: int) -> float:
        if n_rows not in contexts:
            contexts[n_rows] = _llama_context(llama_cpp, model, n_rows, len(prompt), n_tokens)
        context = contexts[n_rows]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        sampler = _llama_sampler(llama_cpp, next(seeds))
        batch = llama_cpp.llama_batch_init(n_rows * len(prompt), 0, 1)
        try:
            started_s = time.perf_counter()
            _llama_tell(llama_cpp, context, sampler, batch, prompt, n_rows, n_tokens)
            return time.perf_counter() - started_s
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_sampler_free(sampler)

    return generate


def _llama_context(llama_cpp: Any, model: Any, n_rows: int, n_prompt: int, n_tokens: int) -> Any:
    """A context for this many sequences at once, with the settings that were fastest on one thread."""
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = n_rows * (n_prompt + n_tokens)
    settings.n_seq_max = n_rows
    settings.n_batch = settings.n_ubatch = n_rows * n_prompt
    settings.n_threads = settings.n_threads_batch = 1
    settings.no_perf = True
    # 1.2 to 1.6 times as fast as the defaults (a float16 cache). A cache for all sequences together was slower for 16,
    # and sampling inside the graph was slower for one and for 16.
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_Q8_0
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:  # heads that are not made of whole blocks of 32
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F16
        context = llama_cpp.llama_init_from_model(model, settings)
    assert context, "llama.cpp refuses the context"
    return context


def _llama_sampler(llama_cpp: Any, seed: int) -> Any:
    """Our default sampling, the filters in our order (see sampling.py); one stream of noise for all rows."""
    params = SamplingParams()
    assert params.top_k == 0 and params.repetition_penalty == 1, "the chain has neither"
    settings = llama_cpp.llama_sampler_chain_default_params()
    settings.no_perf = True
    chain = llama_cpp.llama_sampler_chain_init(settings)
    for sampler in (
        llama_cpp.llama_sampler_init_temp(params.temperature),
        llama_cpp.llama_sampler_init_top_p(params.top_p, 1),
        llama_cpp.llama_sampler_init_min_p(params.min_p, 1),
        llama_cpp.llama_sampler_init_dist(seed),
    ):
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    return chain


def _llama_tell(
    llama_cpp: Any, context: Any, sampler: Any, batch: Any, prompt: list[int], n_rows: int, n_tokens: int
) -> list[list[int]]:
    """Write the stories; returns each row's new tokens."""
    n_prompt = len(prompt)
    for i in range(n_rows * n_prompt):
        batch.token[i], batch.pos[i] = prompt[i % n_prompt], i % n_prompt
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, i // n_prompt
        batch.logits[i] = i % n_prompt == n_prompt - 1
    batch.n_tokens = n_rows * n_prompt
    last = [(row + 1) * n_prompt - 1 for row in range(n_rows)]  # where in the batch each row's logits are
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    for step in range(n_tokens):
        failed = llama_cpp.llama_decode(context, batch)
        assert not failed, f"llama_decode returned {failed}"
        for row, i in zip(rows, last, strict=True):
            row.append(llama_cpp.llama_sampler_sample(sampler, context, i))
        last = list(range(n_rows))
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i] = row[-1], n_prompt + step
            batch.seq_id[i][0], batch.logits[i] = i, True
        batch.n_tokens = n_rows
    return rows
