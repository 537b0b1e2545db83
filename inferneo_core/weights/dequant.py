"""GGUF's block formats to fp32: the arithmetic that every backend's quantised kernels must reproduce.

A row is a run of blocks; a block holds 32 or 256 weights as small integers with shared scales. Every result is rounded
to fp32 after each product and sum, in the order that ggml defines, so it is the same to the last bit everywhere.

Source: ggml's block layouts, https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from inferneo_core.errors import ShapeError, UnsupportedModel

# Weights converted at a time. The values (1 MiB) and their intermediates stay in the L2 and L3 caches.
SLAB_SIZE = 1 << 18


class BlockType(NamedTuple):
    """A block format: `block_size` weights in `type_size` bytes."""

    block_size: int
    type_size: int


BLOCK_TYPES = MappingProxyType(
    {
        "Q4_0": BlockType(32, 18),
        "Q4_1": BlockType(32, 20),
        "Q5_0": BlockType(32, 22),
        "Q5_1": BlockType(32, 24),
        "Q8_0": BlockType(32, 34),
        "Q4_K": BlockType(256, 144),
        "Q5_K": BlockType(256, 176),
        "Q6_K": BlockType(256, 210),
    }
)


def dequantize(data: Tensor, quant_type: str, out: Tensor | None = None) -> Tensor:
    """Rows of blocks to dense rows, a slab at a time: beside `out` it needs a few MiB.

    Args:
        data: [num_rows, bytes_per_row] uint8; each row a run of whole blocks.
        quant_type: a key of BLOCK_TYPES.
        out: [num_rows, num_cols] to fill; bf16 and fp16 round the fp32 values to nearest even. None: a new fp32 tensor.
    Returns:
        out: [num_rows, num_cols].
    Raises:
        UnsupportedModel: quant_type is not in BLOCK_TYPES.
        ShapeError: data is not rows of whole blocks, or out has another shape.
    """
    if quant_type not in BLOCK_TYPES:
        raise UnsupportedModel(f"block type {quant_type!r} is unknown; it is one of {', '.join(BLOCK_TYPES)}")
    block_size, type_size = BLOCK_TYPES[quant_type]
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] % type_size:
        raise ShapeError(
            f"data is {data.dtype} {list(data.shape)}; {quant_type} needs uint8 [num_rows, a multiple of {type_size}]"
        )
    num_rows, num_cols = data.shape[0], data.shape[1] // type_size * block_size
    if out is None:
        out = torch.empty(num_rows, num_cols)
    elif out.shape != (num_rows, num_cols):
        raise ShapeError(f"out has shape {list(out.shape)}; it must be {[num_rows, num_cols]}")
    decode = _DECODERS[quant_type]
    slab_rows = max(1, SLAB_SIZE // max(1, num_cols))
    for start in range(0, num_rows, slab_rows):
        rows = data[start : start + slab_rows]
        out[start : start + slab_rows] = decode(rows.reshape(-1, type_size)).view(-1, num_cols)
    return out


# Each decoder: blocks [n, type_size] uint8 -> weights [n, block_size] fp32. Fields stand in the order of the bytes.


def _q4_0(blocks: Tensor) -> Tensor:
    d, qs = _fp16(blocks[:, :2]), blocks[:, 2:]
    return _nibbles(qs).float().sub_(8).mul_(d)


def _q4_1(blocks: Tensor) -> Tensor:
    d, m, qs = _fp16(blocks[:, :2]), _fp16(blocks[:, 2:4]), blocks[:, 4:]
    return _nibbles(qs).float().mul_(d).add_(m)


def _q5_0(blocks: Tensor) -> Tensor:
    d, qh, qs = _fp16(blocks[:, :2]), blocks[:, 2:6], blocks[:, 6:]
    return (_nibbles(qs) | _bits(qh) << 4).float().sub_(16).mul_(d)


def _q5_1(blocks: Tensor) -> Tensor:
    d, m, qh, qs = _fp16(blocks[:, :2]), _fp16(blocks[:, 2:4]), blocks[:, 4:8], blocks[:, 8:]
    return (_nibbles(qs) | _bits(qh) << 4).float().mul_(d).add_(m)


def _q8_0(blocks: Tensor) -> Tensor:
    d, qs = _fp16(blocks[:, :2]), blocks[:, 2:]
    return qs.view(torch.int8).float().mul_(d)


def _q4_k(blocks: Tensor) -> Tensor:
    qs = blocks[:, 16:].reshape(-1, 4, 32)
    return _scaled_32(blocks, _nibbles(qs).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    qh, qs = blocks[:, 16:48], blocks[:, 48:].reshape(-1, 4, 32)
    high = torch.stack([qh >> i & 1 for i in range(8)], dim=1)  # [n, 8, 32]: bit i belongs to sub-block i
    return _scaled_32(blocks, _nibbles(qs).view(-1, 8, 32) | high << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    ql, qh = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    scales, d = blocks[:, 192:208].view(torch.int8), _fp16(blocks[:, 208:])
    low = _nibbles(ql).view(-1, 2, 4, 32)
    high = torch.stack([qh >> i & 3 for i in (0, 2, 4, 6)], dim=2)  # [n, 2, 4, 32]
    values = (low | high << 4).float().sub_(32).view(-1, 16, 16)
    return values.mul_((d * scales).unsqueeze(2)).view(-1, 256)


def _scaled_32(blocks: Tensor, q: Tensor) -> Tensor:
    """Q4_K and Q5_K: q [n, 8, 32] uint8 scaled by the block's header of two fp16 and eight packed 6-bit pairs."""
    d, dmin, packed = _fp16(blocks[:, :2]), _fp16(blocks[:, 2:4]), blocks[:, 4:16]
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    # Sub-blocks 0-3: the low six bits of a and b. Sub-blocks 4-7: four bits of c, and the upper two bits of a and b.
    scales = torch.cat((a & 63, c & 15 | a >> 2 & 48), dim=1)
    mins = torch.cat((b & 63, c >> 4 | b >> 2 & 48), dim=1)
    return q.float().mul_((d * scales).unsqueeze(2)).sub_((dmin * mins).unsqueeze(2)).view(-1, 256)


def _fp16(field: Tensor) -> Tensor:
    """[n, 2] uint8 -> [n, 1] fp32. The copy lifts torch's demand that a viewed half be aligned."""
    return field.contiguous().view(torch.float16).float()


def _nibbles(q: Tensor) -> Tensor:
    """[..., k] -> [..., 2 k]: all low nibbles, then all high ones."""
    return torch.cat((q & 15, q >> 4), dim=-1)


def _bits(q: Tensor) -> Tensor:
    """[n, 4] -> [n, 32]: the bits of each byte, lowest first."""
    return torch.stack([q >> i & 1 for i in range(8)], dim=-1).view(-1, 32)


_DECODERS: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8_0,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
    }
)
