"""Rows of an embedding table, dense or quantised."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inferneo_kernels.aot import AotCase
from inferneo_kernels.quant_decode import dequantize_into
from inferneo_kernels.quant_layout import Weight

BLOCK = 1024  # elements a program: a row of 4096 is four programs, so that one token is not one SM's work


@triton.jit
def _embed_kernel(out_ptr, ids_ptr, table_ptr, stride_row, hidden_size, BLOCK: tl.constexpr):
    """A stretch of one row. Grid: (num_tokens, cdiv(hidden_size, BLOCK))."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden_size
    token_id = tl.load(ids_ptr + token)
    x = tl.load(table_ptr + token_id * stride_row + columns, mask=inside)
    tl.store(out_ptr + token * hidden_size + columns, x, mask=inside)


def embed(ids: Tensor, table: Tensor | Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of a table.

    Args:
        ids: [num_tokens] int64, each below the number of rows.
        table: [num_rows, hidden_size], innermost stride 1; or a Weight, whose quantised rows are dequantised.
        dtype: of the result of a quantised Weight.
    Returns:
        [num_tokens, hidden_size], dtype of the table where it is dense.
    """
    if isinstance(table, Weight) and table.quant_type:
        assert dtype is not None, "a quantised table has no dtype of its own"
        out = torch.empty(ids.shape[0], table.in_features, dtype=dtype, device=ids.device)
        return dequantize_into(out, table, rows=ids) if ids.shape[0] else out
    rows = table.codes if isinstance(table, Weight) else table
    num_tokens, hidden_size = ids.shape[0], rows.shape[1]
    out = torch.empty(num_tokens, hidden_size, dtype=rows.dtype, device=rows.device)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(hidden_size, BLOCK))
        _embed_kernel[grid](out, ids, rows, rows.stride(0), hidden_size, BLOCK=BLOCK, num_warps=4)
    return out


def aot_cases() -> tuple[AotCase, ...]:
    """A dense table of Llama-3.1-8B's width; the cases of quantised ones stand in quant_decode."""
    signature = {"out_ptr": "*bf16", "ids_ptr": "*i64", "table_ptr": "*bf16", "stride_row": "i32", "hidden_size": "i32"}
    return (AotCase("dense", _embed_kernel, signature, {"BLOCK": BLOCK}, 4, 1, tuple(signature), ("ld.v4",)),)
