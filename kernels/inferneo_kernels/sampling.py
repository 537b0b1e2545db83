"""The sampler on the device: from logits to one token a row, the reference's tokens.

`scan` reads the logits once, the vocabulary split over programs: a greedy or plain row leaves each tile's best token,
and `merge` takes the best of those. A row with filters leaves maxima instead, from which `sampling_filters` goes on.
All grids follow from the shape of the logits, so a captured graph holds for any parameters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferneo_kernels.aot import AotCase
from inferneo_kernels.sampling_filters import (
    block_tokens,
    bound_rank,
    choose_filtered,
    filtered,
    lower_bound,
)
from inferneo_kernels.sampling_math import (
    COUNT_ROW,
    INV_TEMPERATURE,
    LOWEST_KEY,
    NAN_TOKEN,
    NO_TOKEN,
    NUM_FLOATS,
    NUM_INTS,
    TOP_K,
    biased,
    gumbel_tile,
    pack_token,
    penalised,
    scaled,
    token_id,
    value_key,
)
from inferneo_kernels.sampling_select import BOUND, LARGEST, NUM_STATES, UNDECIDED
from inferneo_kernels.scoring import score


@triton.jit
def best_token(z, scores, ids, inside):
    """The token with the largest score in the last dimension, an int64 for each row before it.

    Args:
        z: fp32 adjusted, scaled logits: a NaN among them makes it NAN_TOKEN, and -inf everywhere NO_TOKEN.
        scores: z, with Gumbel variates added where the row draws.
        ids, inside: the tokens' ids, and which of them exist.
    """
    tokens = tl.where(inside & (z > -float("inf")), pack_token(scores, ids), NO_TOKEN)
    return tl.max(tl.where(inside & (z != z), NAN_TOKEN, tokens), axis=len(z.shape) - 1)


@triton.jit
def adjusted_tile(
    logits_row_ptr,
    ids,
    inside,
    row,
    floats_row_ptr,
    ints_row_ptr,
    token_counts_ptr,
    stride_counts,
    bias_start_ptr,
    bias_ids_ptr,
    bias_values_ptr,
):
    """One row's logits after penalties and biases; fp32, -inf outside the vocabulary."""
    x = tl.load(logits_row_ptr + ids, mask=inside, other=-float("inf")).to(tl.float32)
    if token_counts_ptr is not None:
        count_row = tl.load(ints_row_ptr + COUNT_ROW)
        if count_row >= 0:
            counts = tl.load(token_counts_ptr + count_row * stride_counts + ids, mask=inside, other=0)
            x = penalised(x, counts, floats_row_ptr)
    if bias_start_ptr is not None:
        x = biased(x, ids, row, bias_start_ptr, bias_ids_ptr, bias_values_ptr)
    return x


