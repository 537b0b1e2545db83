"""Attention of one query token a sequence over the paged cache: split-KV flash decoding.

A sequence's keys are cut into splits; a program takes one split of one KV head with all the query heads that share it,
and writes its weighted values, maximum and sum to a slot. The last program to finish a sequence merges them, always in
ascending order, so the result does not depend on which one was last.

The grid is fixed by what the host knows; which sequence and split a slot holds, each program finds from `seq_lens`. So
one captured graph serves every step, and a long sequence among short ones is cut into more splits.

Source: Flash-Decoding, crfm.stanford.edu/2023/10/12/flashdecoding.html; FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferneo_kernels.aot import AotCase
from inferneo_kernels.attention_split import find_split, merge_constants, merge_kernel, merge_splits
from inferneo_kernels.attention_tile import (
    LOG2E,
    attend_tile,
    cache_rows,
    dot_in_fp32,
    load_pages,
    load_tile,
    packed_heads,
    padded_head_dim,
    store_rows,
)

MAX_ROWS = 16  # query heads a program at most, the tensor cores' least: 32 spill 40 bytes on sm_90
MIN_CHUNK = 128  # tokens a split at least: below, merging costs more than walking on
INVARIANT_CHUNK = 256  # tokens a split in batch_invariant mode: 4 splits at 1k, and 4 KB of partials a 256 KB of keys


@triton.jit(do_not_specialize=["num_seqs", "num_extra", "stride_table"])
def _decode_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_tables_ptr,
    partials_ptr,
    row_max_ptr,
    row_sum_ptr,
    counters_ptr,
    plan_ptr,
    num_seqs,
    num_extra,
    scale_log2e,
    stride_out_token,
    stride_q_token,
    stride_q_head,
    stride_block,
    stride_kv_head,
    stride_slot,
    stride_table,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    FIXED: tl.constexpr,
    FUSED_MERGE: tl.constexpr,
    ROWS: tl.constexpr,
    MERGE: tl.constexpr,
    SEQ_TILE: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
    """One split of one sequence, PACK heads.

    Grid: (slots, num_heads // PACK). Without FUSED_MERGE the splits are left to `merge_kernel`, which reads from the
    plan, [num_seqs, 2] int32, a sequence's first slot and number of splits.
    """
    slot = tl.program_id(0)
    seq, first_slot, chunk = find_split(
        slot, query_start_loc_ptr, seq_lens_ptr, num_seqs, num_extra, CHUNK, FIXED, BLOCK_N, SEQ_TILE
    )
    if seq >= num_seqs:
        return
    split = slot - first_slot
    seq_len = tl.load(seq_lens_ptr + seq)
    num_splits = tl.maximum(tl.cdiv(seq_len, chunk), 1)
    if not FIXED:  # the same number of splits, but of even length
        chunk = tl.cdiv(tl.cdiv(seq_len, num_splits), BLOCK_N) * BLOCK_N

    index = tl.arange(0, BLOCK_M)
    first_head = tl.program_id(1) * PACK
    heads = first_head + index
    row_mask = index < PACK
    token = tl.load(query_start_loc_ptr + seq).to(tl.int64)
    q = load_tile(q_ptr, token * stride_q_token + heads * stride_q_head, row_mask, HEAD_DIM, BLOCK_D, True)
    if DOT_FP32:
        q = q.to(tl.float32)

    start = split * chunk
    end = tl.minimum(start + chunk, seq_len)
    full_end = start + (end - start) // BLOCK_N * BLOCK_N
    positions = tl.zeros([BLOCK_M], dtype=tl.int32) + (seq_len - 1)
    block_table_ptr = block_tables_ptr + seq.to(tl.int64) * stride_table
    kv_head = (first_head // GROUP).to(tl.int64)
    k_ptr += kv_head * stride_kv_head
    v_ptr += kv_head * stride_kv_head
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    pages = load_pages(block_table_ptr, start, seq_len, BLOCK_N, BLOCK_SIZE)
    for tail in tl.static_range(2):
        begin, stop = (full_end, end) if tail else (start, full_end)
        for first in range(begin, stop, BLOCK_N):
            next_pages = load_pages(block_table_ptr, first + BLOCK_N, seq_len, BLOCK_N, BLOCK_SIZE)  # as in prefill
            rows = cache_rows(pages, first, stride_block, stride_slot, BLOCK_N, BLOCK_SIZE)
            acc, row_max, row_sum = attend_tile(
                acc, row_max, row_sum, q, k_ptr, v_ptr, rows, first, positions, seq_len, scale_log2e,
                HEAD_DIM, BLOCK_D, BLOCK_N, tail == 1, DOT_FP32,
            )  # fmt: skip
            pages = next_pages

    out_rows = token * stride_out_token + heads * HEAD_DIM
    if not FUSED_MERGE and split == 0 and first_head == 0:
        tl.store(plan_ptr + 2 * seq, first_slot)
        tl.store(plan_ptr + 2 * seq + 1, num_splits)
    if num_splits == 1:
        attended = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]  # an empty sequence has no keys: zeros
        store_rows(out_ptr, out_rows, row_mask, attended, HEAD_DIM, BLOCK_D)
        return
    cells = slot.to(tl.int64) * NUM_HEADS + heads
    store_rows(partials_ptr, cells * HEAD_DIM, row_mask, acc, HEAD_DIM, BLOCK_D)
    tl.store(row_max_ptr + cells, row_max, mask=row_mask)
    tl.store(row_sum_ptr + cells, row_sum, mask=row_mask)
    if FUSED_MERGE:
        counter_ptr = counters_ptr + seq * tl.num_programs(1) + tl.program_id(1)
        tl.debug_barrier()  # the atomic is one thread's: its release covers the others' stores only behind a barrier
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived == num_splits - 1:
            tl.store(counter_ptr, 0)  # ready for the next launch, also when a graph replays it
            merge_splits(
                out_ptr + token * stride_out_token, partials_ptr, row_max_ptr, row_sum_ptr, first_slot, num_splits,
                first_head, NUM_HEADS, HEAD_DIM, BLOCK_D, PACK, ROWS, MERGE,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the decode kernel is compiled.

    Attributes:
        block_n: keys a tile.
        num_warps, num_stages: as Triton has them.
        fused_merge: whether the last program of a sequence merges its splits; otherwise a second launch does.
        seq_tile: sequences that a program looks at together when it seeks its own.
    """

    block_n: int
    num_warps: int
    num_stages: int
    fused_merge: bool = True
    seq_tile: int = 128


def decode_config(head_dim: int, fp32: bool) -> DecodeConfig:
    """The tile for a head size and products in fp32 or not; the same on every chip."""
    if fp32:
        return DecodeConfig(16, 8, 1)  # FMAs hold both operands in registers: 4 warps spill 1,216 bytes
    if head_dim > 128:
        return DecodeConfig(32, 4, 3)
    if head_dim != padded_head_dim(head_dim):  # the column masks take registers: 64 keys spill 8 bytes on sm_80
        return DecodeConfig(32, 4, 4)
    return DecodeConfig(64, 4, 3)  # 72 KB: three programs a multiprocessor


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """How finely one launch cuts its sequences.

    Attributes:
        num_slots: programs a KV head: the splits of all sequences at most.
        num_extra: of these, how many beyond one a sequence; 0 when splits have a fixed length.
        chunk: tokens a split: the fewest, or the fixed length.
        fixed: whether split boundaries depend on nothing but the sequence's own length.
    """

    num_slots: int
    num_extra: int
    chunk: int
    fixed: bool


def split_plan(num_seqs: int, max_seq_len: int, head_blocks: int, num_sms: int, fixed: bool) -> SplitPlan:
    """Enough splits to keep the chip busy, from what the host knows.

    Few programs fill the chip in one wave of two a multiprocessor; many get four waves, so that the last, partial one
    weighs little.
    """
    if fixed:
        return SplitPlan(num_seqs * max(1, -(-max_seq_len // INVARIANT_CHUNK)), 0, INVARIANT_CHUNK, True)
    per_sm = 2 if num_seqs * head_blocks <= num_sms else 8
    num_extra = -(-per_sm * num_sms // head_blocks)
    num_slots = min(num_seqs + num_extra, num_seqs * max(1, -(-max_seq_len // MIN_CHUNK)))
    return SplitPlan(num_slots, num_extra, MIN_CHUNK, False)


def attention_decode(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    counters: Tensor,
    plan: SplitPlan,
    config: DecodeConfig | None = None,
) -> None:
    """Attention of the sequences with one query token over their keys; shapes as in `attention.attention`.

    Args:
        out: [num_tokens, num_heads * head_dim], dtype of q; the rows of those sequences are written.
        counters: [at least num_seqs * num_heads] int32 zeros; zeros again afterwards.
        plan: of `split_plan`.
        config: the tile; None takes that of `decode_config`.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_seqs = seq_lens.shape[0]
    fp32 = dot_in_fp32(_decode_kernel, q, k_cache)
    config = config or decode_config(head_dim, fp32)
    partials = torch.empty(plan.num_slots, num_heads, head_dim, dtype=torch.float32, device=q.device)
    row_max, row_sum = torch.empty(2, plan.num_slots, num_heads, dtype=torch.float32, device=q.device)
    split_table = torch.empty(num_seqs, 2, dtype=torch.int32, device=q.device)
    tile = merge_constants(head_dim, packed_heads(num_heads, num_kv_heads, MAX_ROWS))
    head_blocks = head_blocks_of(num_heads, num_kv_heads)
    _decode_kernel[(plan.num_slots, head_blocks)](
        out,
        q,
        k_cache,
        v_cache,
        query_start_loc,
        seq_lens,
        block_tables,
        partials,
        row_max,
        row_sum,
        counters,
        split_table,
        num_seqs,
        plan.num_extra,
        LOG2E / math.sqrt(head_dim),
        out.stride(0),
        *q.stride()[:2],
        *k_cache.stride()[:3],
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        BLOCK_SIZE=block_size,
        GROUP=num_heads // num_kv_heads,
        BLOCK_M=MAX_ROWS,
        BLOCK_N=config.block_n,
        CHUNK=plan.chunk,
        FIXED=plan.fixed,
        FUSED_MERGE=config.fused_merge,
        SEQ_TILE=config.seq_tile,
        DOT_FP32=fp32,
        **tile,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if not config.fused_merge:
        merge_kernel[(num_seqs, head_blocks)](
            out, partials, row_max, row_sum, split_table, query_start_loc, num_heads, out.stride(0), **tile, num_warps=4
        )


def head_blocks_of(num_heads: int, num_kv_heads: int) -> int:
    """How many programs share a slot: one a KV head, more where 64 rows do not hold its query heads."""
    return num_heads // packed_heads(num_heads, num_kv_heads, MAX_ROWS)


def _aot_case(
    name: str, dtype: str, cache_dtype: str, heads: tuple[int, int], head_dim: int, block_size: int, fixed: bool = False
) -> AotCase:
    num_heads, num_kv_heads = heads
    fp32 = "fp32" in (dtype, cache_dtype)
    config = decode_config(head_dim, fp32)
    tile = merge_constants(head_dim, packed_heads(num_heads, num_kv_heads, MAX_ROWS))
    pointers = {
        **dict.fromkeys(("out_ptr", "q_ptr"), f"*{dtype}"),
        **dict.fromkeys(("k_ptr", "v_ptr"), f"*{cache_dtype}"),
        **dict.fromkeys(("query_start_loc_ptr", "seq_lens_ptr", "block_tables_ptr"), "*i32"),
        **dict.fromkeys(("partials_ptr", "row_max_ptr", "row_sum_ptr"), "*fp32"),
        **dict.fromkeys(("counters_ptr", "plan_ptr"), "*i32"),
    }
    strides = ("stride_out_token", "stride_q_token", "stride_q_head", "stride_block", "stride_kv_head", "stride_slot")
    return AotCase(
        name=name,
        kernel=_decode_kernel,
        signature={
            **pointers,
            **dict.fromkeys((*strides, "stride_table", "num_seqs", "num_extra"), "i32"),
            "scale_log2e": "fp32",
        },
        constexprs={
            **tile,
            "NUM_HEADS": num_heads,
            "BLOCK_SIZE": block_size,
            "GROUP": num_heads // num_kv_heads,
            "BLOCK_M": MAX_ROWS,
            "BLOCK_N": config.block_n,
            "CHUNK": INVARIANT_CHUNK if fixed else MIN_CHUNK,
            "FIXED": fixed,
            "FUSED_MERGE": config.fused_merge,
            "SEQ_TILE": config.seq_tile,
            "DOT_FP32": fp32,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible_by_16=(*pointers, *strides),
        expect=("ld.v4",) if fp32 else ("mma", "cp.async", "ld.v4"),
    )


def aot_cases() -> tuple[AotCase, ...]:
    """Llama's head layouts in every dtype that the engine serves."""
    return (
        _aot_case("bf16_d64_g4", "bf16", "bf16", (32, 8), 64, 16),
        _aot_case("bf16_d64_g3", "bf16", "bf16", (9, 3), 64, 16),
        _aot_case("bf16_d80_g1", "bf16", "bf16", (32, 32), 80, 16),
        _aot_case("bf16_d128_g4", "bf16", "bf16", (32, 8), 128, 16),
        _aot_case("bf16_d128_g4_invariant", "bf16", "bf16", (32, 8), 128, 16, fixed=True),
        _aot_case("bf16_d128_g8_page64", "bf16", "bf16", (64, 8), 128, 64),
        _aot_case("bf16_d128_g16", "bf16", "bf16", (32, 2), 128, 16),
        _aot_case("fp16_d128_g4", "fp16", "fp16", (32, 8), 128, 16),
        _aot_case("bf16_d256_g4", "bf16", "bf16", (16, 4), 256, 16),
        _aot_case("fp32_d64_g3", "fp32", "fp32", (9, 3), 64, 16),
        _aot_case("fp32_d128_g4", "fp32", "fp32", (32, 8), 128, 16),
        _aot_case("fp32_d128_g4_bf16_cache", "fp32", "bf16", (32, 8), 128, 16),
    )
