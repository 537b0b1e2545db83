"""The output head and the draw in one: greedy and plain draws never write their logits.

A program multiplies a tile of the vocabulary with all the rows, on tensor cores with the operands swapped, so that the
many rows of the weight fill the wide side of the instruction and the few sequences its narrow one. It then adjusts,
scales and scores the tile in registers, and leaves the best token of each row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferneo_kernels.aot import AotCase
from inferneo_kernels.sampling import best_token, merge_best
from inferneo_kernels.sampling_math import (
    COUNT_ROW,
    INV_TEMPERATURE,
    NUM_FLOATS,
    NUM_INTS,
    biased,
    gumbel_tile,
    penalised,
    scaled,
)

MAX_ROWS = 64  # sequences of one launch: above, the product is no longer bound by reading the weight


@triton.jit(do_not_specialize=["num_seqs"])
def _head_draw_kernel(
    best_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    floats_ptr,
    ints_ptr,
    token_counts_ptr,
    bias_start_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    num_seqs,
    vocab_size,
    hidden_size,
    stride_weight,
    stride_counts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_FP32: tl.constexpr,
):
    """BLOCK_N tokens of every row. Grid: (num_tiles,). best_ptr: [num_seqs, num_tiles] int64 tokens."""
    tile, num_tiles = tl.program_id(0), tl.num_programs(0)
    ids = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    in_vocab, is_row = ids < vocab_size, rows < num_seqs
    k = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + ids.to(tl.int64)[:, None] * stride_weight + k[None, :]
    x_ptrs = x_ptr + rows[None, :] * hidden_size + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        in_k = start + k < hidden_size
        w_mask = in_vocab[:, None] & in_k[None, :]
        w = tl.load(weight_ptrs + start, mask=w_mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptrs + start, mask=in_k[:, None] & is_row[None, :], other=0.0)
        if DOT_FP32:
            w, x = w.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision="ieee")

    logits = tl.trans(acc)  # [BLOCK_M, BLOCK_N]
    ids, inside = ids[None, :], in_vocab[None, :] & is_row[:, None]
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + ids, mask=in_vocab[None, :], other=0.0).to(tl.float32)
    # Rows past the last read the parameters of row 0, and are stored nowhere.
    row = tl.where(is_row, rows, 0)[:, None]
    floats_row_ptr, ints_row_ptr = floats_ptr + row * NUM_FLOATS, ints_ptr + row * NUM_INTS
    if token_counts_ptr is not None:
        count_row = tl.load(ints_row_ptr + COUNT_ROW)
        has_counts = inside & (count_row >= 0)
        counts = tl.load(token_counts_ptr + count_row * stride_counts + ids, mask=has_counts, other=0)
        logits = penalised(logits, counts, floats_row_ptr)
    if bias_start_ptr is not None:
        for seq in range(num_seqs):
            own_ids = tl.where(row == seq, ids, -1)
            logits = biased(logits, own_ids, seq, bias_start_ptr, bias_ids_ptr, bias_values_ptr)
    z = scaled(logits, floats_row_ptr)
    scores = z
    draws = tl.load(floats_row_ptr + INV_TEMPERATURE) != 0.0
    if tl.max(tl.max(draws.to(tl.int32), axis=1), axis=0) != 0:  # an all-greedy batch needs no random numbers
        groups = tile * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        scores = tl.where(draws, z + gumbel_tile(ints_row_ptr, groups[None, :]), z)
    tl.store(best_ptr + rows * num_tiles + tile, best_token(z, scores, ids, inside), mask=is_row)


def head_config(num_seqs: int, element_size: int) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and stages of `head_draw` for so many rows.

    BLOCK_N * BLOCK_K holds 16 KiB of the weight a stage: four in flight are what one CTA needs to keep HBM busy, and
    fit the 99 KiB of sm_120 beside x.
    """
    block_m = max(16, triton.next_power_of_2(num_seqs))
    block_k = 128 // element_size  # one 128-byte line a row
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": 128,
        "BLOCK_K": block_k,
        "num_warps": 4 if block_m < 32 else 8,
        "num_stages": 4,
    }


def head_draw(
    x: Tensor,
    weight: Tensor,
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
        x: [num_seqs, hidden_size], contiguous, after the final norm; at most MAX_ROWS rows.
        weight: [vocab_size, hidden_size], dtype of x, innermost stride 1.
        bias: [vocab_size], or None.
        floats, ints, token_counts, bias_start, bias_ids, bias_values: as in SamplingBatch; filters are not read.
    Returns:
        token_ids: [num_seqs] int64; -1 where no token can be drawn.
    """
    num_seqs, hidden_size = x.shape
    assert num_seqs <= MAX_ROWS, f"x has {num_seqs} rows; head_draw takes {MAX_ROWS} (use lm_head and sample)"
    vocab_size = weight.shape[0]
    config = head_config(num_seqs, x.element_size())
    num_tiles = triton.cdiv(vocab_size, config["BLOCK_N"])
    best = torch.empty(num_seqs, num_tiles, dtype=torch.int64, device=x.device)
    if num_seqs:
        _head_draw_kernel[(num_tiles,)](
            best,
            x,
            weight,
            bias,
            floats,
            ints,
            token_counts,
            bias_start,
            bias_ids,
            bias_values,
            num_seqs,
            vocab_size,
            hidden_size,
            weight.stride(0),
            0 if token_counts is None else token_counts.stride(0),
            DOT_FP32=not isinstance(_head_draw_kernel, triton.runtime.JITFunction),  # the interpreter has no bf16
            enable_fp_fusion=False,
            **config,
        )
    return merge_best(best)


def aot_cases() -> tuple[AotCase, ...]:
    """Llama-3.2-1B's head at every BLOCK_M; with penalties and biases at the first."""
    pointers = {"best_ptr": "*i64", "x_ptr": "*bf16", "weight_ptr": "*bf16", "floats_ptr": "*fp32", "ints_ptr": "*i64"}
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "stride_weight", "stride_counts"), "i32")
    extras = {
        "bias_ptr": "*bf16",
        "token_counts_ptr": "*i32",
        "bias_start_ptr": "*i32",
        "bias_ids_ptr": "*i32",
        "bias_values_ptr": "*fp32",
    }

    def case(name: str, num_seqs: int, given: dict[str, str]) -> AotCase:
        config = head_config(num_seqs, 2)
        num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
        aligned = {**pointers, **given, **sizes}
        signature = {**aligned, "num_seqs": "i32"}
        constexprs = {**config, "DOT_FP32": False, **{name: None for name in extras if name not in given}}
        expect = ("mma", "cp.async")
        return AotCase(
            name,
            _head_draw_kernel,
            signature,
            constexprs,
            num_warps,
            num_stages,
            tuple(aligned),
            expect,
            enable_fp_fusion=False,
        )

    plain = [case(f"rows_{num_seqs}", num_seqs, {}) for num_seqs in (1, 32, MAX_ROWS)]
    return (*plain, case("everything", 1, extras))
