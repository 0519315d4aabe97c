"""The decoder's forward pass and the sampler on a CPU, compiled by numba, at int8 or float32 precision.

All kernels are here: numba's cache watches a single file. Every product of a matrix with activations, attention's
included, is one `tile`. Integer sums are exact, and float sums run in an order that is written down here: nothing is
compiled with fast mathematics, which would let the order depend on what a function is compiled into. So neither other
stories nor the way a prompt is cut into chunks changes a bit, nor whether kernels come from their cache.

Letters as in model/decoder.py, and n token (of any story), i and j a matrix's output and input. Matrices are stored in
panels of 64 outputs, [layer, panel, step, 64, quad]: a step is one input (float32) or four neighbouring ones (int8, as
unsigned bytes 128 above the weight), so that one broadcast of activations meets 64 outputs in a row. Inputs and outputs
are padded to a multiple of 64 with zeros.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

PANEL = 64  # outputs that are computed together
LANES = 16  # of them in one vector, whatever the machine's own width is
I8, I16, I32, F16, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


def kernel(function: Any) -> Any:
    """Compile without the interpreter lock; cached on disk where and while that can be written."""
    options: Any = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache is writable
        return numba.njit(**options)(function)
    save = compiled._cache.save_overload

    def save_if_possible(*arguments: Any) -> None:
        with contextlib.suppress(OSError):  # the disk is full: compiled it is all the same
            save(*arguments)

    compiled._cache.save_overload = save_if_possible
    return compiled


def instructions(generate: Any) -> Any:
    """A function of the kernels that is written in LLVM's own instructions. (Callers leave out the typing context.)"""
    return intrinsic(prefer_literal=True)(generate)


def _features(context: Any) -> list[str]:
    """What the processor can do, as LLVM names it."""
    return context.codegen().magic_tuple()[2].split(",")


def _lanes(builder: Any, vector: Any, first: int, count: int) -> Any:
    """A part of a vector."""
    return builder.shuffle_vector(
        vector, vector, ir.Constant(ir.VectorType(I32, count), list(range(first, first + count)))
    )


def _dot4(context: Any, builder: Any, total: Any, weights: Any, x: Any) -> Any:
    """total + per 32-bit lane the sum of four products of an unsigned with a signed byte, all exact."""
    features = _features(context)
    if "+avx512vnni" in features:
        return _dot4_vnni(builder, total, weights, x)
    if "+avxvnni" in features or "+avx2" in features:
        function = _dot4_vnni if "+avxvnni" in features else _dot4_avx2
        halves = [function(builder, *(_lanes(builder, v, i, 8) for v in (total, weights, x))) for i in (0, 8)]
        return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, LANES), list(range(LANES))))
    for shift in (24, 16, 8, 0):
        left, right = (ir.Constant(total.type, [n] * LANES) for n in (shift, 24))
        w, signed = builder.lshr(builder.shl(weights, left), right), builder.ashr(builder.shl(x, left), right)
        total = builder.add(total, builder.mul(w, signed))
    return total


def _dot4_vnni(builder: Any, total: Any, weights: Any, x: Any) -> Any:
    bytes_ = ir.VectorType(I8, 4 * total.type.count)
    signature = ir.FunctionType(total.type, [total.type, bytes_, bytes_])
    name = f"llvm.x86.avx512.vpdpbusd.{32 * total.type.count}"
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, [total, builder.bitcast(weights, bytes_), builder.bitcast(x, bytes_)])


def _dot4_avx2(builder: Any, total: Any, weights: Any, x: Any) -> Any:
    """Even and odd bytes as 16-bit pairs, which one instruction multiplies and adds."""
    pairs = ir.VectorType(I16, 2 * total.type.count)
    eight = ir.Constant(pairs, [8] * pairs.count)
    w, x = builder.bitcast(weights, pairs), builder.bitcast(x, pairs)
    signature = ir.FunctionType(total.type, [pairs, pairs])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.x86.avx2.pmadd.wd")
    even = builder.and_(w, ir.Constant(pairs, [255] * pairs.count)), builder.ashr(builder.shl(x, eight), eight)
    odd = builder.lshr(w, eight), builder.ashr(x, eight)
    for factors in (even, odd):
        total = builder.add(total, builder.call(function, factors))
    return total


