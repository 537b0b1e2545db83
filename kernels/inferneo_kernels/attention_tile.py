"""What the prefill and the decode kernel share: where a tile's keys lie in the paged cache, and one step of softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)  # exp(x) = exp2(x * LOG2E), and the hardware has only exp2


@triton.jit
def load_pages(block_table_ptr, first, seq_len, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The pages of the tokens first to first + BLOCK_N: one where a page holds the whole tile, else one a token.

    A token at or past seq_len has page 0: `first` may lie past the end, so that a loop can read one tile ahead.
    """
    if BLOCK_SIZE % BLOCK_N == 0:  # `first` is a multiple of BLOCK_N
        return tl.load(block_table_ptr + first // BLOCK_SIZE, mask=first < seq_len, other=0)
    else:
        tokens = first + tl.arange(0, BLOCK_N)
        return tl.load(block_table_ptr + tokens // BLOCK_SIZE, mask=tokens < seq_len, other=0)


@triton.jit
def cache_rows(pages, first, stride_block, stride_slot, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """[BLOCK_N] int64 offsets of the tokens' rows within one head of the cache."""
    slots = (first + tl.arange(0, BLOCK_N)) % BLOCK_SIZE
    return pages.to(tl.int64) * stride_block + slots * stride_slot


@triton.jit
def load_tile(base_ptr, rows, row_mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """[rows, BLOCK_D] of a matrix whose rows begin at base_ptr + rows; 0 where masked and past HEAD_DIM."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base_ptr + rows[:, None] + columns[None, :]
    if MASK_ROWS and BLOCK_D != HEAD_DIM:
        return tl.load(pointers, mask=row_mask[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=row_mask[:, None], other=0.0)
    elif BLOCK_D != HEAD_DIM:
        return tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def attend_tile(
    acc,
    row_max,
    row_sum,
    q,
    k_ptr,
    v_ptr,
    rows,
    first,
    positions,
    seq_len,
    scale_log2e,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
    """One step of online softmax: BLOCK_N keys and values join the running maximum, sum and weighted values.

    With MASKED a query sees the keys up to its own position; without, every key of the tile. Keys at or past seq_len
    are not read: that memory may hold NaN, and 0 * NaN would spoil the sum.
    """
    tokens = first + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, rows, tokens < seq_len, HEAD_DIM, BLOCK_D, MASKED)
    if DOT_FP32:
        k = k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # fp32 only: TF32 has 10 bits, and thrice TF32 spills
    if MASKED:
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2e)
    weights = tl.exp2(scores * scale_log2e - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    v = load_tile(v_ptr, rows, tokens < seq_len, HEAD_DIM, BLOCK_D, MASKED)
    if DOT_FP32:
        v = v.to(tl.float32)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def store_rows(out_ptr, rows, row_mask, values, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write [rows, BLOCK_D], cast to the output's dtype, but for masked rows and columns past HEAD_DIM."""
    columns = tl.arange(0, BLOCK_D)
    mask = row_mask[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(out_ptr + rows[:, None] + columns[None, :], values.to(out_ptr.dtype.element_ty), mask=mask)


def packed_heads(num_heads: int, num_kv_heads: int, limit: int) -> int:
    """How many query heads share a tile: as many of those with one KV head as fit in `limit` rows, a divisor."""
    group = num_heads // num_kv_heads
    return next(size for size in range(min(group, limit), 0, -1) if group % size == 0)


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: a power of two, 16 at least, as the tensor cores want."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def dot_in_fp32(kernel: Any, q: Tensor, cache: Tensor) -> bool:
    """Whether the products run in fp32: mixed or fp32 operands; and always in the interpreter, which has no bf16."""
    return not isinstance(kernel, triton.runtime.JITFunction) or q.dtype != cache.dtype or q.dtype == torch.float32


def chip_of(tensor: Tensor) -> int:
    """The compute capability of a tensor's device, as 90 for sm_90; 90 too for the interpreter's CPU."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor
