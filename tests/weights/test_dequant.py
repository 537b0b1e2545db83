"""Block formats to fp32, bit for bit as the gguf package's own dequantiser has them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from inferneo_core.errors import ShapeError, UnsupportedModel
from inferneo_core.weights import open_checkpoint, resolve
from inferneo_core.weights.dequant import BLOCK_TYPES, SLAB_SIZE, dequantize

# Where the fp16 scales lie in a block.
SCALES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
EXTREME_FP16 = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00]


def random_rows(quant_type: str, num_rows: int, blocks_per_row: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    type_size = BLOCK_TYPES[quant_type].type_size
    return generator.integers(0, 256, (num_rows, blocks_per_row * type_size), dtype=np.uint8)


def oracle(rows: npt.NDArray[np.uint8], quant_type: str) -> npt.NDArray[np.float32]:
    with np.errstate(all="ignore"):  # random scales overflow and are NaN on purpose
        values: npt.NDArray[np.float32] = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[quant_type])
    return values


def assert_bit_equal(actual: torch.Tensor, expected: npt.NDArray[np.float32]) -> None:
    """Equal bits, the sign of zero included; a NaN for a NaN of any payload."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    ours, nan = actual.numpy(), np.isnan(expected)
    assert np.array_equal(np.isnan(ours), nan)
    assert np.array_equal(ours.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def test_block_types_have_the_sizes_of_the_format() -> None:
    for name, sizes in BLOCK_TYPES.items():
        assert tuple(sizes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


@pytest.mark.parametrize("quant_type", BLOCK_TYPES)
@pytest.mark.parametrize(("num_rows", "blocks_per_row"), [(1, 1), (5, 3), (67, 7)])
def test_dequantize_random_blocks_bit_equal(quant_type: str, num_rows: int, blocks_per_row: int) -> None:
    rows = random_rows(quant_type, num_rows, blocks_per_row)
    assert_bit_equal(dequantize(torch.from_numpy(rows), quant_type), oracle(rows, quant_type))


@pytest.mark.parametrize("quant_type", BLOCK_TYPES)
def test_dequantize_extreme_scales_bit_equal(quant_type: str) -> None:
    rows = random_rows(quant_type, len(EXTREME_FP16) ** 2, 1)
    pairs = [(first, second) for first in EXTREME_FP16 for second in EXTREME_FP16]
    for row, pair in zip(rows, pairs, strict=True):
        for offset, scale in zip(SCALES[quant_type], pair, strict=False):
            row[offset : offset + 2] = np.frombuffer(scale.to_bytes(2, "little"), dtype=np.uint8)
    assert_bit_equal(dequantize(torch.from_numpy(rows), quant_type), oracle(rows, quant_type))


def test_dequantize_crosses_slab_borders() -> None:
    rows = random_rows("Q4_0", SLAB_SIZE // 32 * 2 + 3, 1)
    assert_bit_equal(dequantize(torch.from_numpy(rows), "Q4_0"), oracle(rows, "Q4_0"))


def test_dequantize_reads_strided_rows_at_odd_offsets() -> None:
    rows = random_rows("Q5_1", 9, 5)
    buffer = torch.zeros(1 + rows.size, dtype=torch.uint8)
    buffer[1:] = torch.from_numpy(rows.reshape(-1))
    shifted = buffer[1:].view(9, -1)[::2]
    assert_bit_equal(dequantize(shifted, "Q5_1"), oracle(rows[::2], "Q5_1"))


def test_dequantize_fills_out_and_rounds_it() -> None:
    rows = random_rows("Q8_0", 5, 3)
    rows.reshape(-1, 34)[:, 1] &= 0x3B  # finite scales
    exact = torch.from_numpy(oracle(rows, "Q8_0"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.empty(5, 96, dtype=dtype)
        assert dequantize(torch.from_numpy(rows), "Q8_0", out) is out
        assert torch.equal(out, exact.to(dtype))


def test_dequantize_of_no_rows_is_empty() -> None:
    assert dequantize(torch.empty(0, 36, dtype=torch.uint8), "Q4_0").shape == (0, 64)


def test_dequantize_refuses_what_is_not_rows_of_blocks() -> None:
    good = torch.zeros(5, 36, dtype=torch.uint8)
    with pytest.raises(UnsupportedModel, match=r"'Q2_K' is unknown; it is one of Q4_0"):
        dequantize(good, "Q2_K")
    with pytest.raises(ShapeError, match=r"uint8 \[5, 35\]; Q4_0 needs .* multiple of 18"):
        dequantize(good[:, :35], "Q4_0")
    with pytest.raises(ShapeError, match=r"float32 \[5, 36\]"):
        dequantize(good.float(), "Q4_0")
    with pytest.raises(ShapeError, match=r"\[180\]"):
        dequantize(good.view(-1), "Q4_0")
    with pytest.raises(ShapeError, match=r"out has shape \[5, 63\]; it must be \[5, 64\]"):
        dequantize(good, "Q4_0", torch.empty(5, 63))


@pytest.mark.slow
def test_default_model_tensors_bit_equal_to_the_gguf_package(default_model: Path) -> None:
    checkpoint = open_checkpoint(resolve(default_model))
    reader = gguf.GGUFReader(default_model)
    # By shape and order within the file, so that a wrong name cannot find its own wrong partner.
    stored = sorted(checkpoint.tensors.items(), key=lambda item: item[1].offset)
    expected = sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset))
    assert len(stored) == len(expected) == 272
    for (name, ours), theirs in zip(stored, expected, strict=True):
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        values = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        view = ours.view()
        actual = dequantize(view, ours.type) if ours.type in BLOCK_TYPES else view
        assert np.array_equal(actual.numpy().view(np.uint32), values.view(np.uint32)), name
