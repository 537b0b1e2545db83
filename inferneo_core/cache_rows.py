"""Rows of the cache: one token's key or value of one head, as the cache's dtype stores it.

A dense row is head_dim elements. An int8 row is head_dim codes, then their scale in fp32: head_dim + 4 bytes.

Source: absmax quantisation, arXiv 2208.07339, here a row at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4
MAX_CODE = 127


def row_elements(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a row that holds head_dim numbers."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim


def row_head_dim(num_elements: int, dtype: torch.dtype) -> int:
    """How many numbers a row of so many elements holds."""
    return num_elements - SCALE_BYTES if dtype == torch.int8 else num_elements


def to_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of `dtype` that hold x, rounded to nearest even.

    int8 codes lie at most half a scale from x, 1/254 of the row's largest magnitude. A row with NaN or infinity
    reads back as NaN.

    Args:
        x: [..., head_dim], any float dtype.
        dtype: the cache's.
    Returns:
        [..., row_elements(head_dim, dtype)] of dtype.
    """
    if dtype != torch.int8:
        return x.to(dtype)
    x32 = x.float()
    scale = x32.abs().amax(dim=-1, keepdim=True) / MAX_CODE
    is_usable = (scale > 0) & scale.isfinite()
    codes = torch.where(is_usable, x32 / scale, 0.0).round().clamp(-MAX_CODE, MAX_CODE).to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], dim=-1)


def from_rows(rows: Tensor) -> Tensor:
    """What rows of the cache hold.

    Args:
        rows: [..., row_elements(head_dim, dtype)], dtype of the cache.
    Returns:
        [..., head_dim] fp32.
    """
    if rows.dtype != torch.int8:
        return rows.float()
    scale = rows[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return rows[..., :-SCALE_BYTES].float() * scale