def _widen(context: Any, builder: Any, bits: Any) -> Any:
    """float16 bits to float32, one or a vector of them."""
    count = getattr(bits.type, "count", None)
    half, wide, integer = (ir.VectorType(kind, count) if count else kind for kind in (F16, F32, I32))
    if "+f16c" in _features(context) or "x86" not in context.codegen().magic_tuple()[0]:
        return builder.fpext(builder.bitcast(bits, half), wide)

    def constant(kind: Any, value: Any) -> Any:
        return ir.Constant(kind, [value] * count if count else value)

    # Without the instruction LLVM would call a function that is not there. Shifted into a float32's place the bits
    # stand for the value times 2 to the -112, subnormal ones too.
    bits = builder.zext(bits, integer)
    sign = builder.shl(builder.and_(bits, constant(integer, 0x8000)), constant(integer, 16))
    rest = builder.shl(builder.and_(bits, constant(integer, 0x7FFF)), constant(integer, 13))
    value = builder.fmul(builder.bitcast(rest, wide), constant(wide, 2.0**112))
    return builder.bitcast(builder.or_(builder.bitcast(value, integer), sign), wide)


def _narrow(context: Any, builder: Any, value: Any) -> Any:
    """A float32 to the nearest float16's bits."""
    if "+f16c" in _features(context) or "x86" not in context.codegen().magic_tuple()[0]:
        return builder.bitcast(builder.fptrunc(value, F16), I16)
    bits = builder.bitcast(value, I32)
    sign = builder.lshr(builder.and_(bits, I32(0x80000000)), I32(16))
    shrunk = builder.fmul(builder.bitcast(builder.and_(bits, I32(0x7FFFFFFF)), F32), ir.Constant(F32, 2.0**-112))
    rest = builder.bitcast(shrunk, I32)
    to_even = builder.add(I32(0xFFF), builder.and_(builder.lshr(rest, I32(13)), I32(1)))
    rest = builder.lshr(builder.add(rest, to_even), I32(13))
    return builder.trunc(builder.or_(rest, sign), I16)


def _multiply_add(context: Any, builder: Any, total: Any, weights: Any, x: Any) -> Any:
    """Rounded once where the processor can; never left to the compiler's choice."""
    vector = ir.VectorType(F32, LANES)
    features = _features(context)
    if "+fma" not in features and "x86" in context.codegen().magic_tuple()[0]:
        return builder.fadd(total, builder.fmul(weights, x))
    function = ir.FunctionType(vector, [vector] * 3)
    function = cgutils.get_or_insert_function(builder.module, function, f"llvm.fma.v{LANES}f32")
    return builder.call(function, [weights, x, total])


