"""Log-probabilities and ranks on the device: of drawn tokens, and of a prompt's.

Three kernels, the vocabulary split over programs: `tops` leaves every tile's most likely tokens, `masses` every tile's
share of the softmax's denominator and of the target's rank, `merge` joins them. The sums are of integers, so the result
does not depend on how the vocabulary is cut.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferneo_kernels.aot import AotCase
from inferneo_kernels.sampling_math import (
    NAN_TOKEN,
    NO_TOKEN,
    difference,
    key_value,
    log,
    pack_token,
    token_id,
    token_key,
    weight,
)

TILE = 1024
MERGED = 1024  # tokens of the tiles' lists that `merge` looks at together


@triton.jit
def _load_row(logits_row_ptr, ids, inside):
    return tl.load(logits_row_ptr + ids, mask=inside, other=-float("inf")).to(tl.float32)


@triton.jit
def _largest(tops_row_ptr, num_tiles, num_tops, BLOCK_TILES: tl.constexpr):
    """The most likely token of a row: the best of the tiles' firsts; NAN_TOKEN where there is a NaN."""
    tiles = tl.arange(0, BLOCK_TILES)
    return tl.max(tl.load(tops_row_ptr + tiles * num_tops, mask=tiles < num_tiles, other=NO_TOKEN), axis=0)


@triton.jit(do_not_specialize=["num_tops"])
def _tops_kernel(tops_ptr, logits_ptr, vocab_size, stride_row, num_tops, TILE: tl.constexpr):
    """The num_tops most likely tokens of a tile, in order. Grid: (num_rows, num_tiles).

    tops_ptr: [num_rows, num_tiles, num_tops] int64 tokens; NO_TOKEN past the last; NAN_TOKEN first where there is a
    NaN.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    inside = ids < vocab_size
    x = _load_row(logits_ptr + row * stride_row, ids, inside)
    tokens = tl.where(inside, tl.where(x != x, NAN_TOKEN, pack_token(x, ids)), NO_TOKEN)
    for place in range(num_tops):
        best = tl.max(tokens, axis=0)
        tl.store(tops_ptr + (row * tl.num_programs(1) + tile) * num_tops + place, best)
        tokens = tl.where(tokens == best, NO_TOKEN, tokens)


@triton.jit(do_not_specialize=["num_tops"])
def _masses_kernel(
    masses_ptr,
    above_ptr,
    tops_ptr,
    logits_ptr,
    targets_ptr,
    vocab_size,
    stride_row,
    num_tops,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """A tile's sum of weights, and how many of its tokens are likelier than the target. Grid: (num_rows, num_tiles)."""
    row, tile, num_tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    logits_row_ptr = logits_ptr + row * stride_row
    largest = _largest(tops_ptr + row * num_tiles * num_tops, num_tiles, num_tops, BLOCK_TILES)
    ids = tile * TILE + tl.arange(0, TILE)
    inside = ids < vocab_size
    x = _load_row(logits_row_ptr, ids, inside)
    mass, above = largest * 0, largest * 0
    if largest != NAN_TOKEN:
        mass = tl.sum(tl.where(inside, weight(difference(x, key_value(token_key(largest)))), 0), axis=0)
        target = tl.load(targets_ptr + row)
        if target >= 0:
            scored = pack_token(tl.load(logits_row_ptr + target).to(tl.float32), target)
            above = tl.sum((inside & (pack_token(x, ids) > scored)).to(tl.int64), axis=0)
    tl.store(masses_ptr + row * num_tiles + tile, mass)
    tl.store(above_ptr + row * num_tiles + tile, above)


@triton.jit(do_not_specialize=["num_tops", "num_reported"])
def _merge_kernel(
    logprobs_ptr,
    ranks_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    masses_ptr,
    above_ptr,
    tops_ptr,
    logits_ptr,
    targets_ptr,
    stride_row,
    num_tiles,
    num_tops,
    num_reported,
    BLOCK_TILES: tl.constexpr,
    MERGED: tl.constexpr,
):
    """One row. Grid: (num_rows,). num_reported: columns of the outputs, at most num_tops."""
    row = tl.program_id(0).to(tl.int64)
    tops_row_ptr = tops_ptr + row * num_tiles * num_tops
    largest = _largest(tops_row_ptr, num_tiles, num_tops, BLOCK_TILES)
    is_broken = largest == NAN_TOKEN
    largest_value = tl.where(is_broken, 0.0, key_value(token_key(largest)))
    tiles = tl.arange(0, BLOCK_TILES)
    mass = tl.sum(tl.load(masses_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=0), axis=0)
    above = tl.sum(tl.load(above_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=0), axis=0)
    log_mass = log(tl.where(is_broken, 1, mass).to(tl.float32) * 2.0**-40)

    target = tl.load(targets_ptr + row)
    is_absent = is_broken | (target < 0)
    value = tl.load(logits_ptr + row * stride_row + target, mask=target >= 0, other=0.0).to(tl.float32)
    logprob = tl.where(is_absent, 0.0, difference(value, largest_value) - log_mass)
    tl.store(logprobs_ptr + row, tl.where(is_absent, float("nan"), logprob))
    tl.store(ranks_ptr + row, tl.where(is_absent, 0, above + 1))

    previous = largest * 0 + NAN_TOKEN
    for place in range(num_reported):
        best = largest * 0
        for first in range(0, num_tiles * num_tops, MERGED):
            index = first + tl.arange(0, MERGED)
            tokens = tl.load(tops_row_ptr + index, mask=index < num_tiles * num_tops, other=NO_TOKEN)
            best = tl.maximum(best, tl.max(tl.where(tokens < previous, tokens, NO_TOKEN), axis=0))
        previous = best
        value = tl.where(is_broken, 0.0, key_value(token_key(best)))
        top_logprob = difference(value, largest_value) - log_mass
        tl.store(top_ids_ptr + row * num_reported + place, tl.where(is_broken, -1, token_id(best)))
        tl.store(top_logprobs_ptr + row * num_reported + place, tl.where(is_broken, float("nan"), top_logprob))


