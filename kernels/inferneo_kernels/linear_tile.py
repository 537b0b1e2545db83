"""The products that every linear kernel is built on: a tile of weight rows times a tile of tokens, in registers.

`products` is the prologue and main loop; the kernels in `linear_kernels.py` add their epilogues. BLOCK_M = 1 is the
vector form: fp32 multiply-adds on 16-byte loads. A larger BLOCK_M is the tile form: tensor cores with the operands
swapped, so that the many weight rows lie along the instruction's long side and the few tokens along its short one.

A form adds up K in one fixed order, whatever the number of tokens and whichever tokens share the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inferneo_kernels.quant_decode import code_floats, code_place, dequantized, quad_scales, quad_words


@triton.jit
def products(
    x_ptr,
    norm_ptr,
    eps,
    codes_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    rows,
    row_mask,
    tokens,
    num_tokens,
    K,
    stride_token,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
    """weight[rows] @ x[tokens].T, with x normalised first where norm_ptr is not None.

    Args:
        codes_ptr, high_ptr, scales_ptr, supers_ptr: the planes of a Weight.
        rows, row_mask: [BLOCK_N] rows of the weight, and which of them exist.
        tokens: [BLOCK_M]; those at num_tokens and beyond give zeros.
        stride_token: elements from one token of x to the next.
        BITS, SCALES: of the QuantFormat; BITS = 0 is dense.
        BLOCK_K: columns a step.
        DOT_FP32: multiply in fp32: for an fp32 model, and in the interpreter.
    Returns:
        [BLOCK_N, BLOCK_M] fp32.
    """
    rows = rows.to(tl.int64)[:, None]
    row_mask = row_mask[:, None]
    token_mask = (tokens < num_tokens)[:, None]
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * stride_token
    if BLOCK_M == 1:
        if BITS == 0:
            return _dense_vector(x_rows, token_mask, norm_ptr, eps, codes_ptr, rows, row_mask, K, BLOCK_N, BLOCK_K)
        else:
            return _quantised_vector(
                x_rows,
                token_mask,
                norm_ptr,
                eps,
                codes_ptr,
                high_ptr,
                scales_ptr,
                supers_ptr,
                rows,
                row_mask,
                K,
                BITS,
                SCALES,
                BLOCK_N,
                BLOCK_K,
            )
    else:
        if BITS == 0:
            return _dense_tile(
                x_rows, token_mask, norm_ptr, eps, codes_ptr, rows, row_mask, K, BLOCK_N, BLOCK_M, BLOCK_K, DOT_FP32
            )
        else:
            return _quantised_tile(
                x_rows,
                token_mask,
                norm_ptr,
                eps,
                codes_ptr,
                high_ptr,
                scales_ptr,
                supers_ptr,
                rows,
                row_mask,
                K,
                BITS,
                SCALES,
                BLOCK_N,
                BLOCK_M,
                BLOCK_K,
                DOT_FP32,
            )


@triton.jit
def _dense_vector(
    x_rows, token_mask, norm_ptr, eps, w_ptr, rows, row_mask, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One token; the next step's weights are in flight while this step's are multiplied."""
    columns = tl.arange(0, BLOCK_K)[None, :]
    w_rows = w_ptr + rows * K
    w = tl.load(w_rows + columns, mask=row_mask & (columns < K), other=0.0, eviction_policy="evict_first")
    scale = _rms_scale(x_rows, token_mask, norm_ptr, eps, K, 1, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for _ in range(0, K, BLOCK_K):
        upcoming = columns + BLOCK_K
        w_next = tl.load(w_rows + upcoming, mask=row_mask & (upcoming < K), other=0.0, eviction_policy="evict_first")
        x = _load_x(x_rows, token_mask, norm_ptr, scale, columns, columns < K)
        acc += w.to(tl.float32) * x.to(tl.float32)
        w, columns = w_next, upcoming
    return tl.sum(acc, axis=1)[:, None]


@triton.jit
def _quantised_vector(
    x_rows,
    token_mask,
    norm_ptr,
    eps,
    codes_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    rows,
    row_mask,
    K,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token. Columns under one scale add up to scale * sum(code x) + shift * sum(x): two operations a weight, and
    the scale's arithmetic once a quad. The multiply-add is written out: it stays one in a kernel whose draw forbids the
    compiler to fuse.

    Codes are subnormal (see code_floats), so x is raised by 2 ** 64 on the way in and the sum by 2 ** 85 on the way
    out: exact for any |x| between 2 ** -41 and 2 ** 64."""
    CODES: tl.constexpr = 4 if BITS == 8 else 8  # in a word
    PARTS: tl.constexpr = 2 if SCALES == "d_sc" else 1  # scales in a quad
    NUM_QUADS: tl.constexpr = BLOCK_K // (CODES * 4)
    row_quads = K // (CODES * 4)
    quads = tl.arange(0, NUM_QUADS)[None, :]
    words = quad_words(codes_ptr, rows, quads, row_mask & (quads < row_quads), K, BITS)
    scale = _rms_scale(x_rows, token_mask, norm_ptr, eps, K, 1, BLOCK_K)[:, :, None]
    x_rows = x_rows[:, :, None]
    token_mask = token_mask[:, :, None]
    acc = tl.zeros((BLOCK_N, NUM_QUADS), tl.float32)
    for _ in range(0, row_quads, NUM_QUADS):
        mask = row_mask & (quads < row_quads)
        upcoming = quads + NUM_QUADS
        words_next = quad_words(codes_ptr, rows, upcoming, row_mask & (upcoming < row_quads), K, BITS)
        high = words if high_ptr is None else quad_words(high_ptr, rows, quads, mask, K, BITS)
        columns = (quads * (CODES * 4))[:, :, None] + tl.arange(0, 4)[None, None, :]
        for part in tl.static_range(PARTS):
            weight_scale, shift = quad_scales(scales_ptr, supers_ptr, rows, quads, mask, K, part, BITS, SCALES)
            dots = tl.zeros((BLOCK_N, NUM_QUADS, 4), tl.float32)
            sums = tl.zeros((1, NUM_QUADS, 4), tl.float32)
            for i in tl.static_range(part * CODES // PARTS, (part + 1) * CODES // PARTS):
                x = _load_x(x_rows, token_mask, norm_ptr, scale, columns + 4 * i, columns + 4 * i < K).to(tl.float32)
                dots = tl.fma(code_floats(words, high, i, BITS), x * 2.0 ** (64 - code_place(i, BITS)), dots)
                sums += x
            acc += weight_scale * 2.0**85 * tl.sum(dots, axis=2) + shift * tl.sum(sums, axis=2)
        words, quads = words_next, upcoming
    return tl.sum(acc, axis=1)[:, None]


@triton.jit
def _dense_tile(
    x_rows,
    token_mask,
    norm_ptr,
    eps,
    w_ptr,
    rows,
    row_mask,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
    """A tile of tokens; the loads run num_stages ahead of the tensor cores."""
    w_rows = w_ptr + rows * K
    scale = _rms_scale(x_rows, token_mask, norm_ptr, eps, K, BLOCK_M, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        w = tl.load(w_rows + columns, mask=row_mask & (columns < K), other=0.0, eviction_policy="evict_first")
        x = _load_x(x_rows, token_mask, norm_ptr, scale, columns, columns < K)
        acc = _dot(w, x, acc, DOT_FP32)
    return acc


@triton.jit
def _quantised_tile(
    x_rows,
    token_mask,
    norm_ptr,
    eps,
    codes_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    rows,
    row_mask,
    K,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
    """A tile of tokens; weights are rounded to the model dtype, as TorchOps does, on their way to the tensor cores.
    Column i of every word makes one product of its own, so no code is moved between threads by position."""
    CODES: tl.constexpr = 4 if BITS == 8 else 8  # in a word
    NUM_QUADS: tl.constexpr = BLOCK_K // (CODES * 4)
    row_quads = K // (CODES * 4)
    scale = _rms_scale(x_rows, token_mask, norm_ptr, eps, K, BLOCK_M, 128)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, row_quads, NUM_QUADS):
        quads = start + tl.arange(0, NUM_QUADS)[None, :]
        mask = row_mask & (quads < row_quads)
        words = quad_words(codes_ptr, rows, quads, mask, K, BITS)
        high = words if high_ptr is None else quad_words(high_ptr, rows, quads, mask, K, BITS)
        place = tl.arange(0, NUM_QUADS * 4)[None, :]
        columns = (start + place // 4) * (CODES * 4) + place % 4  # of code 0 in each word
        weight_scale, shift = quad_scales(scales_ptr, supers_ptr, rows, quads, mask, K, 0, BITS, SCALES)
        for i in tl.static_range(CODES):
            if SCALES == "d_sc" and i == CODES // 2:
                weight_scale, shift = quad_scales(scales_ptr, supers_ptr, rows, quads, mask, K, 1, BITS, SCALES)
            w = dequantized(words, high, weight_scale[:, :, None], shift[:, :, None], i, BITS)
            x = _load_x(x_rows, token_mask, norm_ptr, scale, columns + 4 * i, columns + 4 * i < K)
            acc = _dot(tl.reshape(w, (BLOCK_N, NUM_QUADS * 4)).to(x.dtype), x, acc, DOT_FP32)
    return acc


@triton.jit
def _rms_scale(x_rows, token_mask, norm_ptr, eps, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / rms of each token, [BLOCK_M, 1] fp32; ones where there is no norm."""
    if norm_ptr is None:
        return tl.full((BLOCK_M, 1), 1.0, tl.float32)
    else:
        squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in range(0, K, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)[None, :]
            x = tl.load(x_rows + columns, mask=token_mask & (columns < K), other=0.0).to(tl.float32)
            squares += x * x
        return tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / K + eps)


@triton.jit
def _load_x(x_rows, token_mask, norm_ptr, scale, columns, column_mask):
    """Activations in their own dtype, normalised where there is a norm, with TorchOps' two roundings.

    Args:
        x_rows, token_mask, scale: per token; they broadcast with the columns.
        columns, column_mask: which elements of each token.
    """
    x = tl.load(x_rows + columns, mask=token_mask & column_mask, other=0.0)
    if norm_ptr is not None:
        weight = tl.load(norm_ptr + columns, mask=column_mask, other=0.0)
        normalised = (x.to(tl.float32) * scale).to(x.dtype)
        x = (normalised.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _dot(w, x, acc, DOT_FP32: tl.constexpr):
    """acc + w @ x.T: [BLOCK_N, K] and [BLOCK_M, K] to [BLOCK_N, BLOCK_M]."""
    if DOT_FP32:
        return tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), acc, input_precision="ieee")
    else:
        return tl.dot(w, tl.trans(x), acc)