@instructions
def tile(
    typingctx: Any,
    n_rows: Any,
    n_blocks: Any,
    n_steps: Any,
    weights: Any,
    weights_start: Any,
    weights_stride: Any,
    x: Any,
    x_start: Any,
    x_stride: Any,
    out: Any,
    out_start: Any,
    out_stride: Any,
) -> Any:
    """out[r, 0:16 n_blocks] = sum over steps of weights[step, 0:16 n_blocks] x[r, step], for n_rows rows of x.

    Arrays are contiguous, starts and strides count elements; the sums stay in registers. uint8 weights take int8 x,
    four to a step, and give int32; float32 and uint16 (the bits of a float16) take float32 and give float32. `n_rows`
    and `n_blocks` are literals.
    """
    rows, blocks = n_rows.literal_value, n_blocks.literal_value
    is_int = weights.dtype == types.uint8
    quad = 4 if is_int else 1
    element = I32 if is_int else F32
    vector = ir.VectorType(element, LANES)
    multiply = _dot4 if is_int else _multiply_add
    arguments = (n_rows, n_blocks, n_steps, weights, weights_start, weights_stride, x, x_start, x_stride, out)
    signature = types.void(*arguments, out_start, out_stride)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, n_steps, *operands = args
        n_steps = context.cast(builder, n_steps, signature.args[2], types.intp)

        def pointer(i: int) -> tuple[Any, Any]:
            """Where operand i starts, and its stride."""
            array = context.make_array(signature.args[3 + i])(context, builder, operands[i])
            start, stride = (
                context.cast(builder, operands[k], signature.args[3 + k], types.intp) for k in (i + 1, i + 2)
            )
            return builder.gep(array.data, [start]), stride

        def at(base: Any, index: Any, kind: Any) -> Any:
            return builder.bitcast(builder.gep(base, [index]), kind.as_pointer())

        weights_at, weights_step = pointer(0)
        x_at, x_row = pointer(3)
        out_at, out_row = pointer(6)
        intp = x_row.type
        stored = ir.VectorType(I16, LANES) if weights.dtype == types.uint16 else vector

        def add_up(its_rows: range, its_blocks: range) -> None:
            totals = {(row, block): cgutils.alloca_once(builder, vector) for row in its_rows for block in its_blocks}
            for total in totals.values():
                builder.store(ir.Constant(vector, None), total)
            with cgutils.for_range(builder, n_steps, intp=intp) as loop:
                base = builder.gep(weights_at, [builder.mul(loop.index, weights_step)])
                w = {b: builder.load(at(base, intp(b * LANES * quad), stored), align=2) for b in its_blocks}
                if stored != vector:
                    w = {block: _widen(context, builder, bits) for block, bits in w.items()}
                for row in its_rows:
                    place = builder.add(builder.mul(x_row, intp(row)), builder.mul(loop.index, intp(quad)))
                    value = builder.load(at(x_at, place, element), align=quad if is_int else 4)
                    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
                    spread = builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, LANES), None))
                    for block in its_blocks:
                        total = totals[row, block]
                        builder.store(multiply(context, builder, builder.load(total), w[block], spread), total)
            for (row, block), total in totals.items():
                place = builder.add(builder.mul(out_row, intp(row)), intp(block * LANES))
                builder.store(builder.load(total), at(out_at, place, vector), align=4)

        # As many sums at a time as there are registers for.
        side = 4 if "+avx512f" in _features(context) else 2
        for row in range(0, rows, side):
            for block in range(0, blocks, side):
                add_up(range(row, min(row + side, rows)), range(block, block + min(side, blocks)))
        return context.get_dummy_value()

    return signature, generate


@instructions
def value_of(typingctx: Any, stored: Any) -> Any:
    """A stored weight as float32: uint8 is 128 above it, uint16 the bits of a float16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if stored == types.uint8:
            return builder.fsub(builder.uitofp(args[0], F32), ir.Constant(F32, 128))
        return _widen(context, builder, args[0]) if stored == types.uint16 else args[0]

    return types.float32(stored), generate


@instructions
def stored_as(typingctx: Any, array: Any, value: Any) -> Any:
    """A float32 as the elements of `array` are stored: itself, or for uint16 the bits of the nearest float16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _narrow(context, builder, args[1]) if array.dtype == types.uint16 else args[1]

    return array.dtype(array, types.float32), generate


@instructions
def float_of_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 that an int32's bits stand for."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], F32)

    return types.float32(types.int32), generate


@kernel
def exp32(x: Any) -> Any:
    """e to the x, from -87 to 88, to about 1e-6: plain arithmetic, so that loops over it vectorise."""
    power = min(max(x, np.float32(-87)), np.float32(88)) * np.float32(1 / math.log(2))
    whole = np.rint(power)
    r = (power - whole) * np.float32(math.log(2))
    series = np.float32(1 / 5040)
    series = series * r + np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(1 / 2)
    series = series * r + np.float32(1)
    series = series * r + np.float32(1)
    return series * float_of_bits(np.int32((np.int32(whole) + 127) << 23))  # times 2 to the whole


@kernel
def largest(x_j: Any) -> Any:
    """The maximum. Floats compare as integers once the bits of negative ones are turned round; only that vectorises."""
    bits_j = x_j.view(np.int32)
    result = np.int32(-(2**31))
    for j in range(bits_j.shape[0]):
        result = max(result, np.int32(bits_j[j] ^ ((bits_j[j] >> 31) & 0x7FFFFFFF)))
    return float_of_bits(np.int32(result ^ ((result >> 31) & 0x7FFFFFFF)))


@kernel
def largest_magnitude(x_j: Any) -> Any:
    """The maximum of magnitudes, compared as integers likewise."""
    bits_j = x_j.view(np.int32)
    result = np.int32(0)
    for j in range(bits_j.shape[0]):
        result = max(result, np.int32(bits_j[j] & 0x7FFFFFFF))
    return float_of_bits(result)


