"""Attention of many query tokens a sequence over the paged cache: prefill, chunked prefill and prefix hits, one launch.

A program takes a tile of query tokens of one sequence, with the heads that share a KV head packed beside one another,
and walks the sequence's keys in tiles of BLOCK_N: first those that every query of the tile sees, without a mask, then
those on the diagonal. Which sequence it works on it finds itself, so the grid needs only what the host knows.

Source: FlashAttention-2, arXiv 2307.08691; PagedAttention, arXiv 2309.06180.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from inferneo_kernels.aot import CHIPS, AotCase
from inferneo_kernels.attention_tile import (
    LOG2E,
    attend_tile,
    cache_rows,
    chip_of,
    dot_in_fp32,
    load_pages,
    load_tile,
    packed_heads,
    padded_head_dim,
    store_rows,
)


@triton.jit
def _find_sequence(query_start_loc_ptr, tile, num_seqs, BLOCK_Q: tl.constexpr):
    """The sequence that owns a tile: the last one whose first tile, start // BLOCK_Q + index, is not after it.

    Each sequence has room for its tiles and at most one surplus, so these numbers ascend and need no table.
    """
    low, high = 0, num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["num_seqs", "stride_table"])
def _prefill_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_tables_ptr,
    num_seqs,
    scale_log2e,
    stride_out_token,
    stride_q_token,
    stride_q_head,
    stride_block,
    stride_kv_head,
    stride_slot,
    stride_table,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SKIP_SINGLE: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
    """One tile of BLOCK_M // PACK query tokens, PACK heads each.

    Grid: (num_heads // PACK, num_tokens // BLOCK_Q + num_seqs). SKIP_SINGLE leaves sequences of one query token alone.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # a sequence's last tile sees the most keys: longest first
    seq = _find_sequence(query_start_loc_ptr, tile, num_seqs, BLOCK_Q)
    query_start = tl.load(query_start_loc_ptr + seq)
    query_len = tl.load(query_start_loc_ptr + seq + 1) - query_start
    tile_start = (tile - query_start // BLOCK_Q - seq) * BLOCK_Q
    if tile_start >= query_len:
        return
    if SKIP_SINGLE and query_len == 1:
        return

    index = tl.arange(0, BLOCK_M)
    query = tile_start + index // PACK
    head = tl.program_id(0) * PACK + index % PACK
    row_mask = (query < query_len) & (index < BLOCK_Q * PACK)
    token = (query_start + query).to(tl.int64)
    q = load_tile(q_ptr, token * stride_q_token + head * stride_q_head, row_mask, HEAD_DIM, BLOCK_D, True)
    if DOT_FP32:
        q = q.to(tl.float32)

    seq_len = tl.load(seq_lens_ptr + seq)
    first_position = seq_len - query_len + tile_start
    positions = first_position + index // PACK
    end = tl.minimum(first_position + BLOCK_Q, seq_len)
    full_end = tl.maximum(first_position + 1, 0) // BLOCK_N * BLOCK_N

    block_table_ptr = block_tables_ptr + seq.to(tl.int64) * stride_table
    kv_head = (tl.program_id(0) * PACK // GROUP).to(tl.int64)
    k_ptr += kv_head * stride_kv_head
    v_ptr += kv_head * stride_kv_head
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    pages = load_pages(block_table_ptr, 0, seq_len, BLOCK_N, BLOCK_SIZE)
    for diagonal in tl.static_range(2):
        start, stop = (full_end, end) if diagonal else (0, full_end)
        for first in range(start, stop, BLOCK_N):
            # Read a tile ahead: else the pipeline waits for the page number and keeps one tile in flight, not two.
            next_pages = load_pages(block_table_ptr, first + BLOCK_N, seq_len, BLOCK_N, BLOCK_SIZE)
            rows = cache_rows(pages, first, stride_block, stride_slot, BLOCK_N, BLOCK_SIZE)
            acc, row_max, row_sum = attend_tile(
                acc, row_max, row_sum, q, k_ptr, v_ptr, rows, first, positions, seq_len, scale_log2e,
                HEAD_DIM, BLOCK_D, BLOCK_N, diagonal == 1, DOT_FP32,
            )  # fmt: skip
            pages = next_pages
    attended = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]  # an empty sequence has no keys: zeros
    store_rows(out_ptr, token * stride_out_token + head * HEAD_DIM, row_mask, attended, HEAD_DIM, BLOCK_D)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """A tile of block_m rows (query tokens times packed heads) by block_n keys, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def prefill_config(head_dim: int, fp32: bool, chip: int) -> PrefillConfig:
    """The tile for a head size, products in fp32 or not, and a chip, as 90 for sm_90.

    None spills, and all leave the K order of a query's sum to block_n alone: it does not depend on the batch.
    """
    if fp32:  # for exactness, not speed: FMAs hold both operands in registers, and a second stage spills
        return PrefillConfig(32, 16, 8, 1)
    if head_dim > 128:  # 128 rows spill 272 bytes on sm_80 and 336 on sm_120
        return PrefillConfig(64, 32, 8, 2)
    if 32 < head_dim <= 64 and chip < 120:  # on sm_120 it spills 8 bytes
        return PrefillConfig(128, 128, 8, 3)
    if chip < 90 and head_dim > 64:  # 64 keys need 223 registers with Triton 3.7, and spill 64 bytes with 3.9
        return PrefillConfig(128, 32, 8, 3)
    return PrefillConfig(128, 64, 8, 3)  # 190 registers and 128 KB on sm_90; 4 warps spill


def attention_prefill(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    *,
    skip_single: bool = False,
    config: PrefillConfig | None = None,
) -> None:
    """Causal attention of every sequence's query tokens over its own keys; shapes as in `attention.attention`.

    Args:
        out: [num_tokens, num_heads * head_dim], dtype of q; written. Rows that belong to no sequence stay as they are.
        skip_single: leave out sequences with one query token; the decode kernel has them.
        config: the tile; None takes that of `prefill_config`.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_seqs = seq_lens.shape[0]
    fp32 = dot_in_fp32(_prefill_kernel, q, k_cache)
    config = config or prefill_config(head_dim, fp32, chip_of(q))
    pack = packed_heads(num_heads, num_kv_heads, config.block_m)
    block_q = config.block_m // pack
    _prefill_kernel[(num_heads // pack, num_tokens // block_q + num_seqs)](
        out,
        q,
        k_cache,
        v_cache,
        query_start_loc,
        seq_lens,
        block_tables,
        num_seqs,
        LOG2E / math.sqrt(head_dim),
        out.stride(0),
        *q.stride()[:2],
        *k_cache.stride()[:3],
        block_tables.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_SIZE=block_size,
        GROUP=num_heads // num_kv_heads,
        PACK=pack,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SKIP_SINGLE=skip_single,
        DOT_FP32=fp32,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _aot_case(
    name: str, dtype: str, cache_dtype: str, head_dim: int, group: int, block_size: int, chip: int
) -> AotCase:
    fp32 = "fp32" in (dtype, cache_dtype)
    config = prefill_config(head_dim, fp32, chip)
    pack = packed_heads(group, 1, config.block_m)
    pointers = {
        **dict.fromkeys(("out_ptr", "q_ptr"), f"*{dtype}"),
        **dict.fromkeys(("k_ptr", "v_ptr"), f"*{cache_dtype}"),
        **dict.fromkeys(("query_start_loc_ptr", "seq_lens_ptr", "block_tables_ptr"), "*i32"),
    }
    strides = ("stride_out_token", "stride_q_token", "stride_q_head", "stride_block", "stride_kv_head", "stride_slot")
    return AotCase(
        name=f"{name}_sm{chip}",
        kernel=_prefill_kernel,
        signature={**pointers, **dict.fromkeys((*strides, "stride_table", "num_seqs"), "i32"), "scale_log2e": "fp32"},
        constexprs={
            "HEAD_DIM": head_dim,
            "BLOCK_D": padded_head_dim(head_dim),
            "BLOCK_SIZE": block_size,
            "GROUP": group,
            "PACK": pack,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "SKIP_SINGLE": True,
            "DOT_FP32": fp32,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible_by_16=(*pointers, *strides),
        expect=("ld.v4",) if fp32 else ("mma", "wgmma", "cp.async", "ld.v4"),
        chips=(chip,),
    )


def aot_cases() -> tuple[AotCase, ...]:
    """Llama's head sizes in every dtype that the engine serves; the tile differs from chip to chip."""
    shapes = (
        ("bf16_d64_g4", "bf16", "bf16", 64, 4, 16),
        ("bf16_d64_g3", "bf16", "bf16", 64, 3, 16),
        ("bf16_d80", "bf16", "bf16", 80, 1, 16),
        ("bf16_d128_g4", "bf16", "bf16", 128, 4, 16),
        ("bf16_d128_g8_page64", "bf16", "bf16", 128, 8, 64),
        ("fp16_d128_g4", "fp16", "fp16", 128, 4, 16),
        ("bf16_d256_g4", "bf16", "bf16", 256, 4, 16),
        ("fp32_d64_g3", "fp32", "fp32", 64, 3, 16),
        ("fp32_d128_g4", "fp32", "fp32", 128, 4, 16),
        ("fp32_d128_g4_bf16_cache", "fp32", "bf16", 128, 4, 16),
        ("fp32_d256_g4_bf16_cache", "fp32", "bf16", 256, 4, 16),
    )
    return tuple(_aot_case(*shape, chip) for shape in shapes for chip in CHIPS)
