"""Top-k, typical, top-p and min-p on the device: exact, ties included, without a sort and without the host.

From the block maxima of a row, `lower_bound` finds a value that few tokens reach, at least as many as top-k keeps.
`collect` gathers those candidates, the vocabulary split over programs, and sums the row's mass; `select` filters them
and draws. `select` knows when the candidates cannot decide, as where top-p keeps tens of thousands of tokens: such a
row stays UNDECIDED, and its last launch walks over all of the row's logits instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferneo_kernels.aot import AotCase
from inferneo_kernels.sampling_math import (
    INV_TEMPERATURE,
    LOWEST_KEY,
    MIN_P,
    NUM_FLOATS,
    NUM_INTS,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    difference,
    key_value,
    pack_token,
    scaled,
    surprise,
    value_key,
    weight,
)
from inferneo_kernels.sampling_select import (
    BOUND,
    CAPACITY,
    COUNT,
    LARGEST,
    MASS,
    NUM_STATES,
    SURPRISE,
    UNDECIDED,
    select,
)

MAX_BLOCKS = 4096  # block maxima a row: the program that bounds the candidates holds them in registers


@triton.jit
def filtered(floats_row_ptr, ints_row_ptr, vocab_size):
    """Whether a row draws from less than its whole vocabulary."""
    top_k = tl.load(ints_row_ptr + TOP_K)
    below_one = (tl.load(floats_row_ptr + TOP_P) < 1.0) | (tl.load(floats_row_ptr + TYPICAL_P) < 1.0)
    any_filter = ((top_k > 0) & (top_k < vocab_size)) | below_one | (tl.load(floats_row_ptr + MIN_P) > 0.0)
    return any_filter & (tl.load(floats_row_ptr + INV_TEMPERATURE) != 0.0)


@triton.jit
def lower_bound(maxima, top_k, vocab_size, RANK: tl.constexpr):
    """A value key that at least min(top_k, RANK) tokens reach: the maximum of so many blocks does."""
    rank = tl.where((top_k > 0) & (top_k < vocab_size), tl.minimum(top_k, RANK), RANK)
    found = rank * 0
    for step in range(32):
        tried = found | (tl.full((), 1, tl.int64) << (31 - step))
        found = tl.where(tl.sum((maxima >= tried).to(tl.int32), axis=0) >= rank, tried, found)
    return tl.maximum(found, LOWEST_KEY)


@triton.jit
def _collect_kernel(
    token_ids_ptr,
    source_ptr,
    floats_ptr,
    ints_ptr,
    state_ptr,
    candidates_ptr,
    vocab_size,
    stride_row,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """One tile of one row. Grid: (num_seqs, num_tiles).

    Appends the tokens that reach the bound to candidates_ptr [num_seqs, CAPACITY] int64, in no order, and adds to the
    row's sums. Integers: the order in which programs arrive changes nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(token_ids_ptr + row) != UNDECIDED:
        return
    floats_row_ptr, ints_row_ptr = floats_ptr + row * NUM_FLOATS, ints_ptr + row * NUM_INTS
    state_row_ptr = state_ptr + row * NUM_STATES
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = ids < vocab_size
    x = tl.load(source_ptr + row * stride_row + ids, mask=inside, other=-float("inf")).to(tl.float32)
    z = scaled(x, floats_row_ptr)
    reaches = inside & (value_key(z) >= tl.load(state_row_ptr + BOUND))
    num_new = tl.sum(reaches.to(tl.int64), axis=0)
    if num_new > 0:
        first = tl.atomic_add(state_row_ptr + COUNT, num_new)
        place = first + tl.cumsum(reaches.to(tl.int32), axis=0) - 1
        tokens_ptr = candidates_ptr + row * CAPACITY + place
        tl.store(tokens_ptr, pack_token(z, ids), mask=reaches & (place < CAPACITY))

    top_k = tl.load(ints_row_ptr + TOP_K)
    by_typical = tl.load(floats_row_ptr + TYPICAL_P) < 1.0
    by_mass = by_typical | (tl.load(floats_row_ptr + TOP_P) < 1.0)
    if by_mass & ((top_k <= 0) | (top_k >= vocab_size)):  # after top-k, `select` sums what is left
        d = difference(z, key_value(tl.load(state_row_ptr + LARGEST)))  # -inf past the vocabulary: no mass
        tl.atomic_add(state_row_ptr + MASS, tl.sum(weight(d), axis=0))
        if by_typical:
            tl.atomic_add(state_row_ptr + SURPRISE, tl.sum(surprise(d), axis=0))


def block_tokens(vocab_size: int) -> int:
    """Tokens a block maximum stands for: as few as leave MAX_BLOCKS of them, and 32 where the vocabulary is small."""
    return max(32, 1 << (-(-vocab_size // MAX_BLOCKS) - 1).bit_length())


def bound_rank(vocab_size: int) -> int:
    """Which block maximum bounds the candidates, so that 0.7 * CAPACITY are expected.

    Where a share f of the tokens reaches a value, so does the maximum of a block of n with probability 1 - (1 - f)**n.
    Past MAX_BLOCKS there is no block, so that every token is a candidate.
    """
    share = 0.7 * CAPACITY / vocab_size
    block = block_tokens(vocab_size)
    num_blocks = triton.cdiv(vocab_size, block)
    return MAX_BLOCKS + 1 if share >= 1.0 else int(num_blocks * (1.0 - (1.0 - share) ** block))


def choose_filtered(
    token_ids: Tensor, source: Tensor, floats: Tensor, ints: Tensor, state: Tensor, tile: int, num_warps: int
) -> None:
    """Replace every UNDECIDED token id by the draw from the row's filtered tokens.

    Args:
        token_ids: [num_seqs] int64; written.
        source: [num_seqs, vocab_size] logits after penalties and biases, innermost stride 1.
        floats, ints: as in SamplingBatch.
        state: [num_seqs, NUM_STATES] int64 of the undecided rows, with LARGEST and BOUND set and the rest 0.
        tile, num_warps: of `collect`.
    """
    num_seqs, vocab_size = source.shape
    candidates = torch.empty(num_seqs, CAPACITY, dtype=torch.int64, device=source.device)
    _collect_kernel[(num_seqs, triton.cdiv(vocab_size, tile))](
        token_ids,
        source,
        floats,
        ints,
        state,
        candidates,
        vocab_size,
        source.stride(0),
        TILE=tile,
        CAPACITY=CAPACITY,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    select(token_ids, candidates, source, floats, ints, state)


def aot_cases() -> tuple[AotCase, ...]:
    """A vocabulary of 128,256, fp32 logits."""
    pointers = {"token_ids_ptr": "*i64", "floats_ptr": "*fp32", "ints_ptr": "*i64", "state_ptr": "*i64"}
    sizes = {"vocab_size": "i32", "stride_row": "i32"}
    signature = {**pointers, "source_ptr": "*fp32", "candidates_ptr": "*i64", **sizes}
    constexprs = {"TILE": 2048, "CAPACITY": CAPACITY}
    aligned = tuple(signature)
    return (
        AotCase("collect", _collect_kernel, signature, constexprs, 8, 3, aligned, ("ld.v4",), enable_fp_fusion=False),
    )
