"""The three linear kernels: `products`, and what each layer does with them before they leave the registers.

The number of tokens varies while serving, so no kernel is specialised on it: nothing compiles after warm-up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inferneo_kernels.linear_tile import products


@triton.jit(do_not_specialize=["num_tokens"])
def linear_kernel(
    x_ptr,
    norm_ptr,
    codes_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    eps,
    num_tokens,
    num_rows,
    K,
    stride_token,
    stride_out,
    stride_residual,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
    """out = norm(x) @ weight.T + bias + residual; each of norm, bias and residual may be None.

    Grid: one program a tile of rows and tokens, token tiles innermost, so that they share a weight tile in L2.
    """
    token_tiles = tl.cdiv(num_tokens, BLOCK_M)
    tokens = tl.program_id(0) % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) // token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < num_rows
    acc = products(
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
        BITS,
        SCALES,
        BLOCK_N,
        BLOCK_M,
        BLOCK_K,
        DOT_FP32,
    )
    mask = row_mask[:, None] & (tokens < num_tokens)[None, :]
    tokens = tokens.to(tl.int64)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + tokens * stride_residual + rows[:, None], mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    tl.store(out_ptr + tokens * stride_out + rows[:, None], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def gate_up_silu_kernel(
    x_ptr,
    norm_ptr,
    codes_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    bias_ptr,
    out_ptr,
    eps,
    num_tokens,
    intermediate_size,
    K,
    stride_token,
    stride_out,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
    """out = silu(gate) * up. A program owns BLOCK_N / 2 rows of gate and the same rows of up.

    Grid: as linear_kernel's.
    """
    token_tiles = tl.cdiv(num_tokens, BLOCK_M)
    tokens = tl.program_id(0) % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_pair = tl.program_id(0) // token_tiles * (BLOCK_N // 2)
    place = tl.arange(0, BLOCK_N)
    pairs = first_pair + place % (BLOCK_N // 2)
    rows = pairs + place // (BLOCK_N // 2) * intermediate_size
    row_mask = pairs < intermediate_size
    acc = products(
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
        BITS,
        SCALES,
        BLOCK_N,
        BLOCK_M,
        BLOCK_K,
        DOT_FP32,
    )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    gate, up = _halves(acc, BLOCK_N, BLOCK_M)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    pairs = first_pair + tl.arange(0, BLOCK_N // 2)
    mask = (pairs < intermediate_size)[:, None] & (tokens < num_tokens)[None, :]
    places = tokens.to(tl.int64)[None, :] * stride_out + pairs[:, None]
    tl.store(out_ptr + places, hidden.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def qkv_rope_store_kernel(
    x_ptr,
    norm_ptr,
    codes_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    bias_ptr,
    positions_ptr,
    rope_ptr,
    slots_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    eps,
    num_tokens,
    num_rows,
    first_head,
    num_heads,
    num_kv_heads,
    K,
    stride_token,
    stride_q,
    stride_block,
    stride_head,
    stride_slot,
    block_size,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
    """q, k and v of the heads from first_head on; q and k rotated; k and v into their slots, those at -1 nowhere.

    A program owns BLOCK_N / 2 pairs of rows that RoPE turns together: j and j + HEAD_DIM / 2 of one head.
    Grid: as linear_kernel's.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    token_tiles = tl.cdiv(num_tokens, BLOCK_M)
    tokens = tl.program_id(0) % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_pair = tl.program_id(0) // token_tiles * (BLOCK_N // 2)
    place = tl.arange(0, BLOCK_N)
    pairs = first_pair + place % (BLOCK_N // 2)
    rows = pairs // HALF * HEAD_DIM + pairs % HALF + place // (BLOCK_N // 2) * HALF
    row_mask = pairs < num_rows // 2
    acc = products(
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
        BITS,
        SCALES,
        BLOCK_N,
        BLOCK_M,
        BLOCK_K,
        DOT_FP32,
    )
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first_head * HEAD_DIM + rows, mask=row_mask, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    first, second = _halves(acc, BLOCK_N, BLOCK_M)
    pairs = first_pair + tl.arange(0, BLOCK_N // 2)
    head = (first_head + pairs // HALF)[:, None]
    lane = (pairs % HALF)[:, None]
    token_mask = tokens < num_tokens
    mask = (pairs < num_rows // 2)[:, None] & token_mask[None, :]
    position = tl.load(positions_ptr + tokens, mask=token_mask, other=0)[None, :]
    turned = mask & (head < num_heads + num_kv_heads)  # v is not
    cos = tl.load(rope_ptr + position * HEAD_DIM + lane, mask=turned, other=1.0)
    sin = tl.load(rope_ptr + position * HEAD_DIM + HALF + lane, mask=turned, other=0.0)
    first, second = first * cos - second * sin, second * cos + first * sin
    q_places = q_ptr + tokens.to(tl.int64)[None, :] * stride_q + head * HEAD_DIM + lane
    _store_pair(q_places, first, second, mask & (head < num_heads), HALF)
    slot = tl.load(slots_ptr + tokens, mask=token_mask, other=-1)[None, :]
    stored = mask & (slot >= 0)
    places = slot // block_size * stride_block + slot % block_size * stride_slot + lane
    k_head = head - num_heads
    is_k = (k_head >= 0) & (k_head < num_kv_heads)
    _store_pair(k_ptr + places + k_head * stride_head, first, second, stored & is_k, HALF)
    v_head = k_head - num_kv_heads
    _store_pair(v_ptr + places + v_head * stride_head, first, second, stored & (v_head >= 0), HALF)


@triton.jit
def _halves(acc, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """[BLOCK_N, BLOCK_M] to its upper and lower [BLOCK_N / 2, BLOCK_M]."""
    return tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_N // 2, BLOCK_M)), (1, 2, 0)))


@triton.jit
def _store_pair(places, first, second, mask, HALF: tl.constexpr):
    tl.store(places, first.to(places.dtype.element_ty), mask=mask)
    tl.store(places + HALF, second.to(places.dtype.element_ty), mask=mask)
