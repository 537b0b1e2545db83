"""Products with packed weights (csrc/cpu): every format on every instruction set against the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from inferneo_core.errors import InferneoError
from inferneo_core.ops.base import Linear, Segment
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.packing import WeightArena
from inferneo_core.weights.dequant import BLOCK_TYPES, dequantize

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FORMATS = (*BLOCK_TYPES, *DENSE)
PAIRED = ("Q4_0", "Q4_1")

MakeSegment = Callable[..., Segment]


def make_segment(name: str, num_rows: int, in_features: int, seed: int = 0, row_order: Tensor | None = None) -> Segment:
    """Random blocks of every bit pattern, but for scales of some 2**-7, so that no product overflows."""
    generator = torch.Generator().manual_seed(seed)
    if name in DENSE:
        data = torch.randn(num_rows, in_features, generator=generator).to(DENSE[name])
        return Segment(data, row_order=row_order)
    block_size, type_size = BLOCK_TYPES[name]
    shape = (num_rows * in_features // block_size, type_size)
    blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    offset = 208 if name == "Q6_K" else 0
    for place in (offset, 2) if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (offset,):
        halves = torch.rand(shape[0], generator=generator) * 0.02 - 0.01
        blocks[:, place : place + 2] = halves.half().view(torch.uint8).view(-1, 2)
    return Segment(blocks.view(num_rows, -1), name, row_order)


def dense(segment: Segment) -> Tensor:
    """The segment's rows in order, fp64."""
    weight = dequantize(segment.data, segment.quant_type) if segment.quant_type else segment.data
    return (weight if segment.row_order is None else weight[segment.row_order]).double()


def block_quantized(x: Tensor) -> Tensor:
    """x as the kernels see it: int8 in blocks of 32, scale amax / 127, fp64."""
    blocks = x.float().view(x.shape[0], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest < 1e-30, 0.0, 127.0 / largest)
    codes = (blocks * inverse).round()
    return (codes.double() * (largest / 127.0).double()).view(x.shape)


def in_pairs(x: Tensor, segment: Segment) -> Tensor:
    """The product with a segment in pairs of blocks (csrc/cpu/linear_pairs.h), its sums exact."""
    blocks = segment.data.numpy().reshape(len(segment.data), x.shape[1] // 32, -1)
    if segment.row_order is not None:
        blocks = blocks[segment.row_order.numpy()]
    scales = np.ascontiguousarray(blocks[..., :-16]).view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[..., -16:] & 15, blocks[..., -16:] >> 4], axis=-1).astype(np.int64) - 8
    d = scales[..., 0]
    middle = (scales[..., 1] + 8 * d) / 8 if scales.shape[-1] == 2 else np.zeros_like(d)
    step = np.ldexp(1.0, np.frexp(np.maximum(abs(d), abs(middle)).max(1, keepdims=True))[1] - 14)
    d, middle = np.rint(d / step).astype(np.int64), np.rint(middle / step).astype(np.int64)

    values = x.float().numpy().reshape(len(x), -1, 32)
    largest = abs(values).max(-1)
    largest[largest < 1e-30] = 0
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    x_codes = np.rint(values * inverse[..., None]).astype(np.int64)
    most = largest.max(-1, keepdims=True)
    per_unit = np.divide(np.float32(32767), most, out=np.zeros_like(most), where=most > 0)
    x_scale = np.rint(largest * per_unit).astype(np.int64)
    x_sum = (x_codes.sum(-1) * x_scale + 2**11) >> 12

    sums = np.einsum("tbi,rbi->trb", x_codes, codes)
    total = (sums * ((d * x_scale[:, None] + 2**14) >> 15) + middle * x_sum[:, None]).sum(-1)
    unit = most.astype(np.float64) * 2**15 / (127 * 32767)
    return torch.from_numpy(total * unit * step[:, 0])


def exact_product(x: Tensor, segment: Segment) -> Tensor:
    """What the kernels are to compute of what they are given, but for the rounding of sums; fp64."""
    if segment.quant_type in PAIRED:
        return in_pairs(x, segment)
    return (block_quantized(x) if segment.quant_type else x.double()) @ dense(segment).T


def pack(*segments: Segment, bias: Tensor | None = None) -> Tensor:
    in_features = segments[0].data.shape[1]
    if segments[0].quant_type:
        block_size, type_size = BLOCK_TYPES[segments[0].quant_type]
        in_features = in_features // type_size * block_size
    return WeightArena().pack(Linear(segments, in_features, bias), keeps_rows=True)


def product(x: Tensor, packed: Tensor, lanes: int = 1) -> Tensor:
    result: Tensor = torch.ops.inferneo.packed_linear(x, packed, lanes)
    return result