def score(logits: Tensor, targets: Tensor, num_logprobs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities and ranks of given tokens, and each row's most likely ones, as Ops.score defines them.

    Args:
        logits: [num_rows, vocab_size] fp32 or bf16, innermost stride 1.
        targets: [num_rows] int64; -1: none.
        num_logprobs: tokens to report a row, from 0 to vocab_size.
    Returns:
        targets, then logprobs [num_rows] fp32, ranks [num_rows] int64, top_ids [num_rows, num_logprobs] int64 and
        top_logprobs of the same shape, fp32.
    """
    num_rows, vocab_size = logits.shape
    device = logits.device
    num_tiles, num_tops = triton.cdiv(vocab_size, TILE), max(num_logprobs, 1)
    block_tiles = triton.next_power_of_2(num_tiles)
    tops = torch.empty(num_rows, num_tiles, num_tops, dtype=torch.int64, device=device)
    masses, above = (torch.empty(num_rows, num_tiles, dtype=torch.int64, device=device) for _ in range(2))
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    ranks = torch.empty(num_rows, dtype=torch.int64, device=device)
    top_ids = torch.empty(num_rows, num_logprobs, dtype=torch.int64, device=device)
    top_logprobs = torch.empty(num_rows, num_logprobs, dtype=torch.float32, device=device)
    if num_rows:
        grid = (num_rows, num_tiles)
        _tops_kernel[grid](tops, logits, vocab_size, logits.stride(0), num_tops, TILE=TILE, num_warps=4)
        _masses_kernel[grid](
            masses,
            above,
            tops,
            logits,
            targets,
            vocab_size,
            logits.stride(0),
            num_tops,
            TILE=TILE,
            BLOCK_TILES=block_tiles,
            num_warps=4,
            enable_fp_fusion=False,
        )
        _merge_kernel[(num_rows,)](
            logprobs,
            ranks,
            top_ids,
            top_logprobs,
            masses,
            above,
            tops,
            logits,
            targets,
            logits.stride(0),
            num_tiles,
            num_tops,
            num_logprobs,
            BLOCK_TILES=block_tiles,
            MERGED=MERGED,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return targets, logprobs, ranks, top_ids, top_logprobs


def aot_cases() -> tuple[AotCase, ...]:
    """A vocabulary of 128,256, fp32 logits."""
    logits, sizes = {"logits_ptr": "*fp32"}, {"vocab_size": "i32", "stride_row": "i32"}
    tops = {"tops_ptr": "*i64", **logits, **sizes}
    sums = {"masses_ptr": "*i64", "above_ptr": "*i64", "targets_ptr": "*i64"}
    outputs = {"logprobs_ptr": "*fp32", "ranks_ptr": "*i64", "top_ids_ptr": "*i64", "top_logprobs_ptr": "*fp32"}
    merge = {**outputs, **sums, "tops_ptr": "*i64", **logits, "stride_row": "i32", "num_tiles": "i32"}
    counts = {"num_tops": "i32", "num_reported": "i32"}
    tiles, vectors = {"TILE": TILE, "BLOCK_TILES": 128}, ("ld.v4",)
    return (
        AotCase("tops", _tops_kernel, {**tops, "num_tops": "i32"}, {"TILE": TILE}, 4, 3, tuple(tops), vectors),
        AotCase(
            "masses",
            _masses_kernel,
            {**sums, **tops, "num_tops": "i32"},
            tiles,
            4,
            3,
            (*sums, *tops),
            vectors,
            enable_fp_fusion=False,
        ),
        AotCase(
            "merge",
            _merge_kernel,
            {**merge, **counts},
            {"BLOCK_TILES": 128, "MERGED": MERGED},
            4,
            3,
            tuple(name for name in merge if name != "num_tiles"),
            enable_fp_fusion=False,
        ),
    )
