"""Quantised weights in the kernels' planes: exact to the bit, and right in every regime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from inferneo_kernels import linear, quant_decode
from inferneo_kernels.quant_layout import FORMATS, Weight, dense, merge, repack
from torch import Tensor

from inferneo_core.ops.base import Linear, Norm, Segment
from inferneo_core.ops.torch_ops import TorchOps
from inferneo_core.weights.dequant import BLOCK_TYPES, dequantize

EPS = 1e-5
REGIMES: list[Any] = [regime for regime in get_args(linear.Regime) if regime != "auto"]
FP16_FIELDS = {"Q6_K": [208], **{name: [0, 2] for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")}}  # byte offsets; else [0]


def random_rows(quant_type: str, num_rows: int, blocks_per_row: int, generator: torch.Generator) -> Tensor:
    """Rows of random blocks [num_rows, bytes] uint8, whose scales make weights of ordinary size."""
    type_size = BLOCK_TYPES[quant_type].type_size
    blocks = torch.randint(0, 256, (num_rows, blocks_per_row, type_size), dtype=torch.uint8, generator=generator)
    size = 2e-4 if quant_type.endswith("K") else 2e-2 if quant_type != "Q8_0" else 1e-3
    for offset in FP16_FIELDS.get(quant_type, [0]):
        scale = (torch.randn(num_rows, blocks_per_row, 1, generator=generator) * size).half()
        blocks[:, :, offset : offset + 2] = scale.view(torch.uint8)
    return blocks.view(num_rows, -1)


def make_weight(
    quant_type: str, num_rows: int, generator: torch.Generator, device: torch.device, blocks_per_row: int = 3
) -> tuple[Weight, Tensor]:
    """The kernels' Weight, and the same rows dense."""
    rows = random_rows(quant_type, num_rows, blocks_per_row, generator)
    return repack(rows.to(device), quant_type), dequantize(rows, quant_type).to(device)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """fp32 sums of the same terms in other orders."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-5)


def test_formats_are_those_of_the_loader() -> None:
    assert {name: tuple(layout[:2]) for name, layout in FORMATS.items()} == {
        name: tuple(block) for name, block in BLOCK_TYPES.items()
    }


@pytest.mark.parametrize("quant_type", FORMATS)
@pytest.mark.parametrize(("num_rows", "blocks_per_row"), [(1, 1), (5, 3), (9, 5)])
def test_dequantize_into_is_bit_equal_to_the_loader(
    quant_type: str, num_rows: int, blocks_per_row: int, generator: torch.Generator, device: torch.device
) -> None:
    weight, expected = make_weight(quant_type, num_rows, generator, device, blocks_per_row)
    for dtype in (torch.float32, torch.float16):
        out = torch.full_like(expected, float("nan"), dtype=dtype)
        assert quant_decode.dequantize_into(out, weight) is out
        assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("quant_type", FORMATS)
def test_dequantize_into_takes_a_slab_or_chosen_rows(
    quant_type: str, generator: torch.Generator, device: torch.device
) -> None:
    weight, expected = make_weight(quant_type, 11, generator, device, 2)
    assert torch.equal(
        quant_decode.dequantize_into(torch.empty_like(expected[:6]), weight, first_row=4), expected[4:10]
    )
    ids = torch.tensor([10, 0, 7, 7, 3], device=device)
    assert torch.equal(quant_decode.dequantize_into(torch.empty_like(expected[:5]), weight, rows=ids), expected[ids])


@pytest.mark.parametrize("quant_type", FORMATS)
def test_repack_takes_at_most_three_percent_more_than_the_file(quant_type: str, generator: torch.Generator) -> None:
    rows = random_rows(quant_type, 4, 2, generator)
    assert rows.nbytes <= repack(rows, quant_type).num_bytes <= 1.03 * rows.nbytes


def test_repack_in_slabs_equals_repack_at_once(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows("Q5_K", 7, 2, generator)
    whole = repack(rows, "Q5_K")
    monkeypatch.setattr("inferneo_kernels.quant_layout.SLAB_BYTES", 3 * rows.shape[1])
    for plane, expected in zip(repack(rows, "Q5_K").planes, whole.planes, strict=True):
        assert plane is not None and expected is not None
        assert torch.equal(plane, expected)


@pytest.mark.parametrize(
    ("data", "quant_type"),
    [
        (torch.zeros(2, 18, dtype=torch.uint8), "Q2_K"),
        (torch.zeros(2, 17, dtype=torch.uint8), "Q4_0"),
        (torch.zeros(2, 18, dtype=torch.int8), "Q4_0"),
        (torch.zeros(18, dtype=torch.uint8), "Q4_0"),
    ],
)
def test_repack_refuses_what_it_does_not_know(data: Tensor, quant_type: str) -> None:
    with pytest.raises(ValueError, match=quant_type):
        repack(data, quant_type)


def run_verb(
    verb: str, weights: list[Weight], w: Tensor, x: Tensor, norm: Norm, regime: Any, module: Any = linear
) -> tuple[Tensor, Tensor]:
    """A verb by the kernels, and by TorchOps on the dense rows."""
    ops, whole = TorchOps(x.dtype, x.device), Linear((Segment(w.to(x.dtype)),), w.shape[1])
    if verb == "linear_add":
        return module.linear_add(x, weights, None, None, regime=regime), ops.linear_add(x, whole, None)
    actual = getattr(module, verb)(x, norm.weight, norm.eps, weights, None, regime=regime)
    return actual, getattr(ops, verb)(x, norm, whole)


@pytest.mark.parametrize("quant_type", FORMATS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("verb", ["linear_add", "gate_up_silu"])
def test_quantised_verb_equals_reference(
    verb: str, regime: Any, quant_type: str, generator: torch.Generator, device: torch.device
) -> None:
    weight, w = make_weight(quant_type, 10, generator, device)
    x = torch.randn(1 if regime == "gemv" else 5, w.shape[1], generator=generator).to(device)
    norm = Norm(1 + 0.2 * torch.randn(w.shape[1], generator=generator).to(device), EPS)
    assert_close(*run_verb(verb, [weight], w, x, norm, regime))


@pytest.mark.parametrize("quant_type", ["Q4_1", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("regime", REGIMES)
def test_quantised_lm_head_in_fp16_is_near_the_reference(
    regime: Any, quant_type: str, generator: torch.Generator, device: torch.device
) -> None:
    weight, w = make_weight(quant_type, 21, generator, device)
    x = torch.randn(2, w.shape[1], generator=generator).to(device)
    norm = Norm(torch.ones(w.shape[1], device=device), EPS)
    exact = TorchOps(device=device).lm_head(x, norm, Linear((Segment(w),), w.shape[1]))
    actual, low = run_verb("lm_head", [weight], w, x.half(), Norm(norm.weight.half(), EPS), regime)
    error, bound = ((value.double() - exact.double()).abs().max() for value in (actual, low))
    assert error <= 2 * bound


@pytest.mark.parametrize("regime", REGIMES)
def test_weights_of_several_types_make_one_product(
    regime: Any, generator: torch.Generator, device: torch.device
) -> None:
    """Q4_K_M has them in one QKV product; here gate and up differ, too."""
    parts = [make_weight(quant_type, 6, generator, device, 1) for quant_type in ("Q4_K", "Q4_K", "Q6_K")]
    plain = torch.randn(6, 256, generator=generator).to(device) * 0.05
    weights = list(merge([*(weight for weight, _ in parts), dense(plain)]))
    assert [(weight.quant_type, weight.num_rows) for weight in weights] == [("Q4_K", 12), ("Q6_K", 6), ("", 6)]
    w = torch.cat([*(rows for _, rows in parts), plain])
    x, norm = torch.randn(2, 256, generator=generator).to(device), Norm(torch.ones(256, device=device), EPS)
    for verb in ("linear_add", "gate_up_silu"):
        assert_close(*run_verb(verb, weights, w, x, norm, regime))


@pytest.mark.parametrize("limit", [96 * 4, 1])
def test_vendor_regime_dequantises_slab_by_slab(
    limit: int, generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "SCRATCH_ELEMENTS", limit)
    weight, w = make_weight("Q4_0", 10, generator, device)
    x, bias, residual = (torch.randn(*shape, generator=generator).to(device) for shape in ((3, 96), (10,), (3, 10)))
    actual = linear.linear_add(x, [weight], bias, residual, regime="vendor")
    assert_close(actual, x @ w.T + bias + residual)


@pytest.mark.parametrize("size", [2.0**-40, 2.0**60])
def test_vector_form_holds_its_range_of_activations(
    size: float, generator: torch.Generator, device: torch.device
) -> None:
    """It scales subnormal codes up and down again; x may be this small or large without losing a bit."""
    weight, w = make_weight("Q4_K", 5, generator, device)
    x = torch.randn(1, w.shape[1], generator=generator).to(device)
    actual = linear.linear_add(x * size, [weight], None, None, regime="gemv")
    assert_close(actual / size, linear.linear_add(x, [weight], None, None, regime="gemv"))


@pytest.mark.parametrize("regime", ["gemv", "tile", "wide"])
def test_quantised_regime_gives_a_token_the_same_bits_in_any_batch(
    regime: Any, generator: torch.Generator, device: torch.device
) -> None:
    weight, w = make_weight("Q6_K", 6, generator, device)
    x = torch.randn(3 if regime == "gemv" else 17, w.shape[1], generator=generator).to(device)
    together = linear.linear_add(x, [weight], None, None, regime=regime)
    alone = linear.linear_add(x[-1:], [weight], None, None, regime=regime)
    assert torch.equal(alone[0], together[-1])


def check_formats(regime: Any, generator: torch.Generator, device: torch.device) -> Callable[[Any], None]:
    """A check of one product in every way of scaling and of packing."""
    cases = []
    for quant_type in ("Q5_0", "Q4_1", "Q8_0", "Q5_K", "Q6_K"):
        weight, w = make_weight(quant_type, 3, generator, device, 5 if quant_type.endswith("K") else 40)
        x = torch.randn(1, w.shape[1], generator=generator).to(device)
        cases.append((weight, w, x, Norm(torch.ones(w.shape[1], device=device), EPS)))

    def check(module: Any) -> None:
        for weight, w, x, norm in cases:
            assert_close(*run_verb("linear_add", [weight], w, x, norm, regime, module))

    return check


DECODE_MUTATIONS = [
    ("quant_decode", "(4 * INDEX if INDEX < 5 else 4 * INDEX - 12)", "(4 * INDEX if INDEX < 5 else 4 * INDEX - 16)"),
    ("quant_decode", "<< (PLACE + 4 - INDEX)) & (1 <<", "<< (PLACE + 3 - INDEX)) & (1 <<"),
    ("quant_decode", "<< (PLACE + 4 - 2 * INDEX)) & (3 <<", "<< (PLACE + 4 - 2 * INDEX)) & (1 <<"),
    (
        "quant_decode",
        "scale, shift = half_of(pair, False), half_of(pair, True)",
        "scale, shift = half_of(pair, True), half_of(pair, True)",
    ),
    ("quant_decode", "blocks = quads // 2 if BITS == 8", "blocks = quads // 4 if BITS == 8"),
    ("quant_decode", "blocks * 2 + PART", "blocks * 2"),
    ("quant_decode", "((small >> 8) & 255)", "(small & 255)"),
    ("quant_decode", "rows * (K // 16)", "rows * (K // 32)"),
    ("quant_decode", "(rows * row_quads + quads) * 4", "(rows * row_quads) * 4"),
]
VECTOR_MUTATIONS = [
    ("linear_tile", "x * 2.0 ** (64 - code_place(i, BITS))", "x * 2.0 ** (64 - 4 * i)"),
    ("linear_tile", "+ shift * tl.sum(sums, axis=2)", ""),
    ("linear_tile", "upcoming = quads + NUM_QUADS", "upcoming = quads"),
    ("linear_tile", "words, quads = words_next, upcoming", "quads = upcoming"),
]
TILE_MUTATIONS = [
    ("quant_decode", "scale * 2.0 ** (23 - code_place(INDEX, BITS))", "scale * 2.0 ** (23 - 4 * INDEX)"),
    ("linear_tile", "(start + place // 4) * (CODES * 4) + place % 4", "start * (CODES * 4) + place"),
    ("linear_tile", "quads = start + tl.arange(0, NUM_QUADS)", "quads = tl.arange(0, NUM_QUADS)"),
    ("linear_tile", 'SCALES == "d_sc" and i == CODES // 2', 'SCALES == "d_sc" and i == CODES'),
]
MUTATIONS = [("gemv", mutation) for mutation in (None, *DECODE_MUTATIONS, *VECTOR_MUTATIONS)]
MUTATIONS += [("tile", mutation) for mutation in (None, *TILE_MUTATIONS)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mistake may make NaN, and the check must see it
@pytest.mark.parametrize(("regime", "mutation"), MUTATIONS, ids=str)
def test_quantised_mutation_is_caught(
    regime: Any, mutation: Any, assert_caught: Any, generator: torch.Generator, device: torch.device
) -> None:
    check = check_formats(regime, generator, device)
    check(linear) if mutation is None else assert_caught("linear", mutation, check)