def assert_close_sums(actual: Tensor, exact: Tensor, x: Tensor, segment: Segment) -> None:
    """fp32 sums of up to 1,000 products round to 2e-6 of the products' magnitude, whatever their signs cancel."""
    magnitude = x.abs().double() @ dense(segment).abs().T
    assert ((actual - exact).abs() <= 2e-6 * magnitude).all()


@pytest.fixture(scope="module", autouse=True)
def _extension() -> None:
    CpuOps()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 13, 37])
def test_linear_agrees_with_the_exact_product_of_what_it_is_given(name: str, num_tokens: int, isa: str) -> None:
    segment = make_segment(name, 41, 512)
    x = torch.randn(num_tokens, 512, generator=torch.Generator().manual_seed(1)) * 3
    assert_close_sums(product(x, pack(segment)), exact_product(x, segment), x, segment)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("in_features", [32, 96, 1568])
def test_formats_in_pairs_of_blocks_take_an_odd_number_of_them(name: str, in_features: int, isa: str) -> None:
    segment = make_segment(name, 41, in_features)
    x = torch.randn(29, in_features, generator=torch.Generator().manual_seed(1))
    y = product(x, pack(segment))
    assert_close_sums(y, exact_product(x, segment), x, segment)
    assert torch.equal(product(x[3:4], pack(segment)), y[3:4])


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("outlier", [1, 300])
def test_scales_of_16_bits_add_little_to_what_int8_activations_are_off(name: str, outlier: int) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(256, 1536, generator=generator) + 0.3
    segment = Segment(torch.from_numpy(quants.quantize(weight.numpy(), GGMLQuantizationType[name])), name)
    x = torch.randn(32, 1536, generator=generator)
    x[:, 5] *= outlier
    wanted, rounded = x.double() @ dense(segment).T, block_quantized(x) @ dense(segment).T
    added = (product(x, pack(segment)) - rounded).square().mean() / (rounded - wanted).square().mean()
    assert added < (0.001 if outlier == 1 else 0.02)


@pytest.mark.parametrize("name", FORMATS)
def test_linear_has_the_same_bits_on_every_instruction_set(
    name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(make_segment(name, 50, 768))
    x = torch.randn(29, 768, generator=torch.Generator().manual_seed(2))
    mine = product(x, packed)
    monkeypatch.setenv("INFERNEO_CPU_ISA", "scalar")
    assert torch.equal(mine, product(x, packed))


@pytest.mark.parametrize("name", FORMATS)
def test_linear_has_the_same_bits_for_any_batch_and_split(name: str, isa: str) -> None:
    packed = pack(make_segment(name, 83, 256))
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(3))
    whole = product(x, packed)
    assert torch.equal(whole[:7], torch.cat([product(row[None], packed) for row in x[:7]]))
    for num_tokens in (2, 3, 4, 8, 11, 12, 16, 17, 24, 100, 299):
        assert torch.equal(product(x[:num_tokens], packed), whole[:num_tokens]), num_tokens
    for lanes in (2, 3, 8):
        assert torch.equal(product(x[:30], packed, lanes), whole[:30]), lanes
        assert torch.equal(product(x[:1], packed, lanes), whole[:1]), lanes


@pytest.mark.parametrize("in_features", [1, 3, 32, 123, 1000])
@pytest.mark.parametrize("name", DENSE)
def test_linear_takes_any_width_of_a_dense_weight(name: str, in_features: int, isa: str) -> None:
    segment = make_segment(name, 5, in_features)
    x = torch.randn(6, in_features, generator=torch.Generator().manual_seed(4))
    assert_close_sums(product(x, pack(segment)), x.double() @ dense(segment).T, x, segment)


