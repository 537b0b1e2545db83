"""Random quantised weights: any bits are codes, so only the fp16 scales of a block are chosen. Needs no engine."""

from __future__ import annotations

from types import MappingProxyType

import torch
from inferneo_kernels.quant_layout import FORMATS
from torch import Tensor

# Where a block's fp16 scales stand.
SCALES = MappingProxyType(
    {
        "Q4_0": slice(0, 2),
        "Q4_1": slice(0, 4),
        "Q5_0": slice(0, 2),
        "Q5_1": slice(0, 4),
        "Q8_0": slice(0, 2),
        "Q4_K": slice(0, 4),
        "Q5_K": slice(0, 4),
        "Q6_K": slice(208, 210),
    }
)


def random_blocks(
    num_rows: int, num_columns: int, quant_type: str, generator: torch.Generator, scale: float = 1e-3
) -> Tensor:
    """Rows of whole GGUF blocks with random codes.

    Args:
        num_rows, num_columns: of the weight; columns in whole blocks.
        quant_type: GGUF name of the block type.
        generator: seeded; the weight is made on its device.
        scale: of every block, and its minimum where there is one.
    Returns:
        [num_rows, bytes_per_row] uint8, as a checkpoint stores it.
    """
    layout, scales = FORMATS[quant_type], SCALES[quant_type]
    shape = (num_rows, num_columns // layout.block_size, layout.type_size)
    data = torch.randint(256, shape, dtype=torch.uint8, generator=generator, device=generator.device)
    halves = torch.full(((scales.stop - scales.start) // 2,), scale, dtype=torch.float16, device=data.device)
    data[..., scales] = halves.view(torch.uint8)
    return data.flatten(1)
