"""Runs the decoder for the engine on a CPU, without torch: weights in int8, kernels compiled by numba.

Quantisation, done at load: each row of a matrix (one output) is stored as int8 times one float32 scale, the row's
largest magnitude over 127, rounded to nearest even. Gains, activations, the KV cache and all sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from model.checkpoint import weight_files
from model.config import ModelConfig, SamplingParams
from model.engine.cpu_kernels import forward
from model.engine.request import Request
from model.errors import ModelError

NUMPY_TYPES: dict[str, Any] = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16}


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 rows and their float32 scales; a float32 matrix [..., i, j] is about their product."""
    scale = (np.abs(weight).max(-1) / 127).astype(np.float32)
    scale[scale == 0] = 1
    return np.rint(weight / scale[..., None]).astype(np.int8), scale


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """All weights of a model folder as float32, by name; raises ModelError when they are missing or damaged."""
    weights = {}
    for file in weight_files(folder):
        try:
            tensors = safetensors.deserialize(file.read_bytes())
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged or incomplete ({error}). Download it again.") from error
        for name, tensor in tensors:
            if (kind := tensor["dtype"]) not in NUMPY_TYPES:
                raise ModelError(f"{file} holds {name} as {kind}. Taleloom reads {', '.join(NUMPY_TYPES)}.")
            weight = np.frombuffer(tensor["data"], NUMPY_TYPES[kind]).reshape(tensor["shape"])
            if kind == "BF16":  # the upper half of a float32, which numpy has no type for
                weight = (weight.astype(np.uint32) << 16).view(np.float32)
            weights[name] = weight.astype(np.float32)
    return weights