def test_linear_stacks_segments_of_different_formats(isa: str) -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    segments = [
        make_segment("Q4_K", 24, 512, seed=1, row_order=order),
        make_segment("Q6_K", 7, 512, seed=2),
        make_segment("BF16", 18, 512, seed=3),
        make_segment("Q8_0", 33, 512, seed=4, row_order=torch.arange(33).flip(0)),
    ]
    bias = torch.randn(82, generator=torch.Generator().manual_seed(6))
    packed = pack(*segments, bias=bias)
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(7))
    alone = torch.cat([product(x, pack(segment)) for segment in segments], dim=1)
    for lanes in (1, 4):
        assert torch.equal(product(x, packed, lanes), alone + bias)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_a_weight_packed_for_products_are_refused(name: str) -> None:
    segment = make_segment(name, 37, 512)
    packed = WeightArena().pack(Linear((segment,), 512))
    with pytest.raises(RuntimeError, match="keeps_rows=True"):
        torch.ops.inferneo.packed_rows(packed, torch.tensor([0]))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_a_packed_weight_are_what_the_format_defines(name: str) -> None:
    order = torch.randperm(37, generator=torch.Generator().manual_seed(8))
    segment = make_segment(name, 37, 512, row_order=order)
    ids = torch.tensor([36, 0, 15, 16, 31, 0])
    rows = torch.ops.inferneo.packed_rows(pack(segment), ids)
    assert torch.equal(rows, dense(segment)[ids].float())


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_of_a_packed_weight_agree_with_the_gguf_package(name: str) -> None:
    segment = make_segment(name, 18, 512)
    expected = quants.dequantize(segment.data.numpy(), GGMLQuantizationType[name])
    rows = torch.ops.inferneo.packed_rows(pack(segment), torch.arange(18))
    np.testing.assert_array_equal(rows.numpy(), expected)


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0"])
def test_activations_of_any_magnitude_are_quantised(name: str, isa: str) -> None:
    segment = make_segment(name, 16, 64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(9))
    x *= torch.tensor([[0.0], [1e-34], [1e-29], [1.0], [1e33]])
    exact = exact_product(x, segment)
    torch.testing.assert_close(product(x, pack(segment)).double(), exact, rtol=1e-4, atol=1e-36)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_sums_of_the_largest_codes_and_activations_do_not_overflow(name: str, value: float, isa: str) -> None:
    segment = make_segment(name, 16, 512)
    ones = torch.full_like(segment.data, 255)
    scales = {"Q4_1": (0, 4), "Q5_1": (0, 4), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)}.get(name, (0, 2))
    _, type_size = BLOCK_TYPES[name]
    ones.view(-1, type_size)[:, slice(*scales)] = segment.data.view(-1, type_size)[:, slice(*scales)]
    if name == "Q8_0":  # 255 is -1 there
        ones.view(-1, type_size)[:, 2:] = 128
    segment = Segment(ones, name)
    x = torch.full((5, 512), value)
    assert_close_sums(product(x, pack(segment)), exact_product(x, segment), x, segment)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q6_K", "F32"])
def test_a_number_that_is_none_spoils_its_own_token_only(name: str, bad: float, isa: str) -> None:
    packed = pack(make_segment(name, 20, 256))
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(10))
    clean = product(x, packed)
    x[2, 77] = bad
    spoiled = product(x, packed)
    assert not spoiled[2].isfinite().any()
    assert torch.equal(spoiled[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


def test_no_tokens_give_no_rows() -> None:
    assert product(torch.empty(0, 64), pack(make_segment("Q4_1", 3, 64))).shape == (0, 3)


def test_an_arena_keeps_weights_apart_and_alive() -> None:
    arena, segments = WeightArena(), [make_segment("Q4_0", 5 + seed, 96, seed) for seed in range(6)]
    packed = [arena.pack(Linear((segment,), 96)) for segment in segments]
    del arena
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(11))
    for segment, weight in zip(segments, packed, strict=True):
        assert weight.shape[0] == segment.num_rows
        assert torch.equal(product(x, weight), product(x, pack(segment)))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x has shape [2, 63]; it must be [any, 64]", lambda packed: product(torch.zeros(2, 63), packed)),
        ("x has dtype Double", lambda packed: product(torch.zeros(2, 64).double(), packed)),
        ("lanes is 0", lambda packed: product(torch.zeros(2, 64), packed, 0)),
        ("no packed weight", lambda packed: product(torch.zeros(2, 64), torch.zeros_like(packed))),
        ("a packed weight is", lambda packed: product(torch.zeros(2, 64), packed.view(torch.int8))),
        ("no packed weight", lambda packed: product(torch.zeros(2, 64), packed.view(-1)[64:-64])),
        ("ids[1] is 3; it is in [0, 3)", lambda packed: torch.ops.inferneo.packed_rows(packed, torch.tensor([0, 3]))),
        ("in_features is 40; Q4_1 needs a multiple of 32", lambda _: pack_as("Q4_1", 20, 40)),
        ("a segment has shape [3, 20]; it must be [any, 40]", lambda _: pack_as("Q4_1", 20, 64)),
        ("CpuOps has no kernels for weights of type IQ4_NL", lambda _: pack_as("IQ4_NL", 20, 32)),
        ("row_order[0] is 3; it is in [0, 3)", lambda _: pack_as("Q4_1", 20, 32, torch.tensor([3, 1, 2]))),
        ("row_order has 2 rows; its segment has 3", lambda _: pack_as("Q4_1", 20, 32, torch.tensor([0, 1]))),
        ("a weight has 9 segments; it has 1 to 8", lambda _: pack(*[make_segment("Q4_1", 3, 32)] * 9)),
    ],
)
def test_bad_input_is_an_error_that_names_it(message: str, call: Callable[[Tensor], object]) -> None:
    packed = pack(make_segment("Q4_1", 3, 64))
    with pytest.raises((RuntimeError, InferneoError)) as raised:
        call(packed)
    assert message in str(raised.value)


def pack_as(name: str, row_bytes: int, in_features: int, row_order: Tensor | None = None) -> Tensor:
    segment = Segment(torch.zeros(3, row_bytes, dtype=torch.uint8), name, row_order)
    return WeightArena().pack(Linear((segment,), in_features))
