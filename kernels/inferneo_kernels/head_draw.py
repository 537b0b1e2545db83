"""The output head and the draw in one: greedy and plain draws never write their logits.

A program multiplies a tile of the vocabulary with some of the rows, the weight dense or unpacked in registers, in the
forms of `linear_tile`. It then adjusts, scales and scores the tile where it stands, and leaves each row's best token.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferneo_kernels.aot import AotCase
from inferneo_kernels.linear import Regime, Tiling, choose_tiling, launch_constants
from inferneo_kernels.linear_tile import products
from inferneo_kernels.quant_decode import plane_signature
from inferneo_kernels.quant_layout import Weight
from inferneo_kernels.sampling import best_token, merge_best
from inferneo_kernels.sampling_math import (
    COUNT_ROW,
    INV_TEMPERATURE,
    NO_TOKEN,
    NUM_FLOATS,
    NUM_INTS,
    biased,
    gumbel_tile,
    penalised,
    scaled,
)

MIN_TILE = 16  # tokens a program at least: of fewer, a large vocabulary leaves too many bests to merge


@triton.jit
def _adjusted(
    logits,
    ids,
    inside,
    row,
    first_seq,
    num_seqs,
    floats_row_ptr,
    ints_row_ptr,
    token_counts_ptr,
    stride_counts,
    bias_start_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    BLOCK_M: tl.constexpr,
):
    """logits [BLOCK_M, BLOCK_N] after each row's penalties and biases, where there are any; row: [BLOCK_M, 1]."""
    if token_counts_ptr is not None:
        count_row = tl.load(ints_row_ptr + COUNT_ROW)
        has_counts = inside & (count_row >= 0)
        counts = tl.load(token_counts_ptr + count_row * stride_counts + ids, mask=has_counts, other=0)
        logits = penalised(logits, counts, floats_row_ptr)
    if bias_start_ptr is not None:
        for seq in range(first_seq, tl.minimum(first_seq + BLOCK_M, num_seqs)):
            own_ids = tl.where(row == seq, ids, -1)
            logits = biased(logits, own_ids, seq, bias_start_ptr, bias_ids_ptr, bias_values_ptr)
    return logits


