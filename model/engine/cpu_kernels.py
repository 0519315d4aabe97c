"""The decoder's forward pass on a CPU, compiled by numba. All kernels are here: numba's cache watches a single file.

Every token is computed by the same instructions in the same order whoever shares the call, so neither other stories nor
the way a prompt is cut into chunks change a single bit. Letters as in model/decoder.py, and n token (of any story).
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

# Sums may be reordered (once, when compiled) so that they vectorise; not-a-number and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}


def kernel(function: Any) -> Any:
    """Compile without the interpreter lock; cached on disk where a folder can be written."""
    try:
        return numba.njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")(function)
    except RuntimeError:  # neither the package's folder nor the user's cache is writable
        return numba.njit(nogil=True, fastmath=FAST, error_model="numpy")(function)


@kernel
def dot(a: Any, b: Any) -> Any:
    total = np.float32(0.0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@kernel
def project(weight_ij: Any, scale_i: Any, x_nj: Any, out_ni: Any) -> None:
    """out = x Wᵀ for weights stored as int8 (times a scale per row) or as float32 (scales of 1)."""
    row_j = np.empty(weight_ij.shape[1], np.float32)
    for i in range(weight_ij.shape[0]):
        for j in range(weight_ij.shape[1]):
            row_j[j] = weight_ij[i, j]
        for n in range(x_nj.shape[0]):
            out_ni[n, i] = dot(row_j, x_nj[n]) * scale_i[i]


@kernel
def normalise(x_nd: Any, gain_d: Any, eps: Any, out_nd: Any) -> None:
    """RMSNorm."""
    for n in range(x_nd.shape[0]):
        rms = math.sqrt(dot(x_nd[n], x_nd[n]) / np.float32(x_nd.shape[1]) + eps)
        for d in range(x_nd.shape[1]):
            out_nd[n, d] = x_nd[n, d] / rms * gain_d[d]


@kernel
def rotate(x_k: Any, cos_k: Any, sin_k: Any) -> None:
    """Rotary position, half-split layout, in place."""
    half = x_k.shape[0] // 2
    for i in range(half):
        first, second = x_k[i], x_k[i + half]
        x_k[i] = first * cos_k[i] - second * sin_k[i]
        x_k[i + half] = second * cos_k[i] + first * sin_k[i]


@kernel
def attend(q_k: Any, keys_sk: Any, values_sk: Any, scores_s: Any, out_k: Any) -> None:
    """One head of one token over the filled part of its row."""
    scale = np.float32(1.0 / math.sqrt(q_k.shape[0]))
    largest = np.float32(-np.inf)
    for s in range(keys_sk.shape[0]):
        scores_s[s] = dot(q_k, keys_sk[s]) * scale
        largest = max(largest, scores_s[s])
    total = np.float32(0.0)
    for s in range(keys_sk.shape[0]):
        scores_s[s] = math.exp(scores_s[s] - largest)
        total += scores_s[s]
    out_k[:] = 0.0
    for s in range(keys_sk.shape[0]):
        share = scores_s[s] / total
        for k in range(out_k.shape[0]):
            out_k[k] += share * values_sk[s, k]


@kernel
def forward(
    tokens_n: Any,  # ids
    slots_n: Any,  # whose row of the cache each token belongs to
    positions_n: Any,  # where it stands there; tokens of one story in ascending order
    last_m: Any,  # indices n of the tokens whose logits are wanted
    keys: Any,  # cache [layer, slot, g, s, k]
    values: Any,
    embed_vd: Any,
    embed_scale_v: Any,
    head_vd: Any,
    head_scale_v: Any,
    qkv_lid: Any,  # per layer: queries, keys and values below each other
    qkv_scale_li: Any,
    out_ldi: Any,
    out_scale_ld: Any,
    gate_up_lfd: Any,  # gate above up
    gate_up_scale_lf: Any,
    down_ldf: Any,
    down_scale_ld: Any,
    attention_gain_ld: Any,
    mlp_gain_ld: Any,
    final_gain_d: Any,
    eps: Any,
    cos_sk: Any,
    sin_sk: Any,
) -> Any:
    """Run the tokens through every layer, keep their keys and values, and return logits [m, v] (float32)."""
    n_tokens, width = tokens_n.shape[0], embed_vd.shape[1]
    n_groups, head_dim = keys.shape[2], keys.shape[4]
    n_heads = out_ldi.shape[2] // head_dim
    n_f = down_ldf.shape[2]
    x_nd = np.empty((n_tokens, width), np.float32)
    y_nd = np.empty((n_tokens, width), np.float32)
    qkv_ni = np.empty((n_tokens, qkv_lid.shape[1]), np.float32)
    heads_ni = np.empty((n_tokens, n_heads * head_dim), np.float32)
    gate_up_nf = np.empty((n_tokens, 2 * n_f), np.float32)
    mlp_nf = np.empty((n_tokens, n_f), np.float32)
    scores_s = np.empty(keys.shape[3], np.float32)

    for n in range(n_tokens):
        for d in range(width):
            x_nd[n, d] = embed_vd[tokens_n[n], d] * embed_scale_v[tokens_n[n]]
    for layer in range(qkv_lid.shape[0]):
        normalise(x_nd, attention_gain_ld[layer], eps, y_nd)
        project(qkv_lid[layer], qkv_scale_li[layer], y_nd, qkv_ni)
        for n in range(n_tokens):
            position, slot = positions_n[n], slots_n[n]
            for head in range(n_heads + n_groups):
                part_k = qkv_ni[n, head * head_dim : (head + 1) * head_dim]
                rotate(part_k, cos_sk[position], sin_sk[position])
            for group in range(n_groups):
                start = (n_heads + group) * head_dim
                keys[layer, slot, group, position] = qkv_ni[n, start : start + head_dim]
                start += n_groups * head_dim
                values[layer, slot, group, position] = qkv_ni[n, start : start + head_dim]
        for n in range(n_tokens):
            filled = positions_n[n] + 1
            for head in range(n_heads):
                group = head * n_groups // n_heads
                attend(
                    qkv_ni[n, head * head_dim : (head + 1) * head_dim],
                    keys[layer, slots_n[n], group, :filled],
                    values[layer, slots_n[n], group, :filled],
                    scores_s,
                    heads_ni[n, head * head_dim : (head + 1) * head_dim],
                )
        project(out_ldi[layer], out_scale_ld[layer], heads_ni, y_nd)
        for n in range(n_tokens):
            for d in range(width):
                x_nd[n, d] += y_nd[n, d]
        normalise(x_nd, mlp_gain_ld[layer], eps, y_nd)
        project(gate_up_lfd[layer], gate_up_scale_lf[layer], y_nd, gate_up_nf)
        for n in range(n_tokens):
            for f in range(n_f):
                gate = gate_up_nf[n, f]
                mlp_nf[n, f] = gate / (np.float32(1.0) + math.exp(-gate)) * gate_up_nf[n, n_f + f]
        project(down_ldf[layer], down_scale_ld[layer], mlp_nf, y_nd)
        for n in range(n_tokens):
            for d in range(width):
                x_nd[n, d] += y_nd[n, d]
    last_md = np.empty((last_m.shape[0], width), np.float32)
    for m in range(last_m.shape[0]):
        last_md[m] = x_nd[last_m[m]]
    normal_md = np.empty_like(last_md)
    normalise(last_md, final_gain_d, eps, normal_md)
    logits_mv = np.empty((last_m.shape[0], head_vd.shape[0]), np.float32)
    project(head_vd, head_scale_v, normal_md, logits_mv)
    return logits_mv