@triton.jit
def _scan_kernel(
    logits_ptr,
    floats_ptr,
    ints_ptr,
    token_counts_ptr,
    bias_start_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    adjusted_ptr,
    best_ptr,
    maxima_ptr,
    vocab_size,
    stride_row,
    stride_counts,
    TILE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One tile of one row. Grid: (num_seqs, num_tiles).

    best_ptr [num_seqs, num_tiles] int64: receives the tile's best token, of a filtered row without a draw.
    maxima_ptr [num_seqs, num_tiles * TILE // BLOCK_TOKENS] int64: a filtered row's largest value key of every block;
    None: no row is filtered. adjusted_ptr [num_seqs, vocab_size] fp32: its logits after penalties and biases; None: it
    has none.
    """
    row = tl.program_id(0).to(tl.int64)
    tile, num_tiles = tl.program_id(1), tl.num_programs(1)
    floats_row_ptr, ints_row_ptr = floats_ptr + row * NUM_FLOATS, ints_ptr + row * NUM_INTS
    ids = tile * TILE + tl.arange(0, TILE)
    inside = ids < vocab_size
    x = adjusted_tile(
        logits_ptr + row * stride_row,
        ids,
        inside,
        row,
        floats_row_ptr,
        ints_row_ptr,
        token_counts_ptr,
        stride_counts,
        bias_start_ptr,
        bias_ids_ptr,
        bias_values_ptr,
    )
    z = scaled(x, floats_row_ptr)
    draws = tl.load(floats_row_ptr + INV_TEMPERATURE) != 0.0
    if maxima_ptr is not None:
        is_filtered = filtered(floats_row_ptr, ints_row_ptr, vocab_size)
        draws = draws & (is_filtered == 0)
        if is_filtered:
            if adjusted_ptr is not None:
                tl.store(adjusted_ptr + row * vocab_size + ids, x, mask=inside)
            # A block is a comb over the tile: likely tokens stand side by side, and each should lead a block of its
            # own.
            NUM_BLOCKS: tl.constexpr = TILE // BLOCK_TOKENS
            keys = tl.reshape(tl.where(inside, value_key(z), 0), (BLOCK_TOKENS, NUM_BLOCKS))
            block_ptrs = maxima_ptr + (row * num_tiles + tile) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS)
            tl.store(block_ptrs, tl.max(keys, axis=0))
    scores = z
    if draws:
        scores = z + gumbel_tile(ints_row_ptr, tile * (TILE // 4) + tl.arange(0, TILE // 4))
    best = best_token(z, scores, ids, inside)
    tl.store(best_ptr + row * num_tiles + tile, best)


@triton.jit
def _merge_kernel(
    token_ids_ptr,
    best_ptr,
    floats_ptr,
    ints_ptr,
    maxima_ptr,
    state_ptr,
    vocab_size,
    num_tiles,
    num_blocks,
    BLOCK_TILES: tl.constexpr,
    BLOCK_MAXIMA: tl.constexpr,
    RANK: tl.constexpr,
):
    """One row: the best of its tiles, or the state from which the filters go on. Grid: (num_seqs,)."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, BLOCK_TILES)
    best = tl.max(tl.load(best_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=NO_TOKEN), axis=0)
    choice = tl.where((best == NO_TOKEN) | (best == NAN_TOKEN), -1, token_id(best))
    if maxima_ptr is not None:
        ints_row_ptr = ints_ptr + row * NUM_INTS
        if filtered(floats_ptr + row * NUM_FLOATS, ints_row_ptr, vocab_size) & (best != NAN_TOKEN):
            blocks = tl.arange(0, BLOCK_MAXIMA)
            maxima = tl.load(maxima_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=0)
            largest = tl.max(maxima, axis=0)
            if largest >= LOWEST_KEY:
                columns = tl.arange(0, 8)
                bound = lower_bound(maxima, tl.load(ints_row_ptr + TOP_K), vocab_size, RANK)
                state = tl.where(columns == LARGEST, largest, tl.where(columns == BOUND, bound, 0))
                tl.store(state_ptr + row * NUM_STATES + columns, state, mask=columns < NUM_STATES)
                choice = choice * 0 + UNDECIDED
    tl.store(token_ids_ptr + row, choice)


def merge_best(
    best: Tensor,
    floats: Tensor | None = None,
    ints: Tensor | None = None,
    maxima: Tensor | None = None,
    state: Tensor | None = None,
    vocab_size: int = 0,
) -> Tensor:
    """The best token of every row's tiles.

    Args:
        best: [num_seqs, num_tiles] int64 tokens.
        floats, ints, maxima, state, vocab_size: for batches with filters, as `sample` has them; state is written for
            the rows whose token id is UNDECIDED.
    Returns:
        token_ids: [num_seqs] int64; -1 where a row has a NaN, or nothing that can be drawn.
    """
    num_seqs, num_tiles = best.shape
    num_blocks = 1 if maxima is None else maxima.shape[1]
    token_ids = torch.empty(num_seqs, dtype=torch.int64, device=best.device)
    if num_seqs:
        _merge_kernel[(num_seqs,)](
            token_ids,
            best,
            floats,
            ints,
            maxima,
            state,
            vocab_size,
            num_tiles,
            num_blocks,
            BLOCK_TILES=triton.next_power_of_2(num_tiles),
            BLOCK_MAXIMA=triton.next_power_of_2(num_blocks),
            RANK=0 if maxima is None else bound_rank(vocab_size),
            num_warps=8,
        )
    return token_ids


def scan_config(num_seqs: int, vocab_size: int) -> tuple[int, int]:
    """Tokens and warps a program of `scan` and `collect`.

    Few rows are cut fine, so that every SM has a part; many rows coarse: a program's fixed costs, and its sums across
    warps, are the same whatever it holds.
    """
    return (1024, 4) if num_seqs * vocab_size <= 1 << 21 else (2048, 8)


def sample(
    logits: Tensor,
    floats: Tensor,
    ints: Tensor,
    token_counts: Tensor | None,
    bias_start: Tensor | None,
    bias_ids: Tensor | None,
    bias_values: Tensor | None,
    num_logprobs: int,
    *,
    has_filters: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Choose one token a row, as Ops.sample defines it.

    Args:
        logits: [num_seqs, vocab_size] fp32 or bf16, innermost stride 1; not changed.
        floats, ints, token_counts, bias_start, bias_ids, bias_values, num_logprobs: as in SamplingBatch.
        has_filters: False where the host knows that no row has top-k, typical, top-p or min-p: five launches less.
    Returns:
        token_ids [num_seqs] int64, then logprobs, ranks, top_ids, top_logprobs as in SampleOutput; None without
        log-probabilities.
    """
    num_seqs, vocab_size = logits.shape
    device = logits.device
    tile, num_warps = scan_config(num_seqs, vocab_size)
    num_tiles, block = triton.cdiv(vocab_size, tile), block_tokens(vocab_size)
    num_blocks = num_tiles * tile // block
    best = torch.empty(num_seqs, num_tiles, dtype=torch.int64, device=device)
    maxima = state = adjusted = None
    if has_filters:
        maxima = torch.empty(num_seqs, num_blocks, dtype=torch.int64, device=device)
        state = torch.empty(num_seqs, NUM_STATES.value, dtype=torch.int64, device=device)
        if token_counts is not None or bias_start is not None:
            adjusted = torch.empty(num_seqs, vocab_size, dtype=torch.float32, device=device)
    if num_seqs:
        _scan_kernel[(num_seqs, num_tiles)](
            logits,
            floats,
            ints,
            token_counts,
            bias_start,
            bias_ids,
            bias_values,
            adjusted,
            best,
            maxima,
            vocab_size,
            logits.stride(0),
            0 if token_counts is None else token_counts.stride(0),
            TILE=tile,
            BLOCK_TOKENS=block,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    token_ids = merge_best(best, floats, ints, maxima, state, vocab_size)
    if num_seqs and state is not None:
        choose_filtered(token_ids, logits if adjusted is None else adjusted, floats, ints, state, tile, num_warps)
    if num_logprobs < 0:
        return token_ids, None, None, None, None
    return score(logits, token_ids, num_logprobs)


def aot_cases() -> tuple[AotCase, ...]:
    """A vocabulary of 128,256: plain draws, then rows with everything that the host can ask for."""
    parameters = {"logits_ptr": "*fp32", "floats_ptr": "*fp32", "ints_ptr": "*i64", "best_ptr": "*i64"}
    sizes = {"vocab_size": "i32", "stride_row": "i32"}
    extras = {
        "token_counts_ptr": "*i32",
        "bias_start_ptr": "*i32",
        "bias_ids_ptr": "*i32",
        "bias_values_ptr": "*fp32",
        "adjusted_ptr": "*fp32",
        "maxima_ptr": "*i64",
    }
    absent: dict[str, object] = dict.fromkeys(extras)
    merged = {"token_ids_ptr": "*i64", "best_ptr": "*i64", "floats_ptr": "*fp32", "ints_ptr": "*i64"}
    filters = {"maxima_ptr": "*i64", "state_ptr": "*i64"}
    tiles = {"num_tiles": "i32", "num_blocks": "i32"}
    blocks = {"BLOCK_TILES": 64, "BLOCK_MAXIMA": 4096, "RANK": 2048}

    def scan(name: str, given: dict[str, str], missing: dict[str, object], tile: int, num_warps: int) -> AotCase:
        signature = {**parameters, **given, **sizes, "stride_counts": "i32"}
        constexprs = {**missing, "TILE": tile, "BLOCK_TOKENS": 32}
        aligned = tuple(signature)
        return AotCase(
            name, _scan_kernel, signature, constexprs, num_warps, 3, aligned, ("ld.v4",), enable_fp_fusion=False
        )

    return (
        scan("scan_plain", {}, absent, 1024, 4),
        scan("scan_everything", extras, {}, 2048, 8),
        AotCase(
            "merge_plain",
            _merge_kernel,
            {"token_ids_ptr": "*i64", "best_ptr": "*i64", **tiles, "vocab_size": "i32"},
            {**blocks, "floats_ptr": None, "ints_ptr": None, "maxima_ptr": None, "state_ptr": None},
            8,
            3,
            ("token_ids_ptr", "best_ptr"),
        ),
        AotCase(
            "merge_head",
            _merge_kernel,
            {"token_ids_ptr": "*i64", "best_ptr": "*i64", **tiles, "vocab_size": "i32"},
            {
                **blocks,
                "BLOCK_TILES": 8192,
                "floats_ptr": None,
                "ints_ptr": None,
                "maxima_ptr": None,
                "state_ptr": None,
            },
            8,
            3,
            ("token_ids_ptr", "best_ptr"),
        ),
        AotCase(
            "merge_filters",
            _merge_kernel,
            {**merged, **filters, "vocab_size": "i32", **tiles},
            blocks,
            8,
            3,
            (*merged, *filters, "vocab_size", "num_blocks"),
        ),
    )