@kernel
def prepare(x_nj: Any, quantise: Any, out_nj: Any, scale_n: Any, offset_n: Any) -> None:
    """Activations as `project` takes them: copied, or rounded to int8 with one scale per token.

    Weights are stored 128 too high, so each sum comes out too high by 128 times the token's sum: the offset.
    """
    for n in range(x_nj.shape[0]):
        scale_n[n], offset_n[n] = 1, 0
        if not quantise:
            for j in range(x_nj.shape[1]):
                out_nj[n, j] = x_nj[n, j]
            continue
        magnitude = largest_magnitude(x_nj[n])
        if magnitude != 0:  # nor not-a-number, which must not end as a zero
            scale_n[n] = magnitude / np.float32(127)
        inverse = np.float32(1) / scale_n[n]
        total = np.int32(0)
        for j in range(x_nj.shape[1]):
            rounded = np.int32(np.rint(x_nj[n, j] * inverse))
            out_nj[n, j] = rounded
            total = np.int32(total + rounded)
        offset_n[n] = 128 * total


@kernel
def scale_sums(sums_i: Any, offset: Any, scale: Any, scale_i: Any, out_i: Any) -> None:
    for i in range(PANEL):
        out_i[i] = np.float32(sums_i[i] - offset) * (scale * scale_i[i])


