"""Weights as the kernels read them: dense, or GGUF's blocks taken apart into aligned planes at load.

GGUF interleaves scales and codes in blocks of 18 to 210 bytes, so no 16-byte load is aligned. `repack` moves the same
bits into one plane a field. The codes' unit is the quad: 16 bytes, four 32-bit words. A quad holds 32 columns of 4-bit
codes or 16 columns of 8-bit codes, and code i of word w is column 4 i + w. A thread that loads a quad so finds all its
columns under one scale (Q6_K: two), and meets the activations in runs of four.

Source: ggml's block layouts, https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

SLAB_BYTES = 1 << 24  # repacked at a time: the intermediates stay small beside the weight


class QuantFormat(NamedTuple):
    """How a block type maps to planes.

    Attributes:
        block_size, type_size: weights and bytes of a GGUF block.
        bits: of a code. Four of 5 or 6 stand in `codes`, the rest in `high`.
        scales: "d": w = (code - 2 ** (bits - 1)) * d, with an fp16 d for 32 columns.
            "d_m": w = code * d + m, two fp16 for 32 columns.
            "d_sc": w = (code - 32) * (d * sc), an int8 sc for 16 columns, an fp16 d for 256.
            "d_sc_m": w = code * (d * sc) - dmin * mn, two uint8 for 32 columns, two fp16 for 256.
            Every product is exact in fp32, so a fused multiply-add changes no bit.
    """

    block_size: int
    type_size: int
    bits: int
    scales: str


FORMATS = MappingProxyType(
    {
        "Q4_0": QuantFormat(32, 18, 4, "d"),
        "Q4_1": QuantFormat(32, 20, 4, "d_m"),
        "Q5_0": QuantFormat(32, 22, 5, "d"),
        "Q5_1": QuantFormat(32, 24, 5, "d_m"),
        "Q8_0": QuantFormat(32, 34, 8, "d"),
        "Q4_K": QuantFormat(256, 144, 4, "d_sc_m"),
        "Q5_K": QuantFormat(256, 176, 5, "d_sc_m"),
        "Q6_K": QuantFormat(256, 210, 6, "d_sc"),
    }
)


@dataclass(frozen=True, slots=True)
class Weight:
    """Some rows of a weight [num_rows, in_features], all of one type; the kernels' own layout.

    Attributes:
        codes: dense: [num_rows, in_features], model dtype; quantised: [num_rows, num_quads * 4] int32.
        in_features: columns; whole blocks where quantised.
        quant_type: "" for dense rows, otherwise a key of FORMATS.
        high: the codes' bits above the fourth, one entry a word: [num_rows, num_quads * 4] uint8 (5 bits) or int16
            (6 bits); None for 4 and 8 bits.
        scales: by the format's `scales`: "d": [num_rows, in_features / 32] fp16; "d_m": the same, int32, d below m;
            "d_sc": [num_rows, in_features / 16] int8; "d_sc_m": [num_rows, in_features / 32] int16, sc below mn.
        supers: "d_sc": [num_rows, in_features / 256] fp16; "d_sc_m": the same, int32, d below dmin; otherwise None.
    """

    codes: Tensor
    in_features: int
    quant_type: str = ""
    high: Tensor | None = None
    scales: Tensor | None = None
    supers: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.codes.shape[0]

    @property
    def planes(self) -> tuple[Tensor | None, ...]:
        """codes, high, scales, supers: the order of the kernels' arguments."""
        return self.codes, self.high, self.scales, self.supers

    @property
    def num_bytes(self) -> int:
        """What a decode step reads of it."""
        return sum(plane.nbytes for plane in self.planes if plane is not None)


def dense(data: Tensor) -> Weight:
    """A dense weight.

    Args:
        data: [num_rows, in_features], model dtype, on the kernels' device.
    """
    return Weight(data.contiguous(), data.shape[1])


