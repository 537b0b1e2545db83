"""From one decode step to the next, on the device: no byte goes through the host.

One program moves every running sequence past the token that it has just drawn, so that the captured step can be
replayed at once, before anybody has read that token.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from inferneo_kernels.aot import AotCase
from inferneo_kernels.sampling_math import COUNT_ROW, NUM_INTS, POSITION

BLOCK_BIASES = 1024  # biases looked at together


@dataclass(frozen=True, slots=True)
class DecodeState:
    """The static tensors that a captured decode step reads; `advance` writes all but the block tables.

    Attributes:
        token_ids, positions, slot_mapping: [num_seqs] int64, as ModelInput has them; slot -1 stores nothing.
        seq_lens: [num_seqs] int32; 0 marks a padding row, which stays as it is.
        block_tables: [num_seqs, max_blocks] int32; the block of the next position must stand there already.
        sampling_ints: [num_seqs, 5] int64, SamplingBatch.ints; its column POSITION moves on.
        token_counts: [num_rows, vocab_size] int32, SamplingBatch.token_counts; the drawn tokens of the rows that have
            a COUNT_ROW are counted.
        bias_start: [num_seqs + 1] int32; its last entry is the number of biases.
        bias_values: [max_biases] fp32; becomes 0 where a bias has run out.
        bias_steps: [max_biases] int32; the steps, from the first, that each bias is there for.
        ring: [ring_size, num_seqs] int64; step i leaves its tokens in row i % ring_size.
        step: [1] int64; how many steps have been taken.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    sampling_ints: Tensor
    token_counts: Tensor
    bias_start: Tensor
    bias_values: Tensor
    bias_steps: Tensor
    ring: Tensor
    step: Tensor


@triton.jit(do_not_specialize=["num_seqs", "max_blocks", "ring_size", "stride_table", "stride_ring"])
def _advance_kernel(
    sampled_ptr,
    token_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    seq_lens_ptr,
    block_tables_ptr,
    ints_ptr,
    token_counts_ptr,
    bias_start_ptr,
    bias_values_ptr,
    bias_steps_ptr,
    ring_ptr,
    step_ptr,
    num_seqs,
    max_blocks,
    ring_size,
    stride_table,
    stride_counts,
    stride_ring,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    BLOCK_BIASES: tl.constexpr,
):
    """All sequences. Grid: (1,)."""
    row = tl.arange(0, BLOCK_SEQS)
    inside = row < num_seqs
    seq_len = tl.load(seq_lens_ptr + row, mask=inside, other=0)
    live = seq_len > 0
    sampled = tl.load(sampled_ptr + row, mask=live, other=-1)
    step = tl.load(step_ptr)
    tl.store(ring_ptr + step % ring_size * stride_ring + row, sampled, mask=inside)

    # Where no token could be drawn the host ends the stream; until it has, token 0 stands in for an id to read.
    tl.store(token_ids_ptr + row, tl.maximum(sampled, 0), mask=live)
    tl.store(seq_lens_ptr + row, seq_len + 1, mask=live)
    position = tl.load(positions_ptr + row, mask=live, other=0) + 1
    tl.store(positions_ptr + row, position, mask=live)

    page = position // BLOCK_SIZE
    has_page = live & (page < max_blocks)
    block = tl.load(block_tables_ptr + row.to(tl.int64) * stride_table + page, mask=has_page, other=0).to(tl.int64)
    slot = tl.where(has_page, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(slot_mapping_ptr + row, slot, mask=live)

    draw_position_ptrs = ints_ptr + row * NUM_INTS + POSITION
    tl.store(draw_position_ptrs, tl.load(draw_position_ptrs, mask=live, other=0) + 1, mask=live)
    count_row = tl.load(ints_ptr + row * NUM_INTS + COUNT_ROW, mask=live, other=-1)
    counted = (count_row >= 0) & (sampled >= 0)
    count_ptrs = token_counts_ptr + count_row * stride_counts + sampled
    tl.store(count_ptrs, tl.load(count_ptrs, mask=counted, other=0) + 1, mask=counted)

    num_biases = tl.load(bias_start_ptr + num_seqs)
    for start in range(0, num_biases, BLOCK_BIASES):
        bias = start + tl.arange(0, BLOCK_BIASES)
        exists = bias < num_biases
        has_run_out = tl.load(bias_steps_ptr + bias, mask=exists, other=0) <= step + 1
        tl.store(bias_values_ptr + bias, 0.0, mask=exists & has_run_out)
    tl.store(step_ptr, step + 1)


def advance(sampled: Tensor, state: DecodeState, block_size: int) -> None:
    """Move every running sequence past its drawn token; writes `state` in place.

    Args:
        sampled: [num_seqs] int64, the tokens that this step drew; -1 where none could be.
        state: what the next step reads.
        block_size: tokens a block of the cache.
    """
    num_seqs, max_blocks = state.block_tables.shape
    _advance_kernel[(1,)](
        sampled,
        state.token_ids,
        state.positions,
        state.slot_mapping,
        state.seq_lens,
        state.block_tables,
        state.sampling_ints,
        state.token_counts,
        state.bias_start,
        state.bias_values,
        state.bias_steps,
        state.ring,
        state.step,
        num_seqs,
        max_blocks,
        state.ring.shape[0],
        state.block_tables.stride(0),
        state.token_counts.stride(0),
        state.ring.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK_SEQS=triton.next_power_of_2(num_seqs),
        BLOCK_BIASES=BLOCK_BIASES,
        num_warps=4,
    )


def aot_cases() -> tuple[AotCase, ...]:
    """256 sequences of a vocabulary of 128,256."""
    longs = ("sampled_ptr", "token_ids_ptr", "positions_ptr", "slot_mapping_ptr", "ints_ptr", "ring_ptr", "step_ptr")
    ints = ("seq_lens_ptr", "block_tables_ptr", "token_counts_ptr", "bias_start_ptr", "bias_steps_ptr")
    pointers = {**dict.fromkeys(longs, "*i64"), **dict.fromkeys(ints, "*i32"), "bias_values_ptr": "*fp32"}
    sizes = ("num_seqs", "max_blocks", "ring_size", "stride_table", "stride_counts", "stride_ring")
    signature = {**pointers, **dict.fromkeys(sizes, "i32")}
    blocks = {"BLOCK_SIZE": 16, "BLOCK_SEQS": 256, "BLOCK_BIASES": BLOCK_BIASES}
    return (AotCase("256_sequences", _advance_kernel, signature, blocks, 4, 1, (*pointers, "stride_counts")),)
