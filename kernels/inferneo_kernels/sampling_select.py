"""The last of the sampler's steps for rows with filters: cut a row's tokens, and draw from those that are left.

Every filter is one operation: the cut of the shortest prefix of some order whose mass reaches a target. Mass is an
integer, so the cut is found digit by digit, from the highest, by sums that are exact in any order. No sort, and ties
need no care: an id is part of its token.

Source: top-p, arXiv 1904.09751; typical, arXiv 2202.00666; min-p, arXiv 2407.01082.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from inferneo_kernels.aot import AotCase
from inferneo_kernels.sampling_math import (
    ID_BITS,
    ID_MASK,
    LOWEST_KEY,
    MIN_P,
    NO_TOKEN,
    NUM_FLOATS,
    NUM_INTS,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    difference,
    gumbel_at,
    key_value,
    pack_token,
    scaled,
    surprise,
    token_id,
    token_key,
    value_key,
    weight,
)

UNDECIDED = tl.constexpr(-2)  # a token id that a later kernel replaces

# Columns of the state, int64 [num_seqs, NUM_STATES]: the largest value's key, the least candidate's key, how many
# candidates there are, and over the whole row the sums of weights and of surprises.
LARGEST, BOUND, COUNT, MASS, SURPRISE, NUM_STATES = (tl.constexpr(i) for i in range(6))

ORDER_BITS = tl.constexpr(54)  # of a token: 32 of value, 22 of id
BY_COUNT, BY_TYPICAL, BY_MASS = (tl.constexpr(i) for i in range(3))  # what a prefix is cut by

CAPACITY = 4096  # candidates a row


class SelectConfig(NamedTuple):
    """One launch of `select`.

    Attributes:
        held: tokens in registers.
        whole_row: whether it walks over the logits, not over at most `held` candidates.
        digit_bits: bits of a cut that one sum decides. Each doubles the registers of a sum: with a bit more, the second
            spills 24 bytes a thread and the third 296.
        num_warps: sums across 4 warps are faster than across 16.
    """

    held: int
    whole_row: bool
    digit_bits: int
    num_warps: int


# The first decides what top-k leaves of most rows; each of the others, rows that the one before could not.
SELECT_CONFIGS = (
    SelectConfig(512, False, 3, 4),
    SelectConfig(CAPACITY, False, 2, 8),
    SelectConfig(2048, True, 2, 16),
)


@triton.jit
def _load_tokens(row_ptr, floats_row_ptr, count, tile, N: tl.constexpr, WHOLE_ROW: tl.constexpr):
    """N tokens of a row: of its candidates, or of all; NO_TOKEN past the end and where the value is -inf."""
    index = tile * N + tl.arange(0, N)
    if WHOLE_ROW:
        z = scaled(tl.load(row_ptr + index, mask=index < count, other=-float("inf")).to(tl.float32), floats_row_ptr)
        return tl.where(z > -float("inf"), pack_token(z, index), NO_TOKEN)
    else:
        return tl.where(index < count, tl.load(row_ptr + index), NO_TOKEN)


@triton.jit
def _distance(tokens, largest):
    """How far each token's value lies below the largest, as a difference <= 0; 0 for NO_TOKEN."""
    return difference(tl.where(tokens > NO_TOKEN, key_value(token_key(tokens)), largest), largest)


@triton.jit
def _typical_order(tokens, d, mean):
    """The order of typical sampling, as tokens are ordered: the nearest surprise to the mean, then the lowest id."""
    return ((0xFFFFFFFF - value_key(tl.abs(-d - mean))) << ID_BITS) | (tokens & ID_MASK)


@triton.jit
def _is_kept(tokens, typical_order, cut, typical_cut):
    """Which tokens stand no lower than the cuts, in the order of value and in the typical one."""
    return (tokens > NO_TOKEN) & (tokens >= cut) & (typical_order >= typical_cut)