def repack(data: Tensor, quant_type: str) -> Weight:
    """A quantised weight in planes; exact, so nothing is lost.

    Args:
        data: [num_rows, bytes_per_row] uint8, rows in order, each a run of whole GGUF blocks.
        quant_type: a key of FORMATS.
    Returns:
        Weight on the device of data.
    Raises:
        ValueError: quant_type is unknown, or the rows are not whole blocks.
    """
    if quant_type not in FORMATS:
        raise ValueError(f"block type {quant_type!r} is unknown; it is one of {', '.join(FORMATS)}")
    layout = FORMATS[quant_type]
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] % layout.type_size:
        wanted = f"uint8 [num_rows, a multiple of {layout.type_size}]"
        raise ValueError(f"data is {data.dtype} {list(data.shape)}; {quant_type} needs {wanted}")
    num_rows, blocks_per_row = data.shape[0], data.shape[1] // layout.type_size
    slab_rows = max(1, SLAB_BYTES // max(1, data.shape[1]))
    slabs = [
        _planes(data[start : start + slab_rows].reshape(-1, layout.type_size), quant_type, blocks_per_row)
        for start in range(0, max(1, num_rows), slab_rows)
    ]
    codes, high, scales, supers = (_join(planes) for planes in zip(*slabs, strict=True))
    assert codes is not None
    return Weight(codes, blocks_per_row * layout.block_size, quant_type, high, scales, supers)


def merge(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """The same rows in as few Weights as their types allow: a kernel launch serves one."""
    merged: list[Weight] = []
    for weight in weights:
        if merged and (merged[-1].quant_type, merged[-1].codes.dtype) == (weight.quant_type, weight.codes.dtype):
            planes = (_join(pair) for pair in zip(merged.pop().planes, weight.planes, strict=True))
            codes, high, scales, supers = planes
            assert codes is not None
            weight = Weight(codes, weight.in_features, weight.quant_type, high, scales, supers)
        merged.append(weight)
    return tuple(merged)


def _join(planes: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [plane for plane in planes if plane is not None]
    return torch.cat(tensors) if tensors else None


def _planes(blocks: Tensor, quant_type: str, blocks_per_row: int) -> tuple[Tensor | None, ...]:
    """Blocks [n, type_size] to the planes of Weight, in the order of `Weight.planes`."""
    layout = FORMATS[quant_type]
    values, scales, supers = _fields(blocks, quant_type)
    values = values.view(-1, 16 if layout.bits == 8 else 32)  # [num_quads, columns of a quad]
    low_bits, high_bits = (8, 0) if layout.bits == 8 else (4, layout.bits - 4)
    codes = _pack(values & (255 >> (8 - low_bits)), low_bits).view(torch.int32)
    high = _pack(values >> low_bits, high_bits) if high_bits else None
    if high_bits == 2:
        high = high.view(torch.int16) if high is not None else None
    num_rows = blocks.shape[0] // max(1, blocks_per_row)
    return tuple(None if plane is None else plane.reshape(num_rows, -1) for plane in (codes, high, scales, supers))


def _pack(values: Tensor, bits: int) -> Tensor:
    """values [num_quads, columns] uint8, each below 2 ** bits, to [num_quads, 4, bytes a word]: value 4 i + w goes to
    bits `bits * i` and up of word w."""
    fields = values.view(values.shape[0], -1, 8 // bits, 4)  # [num_quads, bytes a word, fields a byte, 4]
    packed = fields[:, :, 0].clone()
    for i in range(1, 8 // bits):
        packed |= fields[:, :, i] << (bits * i)
    return packed.transpose(1, 2).contiguous()


def _fields(blocks: Tensor, quant_type: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Blocks [n, type_size] to codes [n, block_size] uint8, and the planes scales and supers as [n, ...]."""
    if quant_type in ("Q4_0", "Q4_1"):
        header = 2 if quant_type == "Q4_0" else 4
        return _nibbles(blocks[:, header:]), _header(blocks[:, :header]), None
    if quant_type in ("Q5_0", "Q5_1"):
        header = 2 if quant_type == "Q5_0" else 4
        low, high = _nibbles(blocks[:, header + 4 :]), _bits(blocks[:, header : header + 4])
        return low | high << 4, _header(blocks[:, :header]), None
    if quant_type == "Q8_0":
        return blocks[:, 2:] ^ 128, _header(blocks[:, :2]), None  # int8 q as the unsigned code q + 128
    if quant_type == "Q6_K":
        ql, qh = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
        high = torch.stack([qh >> i & 3 for i in (0, 2, 4, 6)], dim=2)  # [n, 2, 4, 32]
        codes = _nibbles(ql).view(-1, 2, 4, 32) | high << 4
        return codes.reshape(-1, 256), blocks[:, 192:208].contiguous().view(torch.int8), _header(blocks[:, 208:])
    qs = blocks[:, 16 if quant_type == "Q4_K" else 48 :].reshape(-1, 4, 32)
    codes = _nibbles(qs).view(-1, 8, 32)
    if quant_type == "Q5_K":
        qh = blocks[:, 16:48]
        codes = codes | torch.stack([qh >> i & 1 for i in range(8)], dim=1) << 4  # bit i belongs to sub-block i
    return codes.view(-1, 256), _scales_and_mins(blocks[:, 4:16]), _header(blocks[:, :4])


def _header(field: Tensor) -> Tensor:
    """[n, 2] bytes -> [n, 1] fp16; [n, 4] bytes -> [n, 1] int32 of two fp16. The copy aligns them."""
    return field.contiguous().view(torch.float16 if field.shape[1] == 2 else torch.int32)


def _scales_and_mins(packed: Tensor) -> Tensor:
    """The 12 bytes of eight 6-bit pairs [n, 12] -> [n, 8] int16, the scale below the minimum."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    # Sub-blocks 0-3: the low six bits of a and b. Sub-blocks 4-7: four bits of c, and the upper two bits of a and b.
    scales = torch.cat((a & 63, c & 15 | a >> 2 & 48), dim=1)
    mins = torch.cat((b & 63, c >> 4 | b >> 2 & 48), dim=1)
    return torch.stack((scales, mins), dim=2).view(torch.int16).squeeze(2)


def _nibbles(q: Tensor) -> Tensor:
    """[..., k] -> [..., 2 k]: all low nibbles, then all high ones."""
    return torch.cat((q & 15, q >> 4), dim=-1)


def _bits(q: Tensor) -> Tensor:
    """[n, 4] -> [n, 32]: the bits of each byte, lowest first."""
    return torch.stack([q >> i & 1 for i in range(8)], dim=-1).view(-1, 32)