@kernel
def project(weights: Any, scale_li: Any, layer: Any, x_nj: Any, scale_n: Any, offset_n: Any, out_ni: Any) -> None:
    """out = x Wᵀ of one layer; each panel of weights is read once for all tokens."""
    n_tokens, width = x_nj.shape
    n_panels, n_steps, stride = weights.shape[1], weights.shape[2], PANEL * weights.shape[4]
    sums_ni = np.empty((4, PANEL), offset_n.dtype)
    for panel in range(n_panels):
        start, i = (layer * n_panels + panel) * n_steps * stride, panel * PANEL
        panel_scale_i = scale_li[layer, i : i + PANEL]
        for n in range(0, n_tokens - 3, 4):
            tile(4, 4, n_steps, weights, start, stride, x_nj, n * width, width, sums_ni, 0, PANEL)
            for m in range(4):
                scale_sums(sums_ni[m], offset_n[n + m], scale_n[n + m], panel_scale_i, out_ni[n + m, i : i + PANEL])
        for n in range(n_tokens // 4 * 4, n_tokens):
            tile(1, 4, n_steps, weights, start, stride, x_nj, n * width, width, sums_ni, 0, PANEL)
            scale_sums(sums_ni[0], offset_n[n], scale_n[n], panel_scale_i, out_ni[n, i : i + PANEL])


@kernel
def add_up(x_j: Any) -> Any:
    """The sum, as 64 sums side by side (a compiler must not reorder floats, but so it need not), then of these."""
    sums = np.zeros(PANEL, np.float32)
    n_whole = x_j.shape[0] // PANEL * PANEL
    for first in range(0, n_whole, PANEL):
        part_j = x_j[first : first + PANEL]
        for lane in range(PANEL):
            sums[lane] += part_j[lane]
    rest_j = x_j[n_whole:]
    for lane in range(rest_j.shape[0]):
        sums[lane] += rest_j[lane]
    total = np.float32(0)
    for lane in range(PANEL):
        total += sums[lane]
    return total


@kernel
def normalise(x_nd: Any, width: Any, gain_d: Any, eps: Any, out_nd: Any) -> None:
    """RMSNorm of the first `width` columns; the rest is padding."""
    square_d = np.empty(width, np.float32)
    for n in range(x_nd.shape[0]):
        for d in range(width):
            square_d[d] = x_nd[n, d] * x_nd[n, d]
        inverse = np.float32(1) / np.sqrt(add_up(square_d) / np.float32(width) + eps)
        for d in range(width):
            out_nd[n, d] = x_nd[n, d] * inverse * gain_d[d]


@kernel
def add(x_nd: Any, total_nd: Any) -> None:
    for n in range(x_nd.shape[0]):
        for d in range(x_nd.shape[1]):
            total_nd[n, d] += x_nd[n, d]


@kernel
def rotate(first_k: Any, second_k: Any, cos_k: Any, sin_k: Any) -> None:
    """Rotary position of the halves of a query or key, in place."""
    for k in range(first_k.shape[0]):
        first, second = first_k[k], second_k[k]
        first_k[k] = first * cos_k[k] - second * sin_k[k]
        second_k[k] = second * cos_k[k] + first * sin_k[k]


@kernel
def swiglu(gate_f: Any, up_f: Any, out_f: Any) -> None:
    for f in range(gate_f.shape[0]):
        out_f[f] = gate_f[f] / (np.float32(1) + exp32(-gate_f[f])) * up_f[f]


@kernel
def softmax(scores_s: Any, scale: Any) -> None:
    """In place, of scores times scale."""
    peak = largest(scores_s)
    for s in range(scores_s.shape[0]):
        scores_s[s] = exp32((scores_s[s] - peak) * scale)
    total = add_up(scores_s)
    for s in range(scores_s.shape[0]):
        scores_s[s] = scores_s[s] / total


@kernel
def attend(
    q_i: Any,  # queries [h k] of the heads that share the keys and values
    filled: Any,  # how many positions of the row there are
    keys: Any,
    key_start: Any,  # where this row's keys are, in elements
    values: Any,
    value_start: Any,
    scores_hs: Any,  # room to work in
    mixed_hk: Any,
    out_i: Any,  # [h k]
) -> None:
    """Attention of some heads of one token, which share keys and values, over the filled part of their row."""
    n_heads, n_scores = scores_hs.shape
    padded_k, head_dim = mixed_hk.shape[1], q_i.shape[0] // n_heads
    out_hk = out_i.reshape(n_heads, head_dim)
    for h in range(0, n_heads, 2):  # in pairs; a last single head counts twice
        other = min(h + 1, n_heads - 1) - h
        score, mixed = h * n_scores, h * padded_k
        for s in range(0, filled, PANEL):
            start, stride = key_start + s * head_dim, other * n_scores
            tile(2, 4, head_dim, keys, start, PANEL, q_i, h * head_dim, other * head_dim, scores_hs, score + s, stride)
        for one in range(h, h + other + 1):
            softmax(scores_hs[one, :filled], np.float32(1 / math.sqrt(head_dim)))
        for k in range(0, padded_k, 32):
            start, stride = value_start + k, other * padded_k
            tile(2, 2, filled, values, start, padded_k, scores_hs, score, other * n_scores, mixed_hk, mixed + k, stride)
        for one in range(h, h + other + 1):
            for k in range(head_dim):
                out_hk[one, k] = mixed_hk[one, k]


@kernel
def forward(
    tokens_n: Any,  # ids
    slots_n: Any,  # whose row of the cache each token belongs to
    positions_n: Any,  # where it stands there; tokens of one story in ascending order
    last_m: Any,  # indices n of the tokens whose logits are wanted
    keys: Any,  # cache [slot, layer, g, s / 64, k, 64]
    values: Any,  # cache [slot, layer, g, s, k padded to 32s]
    n_heads: Any,
    embed: Any,
    embed_scale: Any,  # scales of all matrices: [layer, i]
    head: Any,
    head_scale: Any,
    qkv: Any,  # queries, keys and values below each other
    qkv_scale: Any,
    merge: Any,  # attention's output projection
    merge_scale: Any,
    gate_up: Any,  # gate above up
    gate_up_scale: Any,
    down: Any,
    down_scale: Any,
    attention_gain_ld: Any,
    mlp_gain_ld: Any,
    final_gain_d: Any,
    eps: Any,
    cos_sk: Any,
    sin_sk: Any,
    x_like: Any,  # an array of the type that weights are multiplied with: int8 for int8 weights, else float32
    sum_like: Any,  # and of what that gives: int32, else float32
) -> Any:
    """Run the tokens through every layer, keep their keys and values, and return logits [m, v padded to 64s]."""
    n_tokens, n_last, width = tokens_n.shape[0], last_m.shape[0], final_gain_d.shape[0]
    _, n_layers, n_groups, n_blocks, head_dim, _ = keys.shape
    n_shared = n_heads // n_groups
    quantise = embed.shape[4] == 4
    quad = embed.shape[4]
    padded_d, padded_i, padded_f = merge_scale.shape[1], merge.shape[2] * quad, down.shape[2] * quad
    x_nd = np.zeros((n_tokens, padded_d), np.float32)
    normal_nd = np.zeros((n_tokens, padded_d), np.float32)
    qkv_ni = np.empty((n_tokens, qkv_scale.shape[1]), np.float32)
    mixed_ni = np.zeros((n_tokens, padded_i), np.float32)
    gate_up_nf = np.empty((n_tokens, 2 * padded_f), np.float32)
    mlp_nf = np.empty((n_tokens, padded_f), np.float32)
    ready_nd = np.empty((n_tokens, padded_d), x_like.dtype)
    ready_ni = np.empty((n_tokens, padded_i), x_like.dtype)
    ready_nf = np.empty((n_tokens, padded_f), x_like.dtype)
    scale_n, offset_n = np.empty(n_tokens, np.float32), np.empty(n_tokens, sum_like.dtype)
    scores_hs = np.empty((n_shared, n_blocks * PANEL), np.float32)
    mixed_hk = np.empty((n_shared, values.shape[4]), np.float32)

    for n in range(n_tokens):
        panel, lane = tokens_n[n] // PANEL, tokens_n[n] % PANEL
        for d in range(width):
            x_nd[n, d] = value_of(embed[0, panel, d // quad, lane, d % quad]) * embed_scale[0, tokens_n[n]]
    for layer in range(n_layers):
        normalise(x_nd, width, attention_gain_ld[layer], eps, normal_nd)
        prepare(normal_nd, quantise, ready_nd, scale_n, offset_n)
        project(qkv, qkv_scale, layer, ready_nd, scale_n, offset_n, qkv_ni)
        for n in range(n_tokens):
            position, slot = positions_n[n], slots_n[n]
            half = head_dim // 2
            for start in range(0, (n_heads + n_groups) * head_dim, head_dim):
                middle, end = start + half, start + head_dim
                rotate(qkv_ni[n, start:middle], qkv_ni[n, middle:end], cos_sk[position], sin_sk[position])
            for group in range(n_groups):
                start = (n_heads + group) * head_dim
                key_k = qkv_ni[n, start : start + head_dim]
                value_k = qkv_ni[n, start + n_groups * head_dim : start + (n_groups + 1) * head_dim]
                for k in range(head_dim):
                    keys[slot, layer, group, position // PANEL, k, position % PANEL] = stored_as(keys, key_k[k])
                    values[slot, layer, group, position, k] = stored_as(values, value_k[k])
        for n in range(n_tokens):
            for group in range(n_groups):
                row = (slots_n[n] * n_layers + layer) * n_groups + group
                heads = slice(group * n_shared * head_dim, (group + 1) * n_shared * head_dim)
                attend(
                    qkv_ni[n, heads],
                    positions_n[n] + 1,
                    keys,
                    row * n_blocks * head_dim * PANEL,
                    values,
                    row * values.shape[3] * values.shape[4],
                    scores_hs,
                    mixed_hk,
                    mixed_ni[n, heads],
                )
        prepare(mixed_ni, quantise, ready_ni, scale_n, offset_n)
        project(merge, merge_scale, layer, ready_ni, scale_n, offset_n, normal_nd)
        add(normal_nd, x_nd)
        normalise(x_nd, width, mlp_gain_ld[layer], eps, normal_nd)
        prepare(normal_nd, quantise, ready_nd, scale_n, offset_n)
        project(gate_up, gate_up_scale, layer, ready_nd, scale_n, offset_n, gate_up_nf)
        for n in range(n_tokens):
            swiglu(gate_up_nf[n, :padded_f], gate_up_nf[n, padded_f:], mlp_nf[n])
        prepare(mlp_nf, quantise, ready_nf, scale_n, offset_n)
        project(down, down_scale, layer, ready_nf, scale_n, offset_n, normal_nd)
        add(normal_nd, x_nd)
    last_md = np.zeros((n_last, padded_d), np.float32)
    for m in range(n_last):
        for d in range(width):
            last_md[m, d] = x_nd[last_m[m], d]
    normal_md = np.zeros((n_last, padded_d), np.float32)
    normalise(last_md, width, final_gain_d, eps, normal_md)
    ready_md = np.empty((n_last, padded_d), x_like.dtype)
    scale_m, offset_m = np.empty(n_last, np.float32), np.empty(n_last, sum_like.dtype)
    prepare(normal_md, quantise, ready_md, scale_m, offset_m)
    logits_mv = np.empty((n_last, head_scale.shape[1]), np.float32)
    project(head, head_scale, head.shape[0] - 1, ready_md, scale_m, offset_m, logits_mv)
    return logits_mv


@kernel
def sift_down(heap: Any, i: Any, size: Any) -> None:
    """Restore the order of a heap, largest first, below place i."""
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and heap[child + 1] > heap[child]:
            child += 1
        if heap[i] >= heap[child]:
            return
        heap[i], heap[child] = heap[child], heap[i]
        i = child


@kernel
def pick(logits_v: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, noise: Any) -> Any:
    """The token that model.sampling.sample picks for one row, or -1 when the logits are not numbers.

    A heap gives the likeliest tokens in order, and is left as soon as no further one can be kept.
    """
    n_ids = logits_v.shape[0]
    peak = largest(logits_v)
    if peak != peak:
        return -1
    cuts_tail = 0 < top_k < n_ids
    least, total = -np.inf, 1.0  # of the logits that may be kept; of the weights, where the likeliest has 1
    if temperature == 0:
        least, top_p, temperature = np.float64(peak), 0.0, 1.0
    elif not cuts_tail:
        if min_p > 0:
            least = peak + temperature * math.log(min_p) - 1e-9
        if top_p < 1:
            weight_v = np.empty(n_ids, np.float32)
            for v in range(n_ids):
                weight_v[v] = exp32((logits_v[v] - peak) / np.float32(temperature))
            total = np.float64(add_up(weight_v))
    heap = np.empty(n_ids, np.int64)  # the logit, made comparable as an integer, above the id: ties go to the lower
    bits_v = logits_v.view(np.int32)
    size = 0
    for v in range(n_ids):
        if logits_v[v] >= least:
            heap[size] = (np.int64(bits_v[v] ^ ((bits_v[v] >> 31) & 0x7FFFFFFF)) << 32) + (n_ids - v)
            size += 1
    for i in range(size // 2 - 1, -1, -1):
        sift_down(heap, i, size)
    ids, weights = np.empty(size, np.int64), np.empty(size, np.float64)
    n_kept, mass = 0, 0.0
    while n_kept < size:
        v = n_ids - (heap[0] & 0xFFFFFFFF)
        weight = math.exp((np.float64(logits_v[v]) - peak) / temperature)
        if n_kept > 0 and (n_kept == top_k if cuts_tail else weight < min_p or (top_p < 1 and mass >= top_p * total)):
            break
        ids[n_kept], weights[n_kept] = v, weight
        mass += weight
        n_kept += 1
        heap[0] = heap[size - n_kept]
        sift_down(heap, 0, size - n_kept)
    if cuts_tail:  # what top-p is a share of is known only now
        total, mass, size = mass, 0.0, n_kept
        n_kept = 0
        while n_kept < size and (n_kept == 0 or (weights[n_kept] >= min_p and (top_p >= 1 or mass < top_p * total))):
            mass += weights[n_kept]
            n_kept += 1
    below = 0.0
    for i in range(n_kept - 1):
        below += weights[i]
        if below > noise * mass:
            return ids[i]
    return ids[n_kept - 1] if n_kept else -1


@kernel
def sample(
    logits_mv: Any,
    n_ids: Any,  # tokens that stand for text
    seen_ids: Any,  # of the stories with a repetition penalty, one after the other: the tokens in view, each once
    seen_ends_m: Any,  # where each story's end there
    penalty_m: Any,
    temperature_m: Any,
    top_k_m: Any,
    top_p_m: Any,
    min_p_m: Any,
    noise_m: Any,
) -> Any:
    """The next token of each story [m], -1 where logits are not numbers. Changes the logits."""
    next_m = np.empty(logits_mv.shape[0], np.int64)
    seen = 0
    for m in range(logits_mv.shape[0]):
        logits_v = logits_mv[m, :n_ids]
        while seen < seen_ends_m[m]:
            logit = logits_v[seen_ids[seen]]
            penalty = np.float32(penalty_m[m])
            logits_v[seen_ids[seen]] = logit / penalty if logit > 0 else logit * penalty
            seen += 1
        next_m[m] = pick(logits_v, temperature_m[m], top_k_m[m], top_p_m[m], min_p_m[m], noise_m[m])
    return next_m