def pack_weights(config: ModelConfig, weights: dict[str, np.ndarray], int8: bool) -> tuple[Any, ...]:
    """The weights as the kernel takes them, layers stacked, queries/keys/values and gate/up joined.

    Raises:
        ModelError: a weight is missing or has another shape than config.json says.
    """
    d, f, k = config.hidden_size, config.intermediate_size, config.head_dim
    n_q, n_kv = config.num_attention_heads * k, config.num_key_value_heads * k
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= {"self_attn.q_proj": (n_q, d), "self_attn.k_proj": (n_kv, d), "self_attn.v_proj": (n_kv, d)}
    shapes |= {"self_attn.o_proj": (d, n_q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    shapes |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        weight = weights.get(f"{name}.weight")
        if weight is None or weight.shape != shape:
            found = "missing" if weight is None else f"of shape {weight.shape}"
            raise ModelError(f"The weights do not match config.json: {name} should be {shape} and is {found}.")
        return weight

    def stack(*names: str) -> np.ndarray:
        layers = range(config.num_hidden_layers)
        return np.stack([np.concatenate([take(f"model.layers.{i}.{n}", shapes[n]) for n in names]) for i in layers])

    def store(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return quantise(weight) if int8 else (weight, np.ones(weight.shape[:-1], np.float32))

    embed = store(take("model.embed_tokens", (config.vocab_size, d)))
    head = embed if config.tie_word_embeddings else store(take("lm_head", (config.vocab_size, d)))
    inverse_frequency = config.rope_theta ** (-np.arange(0, k, 2) / k)
    angles_sk = np.outer(np.arange(config.max_position_embeddings), inverse_frequency)
    return (
        *embed,
        *head,
        *store(stack("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        *store(stack("self_attn.o_proj")),
        *store(stack("mlp.gate_proj", "mlp.up_proj")),
        *store(stack("mlp.down_proj")),
        stack("input_layernorm"),
        stack("post_attention_layernorm"),
        take("model.norm", (d,)),
        np.float32(config.rms_norm_eps),
        np.cos(angles_sk).astype(np.float32),
        np.sin(angles_sk).astype(np.float32),
    )


def pick_token(logits_v: np.ndarray, seen_v: np.ndarray, params: SamplingParams, noise: float) -> int:
    """model.sampling.sample for one row in numpy: the same token, without sorting what min-p leaves out anyway."""
    logits_v = logits_v.astype(np.float64)
    if params.repetition_penalty != 1:
        penalty = params.repetition_penalty
        logits_v[seen_v] = np.where(logits_v[seen_v] > 0, logits_v[seen_v] / penalty, logits_v[seen_v] * penalty)
    if params.temperature == 0:
        return int(logits_v.argmax())
    weights_v = np.exp((logits_v - logits_v.max()) / params.temperature)  # the likeliest token has weight 1
    least = params.min_p * (1 - 1e-9)
    if 0 < params.top_k < len(weights_v):
        least = max(least, np.partition(weights_v, -params.top_k)[-params.top_k])
    candidates = np.flatnonzero(weights_v >= least)
    candidates = candidates[np.argsort(-logits_v[candidates], kind="stable")]
    total = weights_v.sum()
    if params.top_k:
        candidates = candidates[: params.top_k]
        if params.top_k < len(weights_v):
            # min-p may have left out some of the k: they count in the total that top-p is a share of.
            total = np.partition(weights_v, -params.top_k)[-params.top_k :].sum()
    probabilities = weights_v[candidates] / total
    keep = (probabilities.cumsum() - probabilities < params.top_p) | (params.top_p >= 1)
    keep &= probabilities >= params.min_p * probabilities[0]
    keep[0] = True
    cumulative = probabilities[keep].cumsum()
    place = np.searchsorted(cumulative, noise * cumulative[-1], side="right")
    return int(candidates[keep][min(place, keep.sum() - 1)])


class CpuBackend:
    """Cache and forward passes for `n_slots` stories; a story is the same to the bit whoever shares its steps."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, np.ndarray],
        n_slots: int,
        n_ids: int | None = None,
        int8: bool = True,
    ):
        self.context = config.max_position_embeddings
        self._n_ids = n_ids or config.vocab_size  # tokens that stand for text; some models are padded beyond them
        self._weights = pack_weights(config, weights, int8)
        shape = (config.num_hidden_layers, n_slots, config.num_key_value_heads, self.context, config.head_dim)
        self._keys, self._values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        # For the repetition penalty: which tokens stand in each slot's story.
        self._seen_bv = np.zeros((n_slots, self._n_ids), np.bool_)
        self._forward([0], [0], [0], [0])  # compiles the kernels, or takes them from their cache

    def _forward(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], last: Sequence[int]
    ) -> np.ndarray:
        arrays = (np.array(numbers, np.int64) for numbers in (tokens, slots, positions, last))
        return forward(*arrays, self._keys, self._values, *self._weights)[:, : self._n_ids]

    def prefill(self, request: Request, tokens: Sequence[int], start: int) -> np.ndarray:
        """Read `tokens` into the request's slot from position `start`; returns logits [1, v] after the last."""
        assert request.slot is not None
        if start == 0:
            self._seen_bv[request.slot] = False
        self._seen_bv[request.slot, tokens] = True
        n = len(tokens)
        return self._forward(tokens, [request.slot] * n, range(start, start + n), [n - 1])

    def decode(self, requests: Sequence[Request]) -> np.ndarray:
        """One step for stories that lack only their newest token in the cache; returns logits [b, v]."""
        tokens = [request.generated[-1] for request in requests]
        slots = [request.slot for request in requests if request.slot is not None]
        assert len(slots) == len(tokens), "the kernels do not check bounds"
        self._seen_bv[slots, tokens] = True
        return self._forward(tokens, slots, [request.n_cached for request in requests], range(len(requests)))

    def sample(self, requests: Sequence[Request], logits_bv: np.ndarray) -> list[int]:
        """The next token of each request, by its own settings and noise."""
        slots = [request.slot for request in requests if request.slot is not None]
        return [
            pick_token(logits_v, self._seen_bv[slot], request.params, request.noise)
            for request, slot, logits_v in zip(requests, slots, logits_bv, strict=True)
        ]