@triton.jit
def _ordered_mass(
    row_ptr,
    floats_row_ptr,
    count,
    tile,
    largest,
    mean,
    cut,
    typical_cut,
    BY: tl.constexpr,
    N: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    """N tokens in the order of a filter, and what each adds to the mass of a prefix: 0 where it is not kept."""
    tokens = _load_tokens(row_ptr, floats_row_ptr, count, tile, N, WHOLE_ROW)
    d = _distance(tokens, largest)
    typical_order = _typical_order(tokens, d, mean)
    kept = _is_kept(tokens, typical_order, cut, typical_cut)
    order = typical_order if BY == BY_TYPICAL else tokens
    mass = kept.to(tl.int64) if BY == BY_COUNT else tl.where(kept, weight(d), 0)
    return order, mass


@triton.jit
def _prefix_cut(
    row_ptr,
    floats_row_ptr,
    count,
    largest,
    mean,
    cut,
    typical_cut,
    target,
    BY: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    N: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    """The last of the shortest prefix of the kept tokens whose mass is at least `target`; 0 if all of it is not enough.

    Found as a number is guessed: at each digit, the largest whose tokens, with those above them, hold the target.
    """
    args = (largest, mean, cut, typical_cut)
    order, mass = _ordered_mass(row_ptr, floats_row_ptr, count, 0, *args, BY, N, WHOLE_ROW)
    found, remaining = cut * 0, target
    BASE: tl.constexpr = 2**DIGIT_BITS
    lanes = tl.arange(0, BASE)  # the digits
    for bits_left in range(ORDER_BITS, 0, -DIGIT_BITS):
        shift = bits_left - DIGIT_BITS
        masses = tl.zeros((BASE, N), tl.int64)
        for tile in range(tl.cdiv(count, N) if WHOLE_ROW else 1):
            if WHOLE_ROW:
                order, mass = _ordered_mass(row_ptr, floats_row_ptr, count, tile, *args, BY, N, WHOLE_ROW)
            digit = (order >> shift) - (found >> shift)  # a digit where the prefix is the one found so far
            in_prefix = tl.where(digit < BASE, mass, 0)
            masses += tl.where(digit[None, :] >= lanes[:, None], in_prefix[None, :], 0)
        reached = tl.sum(masses, axis=1)  # by tokens with this digit or a higher one
        chosen = tl.max(tl.where(reached >= remaining, lanes, 0), axis=0)
        found |= chosen.to(tl.int64) << shift
        remaining -= tl.max(tl.where(lanes > chosen, reached, 0), axis=0)
    return found


@triton.jit
def _totals(row_ptr, floats_row_ptr, count, largest, mean, cut, typical_cut, N: tl.constexpr, WHOLE_ROW: tl.constexpr):
    """Over the kept tokens: the sums of weights and of surprises, and the largest weight."""
    masses, surprises, most = tl.zeros((N,), tl.int64), tl.zeros((N,), tl.int64), tl.zeros((N,), tl.int64)
    for tile in range(tl.cdiv(count, N) if WHOLE_ROW else 1):
        tokens = _load_tokens(row_ptr, floats_row_ptr, count, tile, N, WHOLE_ROW)
        d = _distance(tokens, largest)
        kept = _is_kept(tokens, _typical_order(tokens, d, mean), cut, typical_cut)
        w = tl.where(kept, weight(d), 0)
        masses, most = masses + w, tl.maximum(most, w)
        surprises += tl.where(kept, surprise(d), 0)
    return tl.sum(masses, axis=0), tl.sum(surprises, axis=0), tl.max(most, axis=0)


@triton.jit
def _draw(
    row_ptr,
    floats_row_ptr,
    ints_row_ptr,
    count,
    largest,
    mean,
    cut,
    typical_cut,
    floor,
    N: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    """The kept token with the largest Gumbel score, of those that weigh at least `floor`."""
    best = tl.full((N,), NO_TOKEN, tl.int64)
    for tile in range(tl.cdiv(count, N) if WHOLE_ROW else 1):
        tokens = _load_tokens(row_ptr, floats_row_ptr, count, tile, N, WHOLE_ROW)
        d = _distance(tokens, largest)
        kept = _is_kept(tokens, _typical_order(tokens, d, mean), cut, typical_cut) & (weight(d) >= floor)
        if tl.max(kept.to(tl.int32), axis=0) != 0:
            ids = token_id(tokens).to(tl.int32)
            scores = tl.where(kept, key_value(token_key(tokens)), 0.0) + gumbel_at(ints_row_ptr, ids)
            best = tl.maximum(best, tl.where(kept, pack_token(scores, ids), NO_TOKEN))
    return tl.max(best, axis=0)


@triton.jit
def _share(p, mass):
    """trunc(fp64(p) * fp64(mass)), and at least 1."""
    share = p.to(tl.float64) * mass.to(tl.float64)
    return tl.where(share >= 1.0, share, 1.0).to(tl.int64)


@triton.jit
def _select_kernel(
    token_ids_ptr,
    row_ptr,
    floats_ptr,
    ints_ptr,
    state_ptr,
    vocab_size,
    stride_row,
    DIGIT_BITS: tl.constexpr,
    N: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    """One undecided row: filters, then the draw. Grid: (num_seqs,).

    row_ptr: the candidates, of which at most N are held at once, or where WHOLE_ROW the logits.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(token_ids_ptr + row) != UNDECIDED:
        return
    floats_row_ptr, ints_row_ptr = floats_ptr + row * NUM_FLOATS, ints_ptr + row * NUM_INTS
    state_row_ptr, row_ptr = state_ptr + row * NUM_STATES, row_ptr + row * stride_row
    count = tl.load(state_row_ptr + COUNT)
    if WHOLE_ROW:
        count = count * 0 + vocab_size
    elif count > N:
        return
    largest, bound = key_value(tl.load(state_row_ptr + LARGEST)), tl.load(state_row_ptr + BOUND)
    mass, surprises = tl.load(state_row_ptr + MASS), tl.load(state_row_ptr + SURPRISE)
    cut, typical_cut, floor, mean = mass * 0, mass * 0, mass * 0, tl.zeros((), tl.float32)
    most = mass * 0 + (1 << 40)  # the weight of the largest value
    # Whatever is no candidate lies at this difference or below. `complete`: that nothing kept so far is missing.
    lowest = difference(key_value(bound), largest)
    complete = (bound <= LOWEST_KEY) | WHOLE_ROW
    decided = True

    top_k = tl.load(ints_row_ptr + TOP_K)
    if (top_k > 0) & (top_k < vocab_size):
        complete = complete | (count >= top_k)
        decided = complete
        kept = (row_ptr, floats_row_ptr, count, largest, mean, cut, typical_cut)
        cut = _prefix_cut(*kept, top_k, BY_COUNT, DIGIT_BITS, N, WHOLE_ROW)
        mass, surprises, most = _totals(row_ptr, floats_row_ptr, count, largest, mean, cut, typical_cut, N, WHOLE_ROW)

    typical_p = tl.load(floats_row_ptr + TYPICAL_P)
    if typical_p < 1.0:
        mean = (surprises.to(tl.float64) / mass.to(tl.float64)).to(tl.float32)
        kept = (row_ptr, floats_row_ptr, count, largest, mean, cut, typical_cut)
        typical_cut = _prefix_cut(*kept, _share(typical_p, mass), BY_TYPICAL, DIGIT_BITS, N, WHOLE_ROW)
        reach = key_value(0xFFFFFFFF - token_key(typical_cut))  # the kept surprises are this near to the mean
        complete = complete | ((typical_cut > 0) & (-lowest >= mean) & (reach < -lowest - mean))
        decided = decided & complete
        mass, surprises, most = _totals(row_ptr, floats_row_ptr, count, largest, mean, cut, typical_cut, N, WHOLE_ROW)

    top_p = tl.load(floats_row_ptr + TOP_P)
    if top_p < 1.0:
        kept = (row_ptr, floats_row_ptr, count, largest, mean, cut, typical_cut)
        mass_cut = _prefix_cut(*kept, _share(top_p, mass), BY_MASS, DIGIT_BITS, N, WHOLE_ROW)
        cut, complete = tl.maximum(cut, mass_cut), complete | (mass_cut > 0)
        decided = decided & complete

    min_p = tl.load(floats_row_ptr + MIN_P)
    if min_p > 0.0:
        floor = (tl.minimum(min_p, 1.0).to(tl.float64) * most.to(tl.float64)).to(tl.int64)
        heaviest = weight(lowest)  # of what is missing, but for the last bits of exp, which need not be monotone
        decided = decided & (complete | (heaviest + (heaviest >> 16) + 1 < floor))

    if decided:
        best = _draw(row_ptr, floats_row_ptr, ints_row_ptr, count, largest, mean, cut, typical_cut, floor, N, WHOLE_ROW)
        tl.store(token_ids_ptr + row, tl.where(best == NO_TOKEN, -1, token_id(best)))


def select(token_ids: Tensor, candidates: Tensor, source: Tensor, floats: Tensor, ints: Tensor, state: Tensor) -> None:
    """Replace every UNDECIDED token id by the draw from the row's filtered tokens, or by -1.

    Args:
        token_ids: [num_seqs] int64; written.
        candidates: [num_seqs, CAPACITY] int64 tokens.
        source: [num_seqs, vocab_size] logits after penalties and biases, innermost stride 1.
        floats, ints: as in SamplingBatch.
        state: [num_seqs, NUM_STATES] int64.
    """
    num_seqs, vocab_size = source.shape
    for config in SELECT_CONFIGS:
        tokens = source if config.whole_row else candidates
        _select_kernel[(num_seqs,)](
            token_ids,
            tokens,
            floats,
            ints,
            state,
            vocab_size,
            tokens.stride(0),
            DIGIT_BITS=config.digit_bits,
            N=config.held,
            WHOLE_ROW=config.whole_row,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )


def aot_cases() -> tuple[AotCase, ...]:
    """A vocabulary of 128,256, fp32 logits."""
    pointers = {"token_ids_ptr": "*i64", "floats_ptr": "*fp32", "ints_ptr": "*i64", "state_ptr": "*i64"}

    def case(config: SelectConfig) -> AotCase:
        signature = {
            **pointers,
            "row_ptr": "*fp32" if config.whole_row else "*i64",
            "vocab_size": "i32",
            "stride_row": "i32",
        }
        constexprs = {"DIGIT_BITS": config.digit_bits, "N": config.held, "WHOLE_ROW": config.whole_row}
        return AotCase(
            "whole_row" if config.whole_row else f"candidates_{config.held}",
            _select_kernel,
            signature,
            constexprs,
            config.num_warps,
            3,
            tuple(signature),
            ("ld.v4",),
            enable_fp_fusion=False,
        )

    return tuple(map(case, SELECT_CONFIGS))
