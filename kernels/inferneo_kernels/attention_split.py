"""How decode attention cuts sequences into splits, and merges what the splits found."""

from __future__ import annotations

import triton
import triton.language as tl

from inferneo_kernels.aot import AotCase
from inferneo_kernels.attention_tile import padded_head_dim, store_rows


@triton.jit
def _load_decodes(query_start_loc_ptr, seq_lens_ptr, start, num_seqs, SEQ_TILE: tl.constexpr):
    """The lengths of SEQ_TILE sequences from `start`, and which of them have one query token."""
    seqs = start + tl.arange(0, SEQ_TILE)
    exists = seqs < num_seqs
    begin = tl.load(query_start_loc_ptr + seqs, mask=exists, other=0)
    end = tl.load(query_start_loc_ptr + seqs + 1, mask=exists, other=0)
    return tl.load(seq_lens_ptr + seqs, mask=exists, other=0), end - begin == 1


@triton.jit
def find_split(
    slot,
    query_start_loc_ptr,
    seq_lens_ptr,
    num_seqs,
    num_extra,
    CHUNK: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEQ_TILE: tl.constexpr,
):
    """Which sequence a slot belongs to, the sequence's first slot, and the tokens a split; num_seqs for a surplus slot.

    With FIXED a split has CHUNK tokens. Otherwise CHUNK is the fewest, and more where the slots would not suffice: a
    sequence takes ceil(seq_len / chunk) slots, so num_seqs + num_extra hold them all if chunk >= tokens / num_extra.
    """
    chunk = CHUNK
    if not FIXED:
        num_tokens = 0
        for start in range(0, num_seqs, SEQ_TILE):
            seq_lens, decodes = _load_decodes(query_start_loc_ptr, seq_lens_ptr, start, num_seqs, SEQ_TILE)
            num_tokens += tl.sum(tl.where(decodes, seq_lens, 0))
        chunk = tl.cdiv(tl.maximum(CHUNK, tl.cdiv(num_tokens, num_extra)), BLOCK_N) * BLOCK_N
    seq, first_slot, num_slots = 0, 0, 0
    for start in range(0, num_seqs, SEQ_TILE):
        seq_lens, decodes = _load_decodes(query_start_loc_ptr, seq_lens_ptr, start, num_seqs, SEQ_TILE)
        slots = tl.where(decodes, tl.maximum(tl.cdiv(seq_lens, chunk), 1), 0)
        before = num_slots + tl.cumsum(slots, 0) <= slot
        seq += tl.sum(before.to(tl.int32))
        first_slot += tl.sum(tl.where(before, slots, 0))
        num_slots += tl.sum(slots)
    return tl.where(slot < num_slots, seq, num_seqs), first_slot, chunk


@triton.jit
def merge_splits(
    out_ptr,
    partials_ptr,
    row_max_ptr,
    row_sum_ptr,
    first_slot,
    num_splits,
    first_head,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Write PACK heads' softmax average over a sequence's splits, MERGE splits at a time in ascending order."""
    index = tl.arange(0, ROWS)
    heads = first_head + tl.minimum(index, PACK - 1)  # rows past PACK repeat the last head: valid memory, never stored
    columns = tl.arange(0, BLOCK_D)
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, num_splits, MERGE):
        splits = start + tl.arange(0, MERGE)
        cells = (first_slot + splits)[:, None].to(tl.int64) * num_heads + heads[None, :]
        exists = (splits < num_splits)[:, None]
        # Another SM wrote these: .cg reads them past this one's L1 cache.
        maxima = tl.load(row_max_ptr + cells, mask=exists, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(row_sum_ptr + cells, mask=exists, other=0.0, cache_modifier=".cg")
        values = tl.load(
            partials_ptr + cells[:, :, None] * HEAD_DIM + columns[None, None, :],
            mask=exists[:, :, None] & (columns < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_max = tl.maximum(row_max, tl.max(maxima, 0))
        weights = tl.exp2(maxima - new_max[None, :])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights * sums, 0)
        acc = acc * rescale[:, None] + tl.sum(weights[:, :, None] * values, 0)
        row_max = new_max
    store_rows(out_ptr, heads * HEAD_DIM, index < PACK, acc / row_sum[:, None], HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_heads"])
def merge_kernel(
    out_ptr,
    partials_ptr,
    row_max_ptr,
    row_sum_ptr,
    plan_ptr,
    query_start_loc_ptr,
    num_heads,
    stride_out_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    MERGE: tl.constexpr,
):
    """The second launch where the decode kernel does not merge by itself. Grid: (num_seqs, num_heads // PACK)."""
    seq = tl.program_id(0)
    token = tl.load(query_start_loc_ptr + seq).to(tl.int64)
    if tl.load(query_start_loc_ptr + seq + 1) - token != 1:  # not a decode: no plan was written
        return
    first_slot = tl.load(plan_ptr + 2 * seq)
    num_splits = tl.load(plan_ptr + 2 * seq + 1)
    if num_splits == 1:  # the decode kernel has written the result
        return
    merge_splits(
        out_ptr + token * stride_out_token, partials_ptr, row_max_ptr, row_sum_ptr, first_slot, num_splits,
        tl.program_id(1) * PACK, num_heads, HEAD_DIM, BLOCK_D, PACK, ROWS, MERGE,
    )  # fmt: skip


def merge_constants(head_dim: int, pack: int) -> dict[str, int]:
    """The constexprs of `merge_splits` for so many heads a program."""
    block_d, rows = padded_head_dim(head_dim), triton.next_power_of_2(pack)
    merge = max(1, 2048 // (rows * block_d))  # 16 registers a thread; 32 spill 8 bytes on sm_80
    return {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "PACK": pack, "ROWS": rows, "MERGE": merge}


def aot_cases() -> tuple[AotCase, ...]:
    """The second launch, at the head sizes of Llama."""
    pointers = {
        "out_ptr": "*bf16",
        **dict.fromkeys(("partials_ptr", "row_max_ptr", "row_sum_ptr"), "*fp32"),
        **dict.fromkeys(("plan_ptr", "query_start_loc_ptr"), "*i32"),
    }
    return tuple(
        AotCase(
            name=f"bf16_d{head_dim}_g{group}",
            kernel=merge_kernel,
            signature={**pointers, "num_heads": "i32", "stride_out_token": "i32"},
            constexprs=merge_constants(head_dim, group),
            num_warps=4,
            num_stages=3,
            divisible_by_16=(*pointers, "stride_out_token"),
            expect=("ld.v4",),
        )
        for head_dim, group in ((64, 3), (128, 4))
    )
