"""What stands between the vendor's matrix products of a prefill: RMSNorm, RoPE with the cache write, SwiGLU, residual.

Each kernel reads its operands once, computes in fp32 and rounds where the reference rounds. A program takes a row, or a
stretch of it: the loads are 16 bytes wide and nothing crosses programs.

Source: RMSNorm, arXiv 1910.07467; RoPE, arXiv 2104.09864; GLU variants, arXiv 2002.05202.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferneo_kernels.aot import AotCase

BLOCK = 1024  # elements a program of silu_mul and of add_: 8 a thread, one 16-byte load of bf16


@triton.jit
def _rms_norm_kernel(out_ptr, x_ptr, weight_ptr, rows_ptr, stride_token, hidden_size, eps, BLOCK_H: tl.constexpr):
    """One row. Grid: (rows of out,). rows_ptr: which row of x each one is; None: the row itself."""
    out_row = tl.program_id(0).to(tl.int64)
    row = out_row
    if rows_ptr is not None:
        row = tl.load(rows_ptr + out_row)
    columns = tl.arange(0, BLOCK_H)
    inside = columns < hidden_size
    x = tl.load(x_ptr + row * stride_token + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden_size + eps)
    normalised = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)  # rounded before the weight, as the reference
    tl.store(out_ptr + out_row * hidden_size + columns, normalised * weight, mask=inside)


@triton.jit
def _rope_store_kernel(
    q_ptr,
    qkv_ptr,
    positions_ptr,
    rope_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    stride_token,
    stride_rope,
    stride_block,
    stride_head,
    stride_slot,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """All heads of one token, each as its two halves. Grid: (num_tokens,)."""
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (heads < NUM_HEADS + 2 * NUM_KV_HEADS) & (pairs < HALF)
    x_ptrs = qkv_ptr + token * stride_token + heads * HEAD_DIM + pairs
    first = tl.load(x_ptrs, mask=inside, other=0.0)
    second = tl.load(x_ptrs + HALF, mask=inside, other=0.0)

    angle_ptrs = rope_ptr + tl.load(positions_ptr + token) * stride_rope + pairs
    cos = tl.load(angle_ptrs, mask=pairs < HALF, other=0.0)
    sin = tl.load(angle_ptrs + HALF, mask=pairs < HALF, other=0.0)
    first32, second32 = first.to(tl.float32), second.to(tl.float32)
    rotated_first = (first32 * cos - second32 * sin).to(first.dtype)
    rotated_second = (second32 * cos + first32 * sin).to(first.dtype)

    is_q = inside & (heads < NUM_HEADS)
    q_ptrs = q_ptr + token * NUM_HEADS * HEAD_DIM + heads * HEAD_DIM + pairs
    tl.store(q_ptrs, rotated_first, mask=is_q)
    tl.store(q_ptrs + HALF, rotated_second, mask=is_q)

    slot = tl.load(slot_mapping_ptr + token)
    stored = inside & (slot >= 0)  # -1: padding, which has no place in the cache
    cache_row = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_slot
    k_heads, v_heads = heads - NUM_HEADS, heads - NUM_HEADS - NUM_KV_HEADS
    is_k = stored & (k_heads >= 0) & (k_heads < NUM_KV_HEADS)
    k_ptrs = k_cache_ptr + cache_row + k_heads * stride_head + pairs
    tl.store(k_ptrs, rotated_first, mask=is_k)
    tl.store(k_ptrs + HALF, rotated_second, mask=is_k)
    is_v = stored & (v_heads >= 0)
    v_ptrs = v_cache_ptr + cache_row + v_heads * stride_head + pairs
    tl.store(v_ptrs, first, mask=is_v)
    tl.store(v_ptrs + HALF, second, mask=is_v)


@triton.jit
def _silu_mul_kernel(out_ptr, gate_up_ptr, intermediate_size, BLOCK: tl.constexpr):
    """A stretch of one row. Grid: (num_tokens, cdiv(intermediate_size, BLOCK))."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < intermediate_size
    gate_ptrs = gate_up_ptr + token * 2 * intermediate_size + columns
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + intermediate_size, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + token * intermediate_size + columns, silu * up, mask=inside)