@triton.jit(do_not_specialize=["num_seqs"])
def _head_draw_kernel(
    best_ptr,
    x_ptr,
    codes_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    bias_ptr,
    floats_ptr,
    ints_ptr,
    token_counts_ptr,
    bias_start_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    num_seqs,
    vocab_size,
    K,
    stride_token,
    stride_counts,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_FP32: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS times BLOCK_N tokens of BLOCK_M rows.

    Grid: one program a tile of tokens and rows, row tiles innermost, so that they share a weight tile in L2.
    best_ptr: [num_seqs, num_tiles] int64 tokens.
    """
    seq_tiles = tl.cdiv(num_seqs, BLOCK_M)
    first_seq, tile = tl.program_id(0) % seq_tiles * BLOCK_M, tl.program_id(0) // seq_tiles
    seqs = first_seq + tl.arange(0, BLOCK_M)
    best = tl.zeros((BLOCK_M,), tl.int64) + NO_TOKEN
    for step in range(STEPS):
        first_id = (tile * STEPS + step) * BLOCK_N
        ids = first_id + tl.arange(0, BLOCK_N)
        acc = products(
            x_ptr,
            None,
            0.0,
            codes_ptr,
            high_ptr,
            scales_ptr,
            supers_ptr,
            ids,
            ids < vocab_size,
            seqs,
            num_seqs,
            K,
            stride_token,
            BITS,
            SCALES,
            BLOCK_N,
            BLOCK_M,
            BLOCK_K,
            DOT_FP32,
        )
        logits = tl.trans(acc)  # [BLOCK_M, BLOCK_N]
        # Rows past the last read the parameters of row 0, and are stored nowhere.
        row = tl.where(seqs < num_seqs, seqs, 0)[:, None]
        floats_row_ptr, ints_row_ptr = floats_ptr + row * NUM_FLOATS, ints_ptr + row * NUM_INTS
        ids = ids[None, :]
        inside = (ids < vocab_size) & (seqs < num_seqs)[:, None]
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + ids, mask=ids < vocab_size, other=0.0).to(tl.float32)
        logits = _adjusted(
            logits,
            ids,
            inside,
            row,
            first_seq,
            num_seqs,
            floats_row_ptr,
            ints_row_ptr,
            token_counts_ptr,
            stride_counts,
            bias_start_ptr,
            bias_ids_ptr,
            bias_values_ptr,
            BLOCK_M,
        )
        z = scaled(logits, floats_row_ptr)
        scores = z
        draws = tl.load(floats_row_ptr + INV_TEMPERATURE) != 0.0
        if tl.max(tl.max(draws.to(tl.int32), axis=1), axis=0) != 0:  # an all-greedy batch needs no random numbers
            groups = first_id // 4 + tl.arange(0, BLOCK_N // 4)
            scores = tl.where(draws, z + gumbel_tile(ints_row_ptr, groups[None, :]), z)
        best = tl.maximum(best, best_token(z, scores, ids, inside))
    num_tiles = tl.num_programs(0) // seq_tiles
    tl.store(best_ptr + seqs * num_tiles + tile, best, mask=seqs < num_seqs)


def head_tiling(weight: Weight, num_seqs: int, dtype: torch.dtype) -> Tiling:
    """The kernel's configuration for a head, so many rows and a model dtype.

    A dense one goes through the tensor cores for a single row too: BLOCK_N * BLOCK_K holds 16 KiB of it a stage, and
    four in flight are what one CTA needs to keep HBM busy, and fit the 99 KiB of sm_120 beside x.
    """
    if weight.quant_type or dtype == torch.float32:
        regime: Regime = "gemv" if num_seqs == 1 else "tile" if num_seqs <= 16 else "wide"
        tiling = choose_tiling(weight, regime, dtype)
        # The draw takes registers, too: 8 rows of Q4_1 spill 24 bytes on sm_90, a third stage of Q5_1 8 on sm_80.
        if regime == "gemv":
            return tiling._replace(block_n=4)
        return tiling._replace(num_stages=2) if weight.quant_type.startswith("Q5") and regime == "wide" else tiling
    block_m = min(64, max(16, triton.next_power_of_2(num_seqs)))
    return Tiling(128, block_m, 64, 4 if block_m < 32 else 8, 4)


def head_draw(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    floats: Tensor,
    ints: Tensor,
    token_counts: Tensor | None = None,
    bias_start: Tensor | None = None,
    bias_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
) -> Tensor:
    """One token a row from normalised hidden states, without filters and without log-probabilities.

    Args:
        x: [num_seqs, hidden_size], innermost stride 1, after the final norm.
        weight: [vocab_size, hidden_size], dense in the dtype of x, or quantised.
        bias: [vocab_size], dtype of x, or None.
        floats, ints, token_counts, bias_start, bias_ids, bias_values: as in SamplingBatch; filters are not read.
    Returns:
        token_ids: [num_seqs] int64; -1 where no token can be drawn.
    """
    num_seqs = x.shape[0]
    tiling = head_tiling(weight, num_seqs, x.dtype)
    steps = _steps(tiling)
    num_tiles = triton.cdiv(weight.num_rows, tiling.block_n * steps)
    best = torch.empty(num_seqs, num_tiles, dtype=torch.int64, device=x.device)
    if num_seqs:
        _head_draw_kernel[(num_tiles * triton.cdiv(num_seqs, tiling.block_m),)](
            best,
            x,
            *weight.planes,
            bias,
            floats,
            ints,
            token_counts,
            bias_start,
            bias_ids,
            bias_values,
            num_seqs,
            weight.num_rows,
            weight.in_features,
            x.stride(0),
            0 if token_counts is None else token_counts.stride(0),
            STEPS=steps,
            enable_fp_fusion=False,  # the draw's bits are defined without
            **launch_constants(x, weight, tiling),
        )
    return merge_best(best)


def _steps(tiling: Tiling) -> int:
    return max(1, MIN_TILE // tiling.block_n)


def aot_cases() -> tuple[AotCase, ...]:
    """Llama-3.2-1B's head, dense and in every format, at every BLOCK_M; with penalties and biases at one of each."""
    cases = [_aot_case("", num_seqs, {}) for num_seqs in (1, 32, 64)]
    for quant_type in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"):
        cases += [_aot_case(quant_type, num_seqs, {}) for num_seqs in (1, 16, 64)]
    return (*cases, _aot_case("", 1, _EXTRAS), *(_aot_case("Q6_K", num_seqs, _EXTRAS) for num_seqs in (1, 64)))


_EXTRAS = MappingProxyType(
    {
        "bias_ptr": "*bf16",
        "token_counts_ptr": "*i32",
        "bias_start_ptr": "*i32",
        "bias_ids_ptr": "*i32",
        "bias_values_ptr": "*fp32",
    }
)


def _aot_case(quant_type: str, num_seqs: int, given: Mapping[str, str]) -> AotCase:
    """One launch as `head_draw` would make it, without its tensors."""
    weight = Weight(torch.empty(128256, 2048, device="meta"), 2048, quant_type)
    tiling = head_tiling(weight, num_seqs, torch.bfloat16)
    constexprs = launch_constants(torch.empty(0, dtype=torch.bfloat16, device="meta"), weight, tiling)
    num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
    planes = plane_signature(quant_type) if quant_type else {"codes_ptr": "*bf16"}
    pointers = {"best_ptr": "*i64", "x_ptr": "*bf16", **planes, "floats_ptr": "*fp32", "ints_ptr": "*i64", **given}
    types = {**dict.fromkeys(_head_draw_kernel.arg_names[:13]), **pointers}
    absent = {name: None for name, kind in types.items() if kind is None}
    aligned = {name: kind for name, kind in types.items() if kind is not None}
    aligned |= dict.fromkeys(("vocab_size", "K", "stride_token", "stride_counts"), "i32")
    return AotCase(
        "_".join((quant_type or "bf16", f"rows_{num_seqs}", *(("everything",) if given else ()))),
        _head_draw_kernel,
        {**aligned, "num_seqs": "i32"},
        {**constexprs, **absent, "STEPS": _steps(tiling)},
        num_warps,
        num_stages,
        tuple(aligned),
        ("ld.v4",) if tiling.block_m == 1 else ("cp.async", "mma"),
        enable_fp_fusion=False,
    )
