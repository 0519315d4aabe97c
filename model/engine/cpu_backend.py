"""Runs the decoder for the engine on a CPU, without torch: weights in int8, kernels compiled by numba.

Quantisation: at load each row of a matrix (one output) becomes int8 times one float32 scale, the row's largest
magnitude over 127, rounded to nearest even; at each product a token's activations become int8 likewise, with one scale
a token. Products are summed in int32, keys and values kept in float16; everything between is float32. At full
precision (int8=False) nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from model.config import ModelConfig, SamplingParams
from model.engine.cpu_kernels import PANEL, forward, sample
from model.engine.request import Feed, Request
from model.errors import ModelError


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 rows and their float32 scales; a float32 matrix [..., i, j] is about their product."""
    scale = (np.abs(weight).max(-1) / 127).astype(np.float32)
    scale[scale == 0] = 1
    return np.rint(weight / scale[..., None]).astype(np.int8), scale


def pad(weight_lij: np.ndarray) -> np.ndarray:
    """Zeros up to whole panels, in both directions."""
    rows, columns = (-size % PANEL for size in weight_lij.shape[-2:])
    return np.pad(weight_lij, ((0, 0), (0, rows), (0, columns)))


def pack(weight_lij: np.ndarray, int8: bool) -> tuple[np.ndarray, np.ndarray]:
    """A padded matrix of every layer as the kernels read it (see cpu_kernels), and the scales of its rows [l, i]."""
    layers, rows, columns = weight_lij.shape
    scale_li = np.ones((layers, rows), np.float32)
    quad = 1
    if int8:
        rounded, scale_li = quantise(weight_lij)
        weight_lij, quad = rounded.view(np.uint8) ^ np.uint8(128), 4
    elif np.array_equal(half := weight_lij.astype(np.float16), weight_lij):
        weight_lij = half.view(np.uint16)  # nothing is lost, and half as much is read at each step
    panels = weight_lij.reshape(layers, rows // PANEL, PANEL, columns // quad, quad)
    return np.ascontiguousarray(panels.transpose(0, 1, 3, 2, 4)), scale_li


def pack_weights(config: ModelConfig, weights: dict[str, np.ndarray], int8: bool) -> tuple[Any, ...]:
    """The weights as the kernel takes them, layers stacked, queries/keys/values and gate/up joined."""

    def store(*parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return pack(np.concatenate([pad(part) for part in parts], -2), int8)

    def stack(name: str) -> np.ndarray:
        return np.stack([weights[f"model.layers.{i}.{name}.weight"] for i in range(config.num_hidden_layers)])

    embed = store(weights["model.embed_tokens.weight"][None])
    head = embed if config.tie_word_embeddings else store(weights["lm_head.weight"][None])
    inverse_frequency = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    angles_sk = np.outer(np.arange(config.max_position_embeddings), inverse_frequency)
    qkv = np.concatenate([stack(f"self_attn.{name}_proj") for name in "qkv"], -2)
    return (
        config.num_attention_heads,
        *embed,
        *head,
        *store(qkv),
        *store(stack("self_attn.o_proj")),
        *store(stack("mlp.gate_proj"), stack("mlp.up_proj")),
        *store(stack("mlp.down_proj")),
        stack("input_layernorm"),
        stack("post_attention_layernorm"),
        weights["model.norm.weight"],
        np.float32(config.rms_norm_eps),
        np.cos(angles_sk).astype(np.float32),
        np.sin(angles_sk).astype(np.float32),
        np.empty(0, np.int8 if int8 else np.float32),
        np.empty(0, np.int32 if int8 else np.float32),
    )


class CpuBackend:
    """Cache and forward passes for `n_slots` stories; a story is the same to the bit whoever shares its steps."""

    prefill_tokens = 128  # read in one step, some 5 ms: nobody's next word waits longer for another's prompt

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
        rows = (n_slots, config.num_hidden_layers, config.num_key_value_heads)
        kind = np.uint16 if int8 else np.float32  # float16, which numba has no type for
        self._keys = np.zeros((*rows, -(-self.context // PANEL), config.head_dim, PANEL), kind)
        self._values = np.zeros((*rows, self.context, -(-config.head_dim // 32) * 32), kind)

    def warm_up(self) -> None:
        """Compile the kernels, or take them from their cache."""
        self.step([Feed(Request([0], SamplingParams(seed=0), 0, lambda _: None, lambda *_: None, slot=0), [0])])

    def _forward(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], last: Sequence[int]
    ) -> np.ndarray:
        arrays = (np.array(numbers, np.int64) for numbers in (tokens, slots, positions, last))
        return forward(*arrays, self._keys, self._values, *self._weights)

    def logits(self, tokens: Sequence[int], slot: int = 0, start: int = 0) -> np.ndarray:
        """Read tokens into a slot from position `start` on; returns the logits [n, v] after each."""
        n = len(tokens)
        return self._forward(tokens, [slot] * n, range(start, start + n), range(n))[:, : self._n_ids]

    def step(self, feeds: Sequence[Feed]) -> list[int]:
        """Read each story's tokens into its slot; returns the next token of those that want one, in order.

        Raises:
            ModelError: the weights give no numbers.
        """
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for feed in feeds:
            start, slot = feed.request.n_cached, feed.request.slot
            if slot is None or start + len(feed.tokens) > self.context:
                raise IndexError("a token beyond the context")  # no assert: the kernels would write out of bounds
            tokens.extend(feed.tokens)
            slots.extend([slot] * len(feed.tokens))
            positions.extend(range(start, start + len(feed.tokens)))
            if feed.wants_next:
                last.append(len(tokens) - 1)
        requests = [feed.request for feed in feeds if feed.wants_next]
        params = [request.params for request in requests]
        seen_ids: list[int] = []
        seen_ends = []
        for request in requests:
            if request.params.repetition_penalty != 1:
                seen_ids.extend(set(request.window))
            seen_ends.append(len(seen_ids))
        next_tokens = sample(
            self._forward(tokens, slots, positions, last),
            self._n_ids,
            np.array(seen_ids, np.int64),
            np.array(seen_ends, np.int64),
            np.array([p.repetition_penalty for p in params], np.float64),
            np.array([p.temperature for p in params], np.float64),
            np.array([p.top_k for p in params], np.int64),
            np.array([p.top_p for p in params], np.float64),
            np.array([p.min_p for p in params], np.float64),
            np.array([request.noise for request in requests], np.float64),
        ).tolist()
        if -1 in next_tokens:
            raise ModelError(
                "The model's weights give no numbers: they are damaged, or were never trained. Choose another."
            )
        return next_tokens
