"""Weights in the layout of the C++ kernels (csrc/cpu/formats.h), in a few large pieces of memory on huge pages."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from inferneo_core.ops.base import Linear

CHUNK_BYTES = 64 * 2**20  # pages are touched on use, so what is left of a chunk costs nothing
_ALIGNMENT = 64
_DENSE_TYPES = MappingProxyType({torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"})


class WeightArena:
    """Packs weights one behind another. A packed weight holds on to its chunk, so the arena itself may go."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def pack(self, linear: Linear, *, keeps_rows: bool = False) -> Tensor:
        """Repack a weight; its source is not needed afterwards.

        Args:
            linear: as the loader made it: quantised segments, dense bf16, fp16 or fp32 ones, or both.
            keeps_rows: whether its rows will be asked for: what the kernels round is then kept as stored, too.
        Returns:
            [out_features, bytes_per_row] uint8, bytes_per_row so large that everything fits; opaque but for its rows.
        Raises:
            ShapeError: the segments disagree with in_features or with their types.
            UnsupportedModel: a block type without a kernel.
        """
        segments = linear.segments
        data = [segment.data for segment in segments]
        types = ",".join(segment.quant_type or _DENSE_TYPES[segment.data.dtype] for segment in segments)
        in_order = torch.empty(0, dtype=torch.int64)
        orders = [in_order if segment.row_order is None else segment.row_order for segment in segments]
        bias = None if linear.bias is None else linear.bias.float()
        ops = torch.ops.inferneo
        num_bytes: int = ops.packed_bytes(data, types, orders, linear.in_features, bias is not None, keeps_rows)
        bytes_per_row = -(-num_bytes // linear.out_features)
        packed = self._take(linear.out_features * bytes_per_row)
        ops.pack_linear(data, types, orders, linear.in_features, bias, keeps_rows, packed)
        return packed.view(linear.out_features, bytes_per_row)

    def _take(self, num_bytes: int) -> Tensor:
        if num_bytes > self._chunk.numel() - self._used:
            self._chunk = torch.ops.inferneo.weight_memory(max(CHUNK_BYTES, num_bytes))
            self._used = 0
        start = self._used
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return self._chunk[start : start + num_bytes]