@triton.jit
def _add_kernel(x_ptr, residual_ptr, size, BLOCK: tl.constexpr):
    """A stretch of one row. Grid: (num_tokens, cdiv(size, BLOCK))."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    index = tl.program_id(0).to(tl.int64) * size + columns
    x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + index, residual + x, mask=inside)


def row_warps(block: int) -> int:
    """Warps of a program that holds a row: 8 elements a thread, up to 16 warps."""
    return min(16, max(1, block // 256))


def rms_norm(x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
    """x / rms(x) * weight of every row of x, or of some.

    Args:
        x: [num_tokens, hidden_size], innermost stride 1.
        weight: [hidden_size].
        eps: added to the mean square.
        rows: [num_rows] int64, which rows of x; None: all.
    Returns:
        [num_rows, hidden_size], dtype of x.
    """
    num_rows, hidden_size = (x if rows is None else rows).shape[0], x.shape[1]
    out = torch.empty(num_rows, hidden_size, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden_size)
    if num_rows:
        _rms_norm_kernel[(num_rows,)](
            out, x, weight, rows, x.stride(0), hidden_size, eps, BLOCK_H=block, num_warps=row_warps(block)
        )
    return out


def rope_store(
    qkv: Tensor,
    positions: Tensor,
    rope: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
) -> Tensor:
    """RoPE on Q and K, and K and V into their cache slots.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], innermost stride 1.
        positions: [num_tokens] int64.
        rope: [max_model_len, head_dim] fp32; cosines, then sines.
        k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], of equal strides; written.
        slot_mapping: [num_tokens] int64; -1 stores nothing.
        num_heads: of Q.
    Returns:
        q: [num_tokens, num_heads, head_dim], dtype of qkv.
    """
    num_tokens = qkv.shape[0]
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    block_heads = triton.next_power_of_2(num_heads + 2 * num_kv_heads)
    block_half = triton.next_power_of_2(head_dim // 2)
    if num_tokens:
        _rope_store_kernel[(num_tokens,)](
            q,
            qkv,
            positions,
            rope,
            k_cache,
            v_cache,
            slot_mapping,
            qkv.stride(0),
            rope.stride(0),
            *k_cache.stride()[:3],
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size,
            BLOCK_HEADS=block_heads,
            BLOCK_HALF=block_half,
            num_warps=row_warps(block_heads * block_half),
        )
    return q


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size], contiguous; gate, then up.
    Returns:
        [num_tokens, intermediate_size], dtype of gate_up.
    """
    num_tokens, intermediate_size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, intermediate_size, dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(intermediate_size, BLOCK))
        _silu_mul_kernel[grid](out, gate_up, intermediate_size, BLOCK=BLOCK, num_warps=4)
    return out


def add_(x: Tensor, residual: Tensor) -> Tensor:
    """x += residual; both [num_tokens, size], contiguous and of one dtype. Returns x."""
    num_tokens, size = x.shape
    if num_tokens:
        _add_kernel[(num_tokens, triton.cdiv(size, BLOCK))](x, residual, size, BLOCK=BLOCK, num_warps=4)
    return x


def aot_cases() -> tuple[AotCase, ...]:
    """The kernels at the shapes of Llama-3.1-8B."""
    norm = {"out_ptr": "*bf16", "x_ptr": "*bf16", "weight_ptr": "*bf16"}
    norm_sizes = {"stride_token": "i64", "hidden_size": "i32", "eps": "fp32"}
    aligned = (*norm, "stride_token", "hidden_size")
    rope_pointers = dict.fromkeys(("q_ptr", "qkv_ptr", "k_cache_ptr", "v_cache_ptr"), "*bf16")
    rope_indices = {"positions_ptr": "*i64", "rope_ptr": "*fp32", "slot_mapping_ptr": "*i64"}
    rope_strides = dict.fromkeys(("stride_token", "stride_rope", "stride_block", "stride_head", "stride_slot"), "i32")
    rope_shape = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK_SIZE": 16}
    rope_blocks = {"BLOCK_HEADS": 64, "BLOCK_HALF": 64}
    rope_signature = {**rope_pointers, **rope_indices, **rope_strides}
    silu = {"out_ptr": "*bf16", "gate_up_ptr": "*bf16", "intermediate_size": "i32"}
    add = {"x_ptr": "*bf16", "residual_ptr": "*bf16", "size": "i32"}
    vectors = ("ld.v4",)
    return (
        AotCase(
            "rms_norm",
            _rms_norm_kernel,
            {**norm, **norm_sizes},
            {"rows_ptr": None, "BLOCK_H": 4096},
            16,
            1,
            aligned,
            vectors,
        ),
        AotCase(
            "rms_norm_rows",
            _rms_norm_kernel,
            {**norm, "rows_ptr": "*i64", **norm_sizes},
            {"BLOCK_H": 4096},
            16,
            1,
            aligned,
            vectors,
        ),
        AotCase(
            "rope_store",
            _rope_store_kernel,
            rope_signature,
            {**rope_shape, **rope_blocks},
            16,
            1,
            tuple(rope_signature),
            vectors,
        ),
        AotCase("silu_mul", _silu_mul_kernel, silu, {"BLOCK": BLOCK}, 4, 1, tuple(silu), vectors),
        AotCase("add", _add_kernel, add, {"BLOCK": BLOCK}, 4, 1, tuple(add), vectors),
    )
