"""The linear verbs on dense weights: every regime against TorchOps, and against fp64 in low precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from inferneo_kernels import linear
from inferneo_kernels.quant_layout import Weight, dense, merge
from torch import Tensor

from inferneo_core.ops.base import CacheLayer, Linear, Norm, Segment
from inferneo_core.ops.torch_ops import TorchOps

EPS = 1e-5
REGIMES: list[Any] = [regime for regime in get_args(linear.Regime) if regime != "auto"]
Random = Callable[..., Tensor]


@pytest.fixture
def random(generator: torch.Generator, device: torch.device) -> Random:
    """random(*shape): normal fp32 values."""
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


def run_add(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, regime: Any) -> Tensor:
    return linear.linear_add(x, [dense(w)], bias, residual, regime=regime)


def torch_linear(w: Tensor, bias: Tensor | None = None) -> Linear:
    return Linear((Segment(w),), w.shape[1], bias)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """fp32 sums of the same terms in other orders."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-5)


def strided(x: Tensor) -> Tensor:
    """The same values in rows that are further apart."""
    wide = x.new_full((x.shape[0], x.shape[1] + 5), float("nan"))
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


SHAPES = [(1, 1, 3), (1, 37, 123), (5, 23, 576), (17, 33, 48), (67, 9, 96)]  # num_tokens, rows, columns
# A vector program serves one token: 67 of them test nothing that 5 do not.
CASES = [(regime, *shape) for regime in REGIMES for shape in SHAPES if regime != "gemv" or shape[0] <= 5]


@pytest.mark.parametrize(("regime", "num_tokens", "rows", "columns"), CASES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_add_equals_reference(
    regime: Any, num_tokens: int, rows: int, columns: int, with_bias: bool, random: Random, device: torch.device
) -> None:
    x, w, residual = (
        strided(random(num_tokens, columns)),
        random(rows, columns) * columns**-0.5,
        random(num_tokens, rows),
    )
    bias = random(rows) if with_bias else None
    actual = run_add(x, w, bias, residual, regime)
    assert_close(actual, TorchOps(device=device).linear_add(x, torch_linear(w, bias), residual))


@pytest.mark.parametrize("regime", REGIMES)
def test_linear_add_without_residual_equals_reference(regime: Any, random: Random, device: torch.device) -> None:
    x, w = random(3, 80), random(21, 80) * 0.1
    assert_close(run_add(x, w, None, None, regime), TorchOps(device=device).linear_add(x, torch_linear(w), None))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_lm_head_equals_reference(regime: Any, with_bias: bool, random: Random, device: torch.device) -> None:
    x, w, norm = random(3, 123), random(41, 123) * 0.1, Norm(1 + 0.2 * random(123), EPS)
    bias = random(41) if with_bias else None
    actual = linear.lm_head(x, norm.weight, EPS, [dense(w)], bias, regime=regime)
    assert actual.dtype == torch.float32
    assert_close(actual, TorchOps(device=device).lm_head(x, norm, torch_linear(w, bias)))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_weights", [1, 2])
def test_gate_up_silu_equals_reference(
    regime: Any, with_bias: bool, num_weights: int, random: Random, device: torch.device
) -> None:
    x, w, norm = strided(random(4, 96)), random(2 * 19, 96) * 0.1, Norm(1 + 0.2 * random(96), EPS)
    bias = random(2 * 19) if with_bias else None
    weights = [dense(part) for part in w.chunk(num_weights)]
    actual = linear.gate_up_silu(x, norm.weight, EPS, weights, bias, regime=regime)
    assert_close(actual, TorchOps(device=device).gate_up_silu(x, norm, torch_linear(w, bias)))


def make_qkv(
    random: Random,
    device: torch.device,
    heads: tuple[int, int, int] = (6, 2, 16),
    num_tokens: int = 3,
    bias: bool = True,
) -> dict[str, Any]:
    """Arguments of qkv_rope_store; heads are (num_heads, num_kv_heads, head_dim)."""
    num_heads, num_kv_heads, head_dim = heads
    rows, columns, block_size, num_blocks = (num_heads + 2 * num_kv_heads) * head_dim, 48, 5, 4
    # Strides that no shape gives away: slots outside heads in memory. A block before and one behind are not the
    # cache's: what a mistaken kernel writes there is found.
    room = random(2, num_blocks + 2, block_size, num_kv_heads, head_dim)
    slots = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(1))[:num_tokens]
    return {
        "x": strided(random(num_tokens, columns)),
        "norm_weight": 1 + 0.2 * random(columns),
        "w": random(rows, columns) * columns**-0.5,
        "bias": random(rows) if bias else None,
        "positions": torch.arange(7, 7 + 3 * num_tokens, 3, device=device),
        "rope": random(7 + 3 * num_tokens, head_dim),
        "room": room,
        "slot_mapping": slots.to(device),
    }


def run_qkv(case: dict[str, Any], regime: Any, module: Any = linear, weights: Any = None) -> tuple[Tensor, Tensor]:
    """q, and the room with the cache in it."""
    room = case["room"].clone()
    k, v = cache_in(room)
    arguments = {name: value for name, value in case.items() if name not in ("w", "room")}
    weights = weights or [dense(case["w"])]
    q = module.qkv_rope_store(eps=EPS, weights=weights, k_cache=k, v_cache=v, regime=regime, **arguments)
    return q, room


def cache_in(room: Tensor) -> tuple[Tensor, Tensor]:
    """k and v: [num_blocks, num_kv_heads, block_size, head_dim], views."""
    k, v = room.transpose(2, 3)[:, 1:-1]
    return k, v


def expected_qkv(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """TorchOps' q and room; it is not given slots of -1."""
    kept = case["slot_mapping"] >= 0
    room = case["room"].to(dtype, copy=True)
    cache = CacheLayer(*cache_in(room))
    norm, ops = Norm(case["norm_weight"].to(dtype), EPS), TorchOps(dtype, case["x"].device)
    w = torch_linear(case["w"].to(dtype), None if case["bias"] is None else case["bias"].to(dtype))
    x, positions, slots = case["x"].to(dtype), case["positions"], case["slot_mapping"]
    ops.qkv_rope_store(x[kept], norm, w, positions[kept], case["rope"], cache, slots[kept])
    scratch = CacheLayer(torch.zeros_like(cache.k), torch.zeros_like(cache.v))
    return ops.qkv_rope_store(x, norm, w, positions, case["rope"], scratch, slots.clamp(min=0)), room


def check_qkv(case: dict[str, Any], regime: Any, module: Any = linear, weights: Any = None) -> None:
    for actual, expected in zip(run_qkv(case, regime, module, weights), expected_qkv(case), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 16), (5, 1, 80), (3, 1, 64), (2, 1, 96), (2, 2, 128), (3, 3, 6)])
def test_qkv_rope_store_equals_reference_in_every_head_layout(
    regime: Any, heads: tuple[int, int, int], random: Random, device: torch.device
) -> None:
    check_qkv(make_qkv(random, device, heads, num_tokens=1 if regime == "gemv" else 3), regime)


@pytest.mark.parametrize("regime", REGIMES)
def test_qkv_rope_store_skips_padding_slots(regime: Any, random: Random, device: torch.device) -> None:
    case = make_qkv(random, device)
    case["slot_mapping"][1] = -1
    check_qkv(case, regime)


@pytest.mark.parametrize("regime", REGIMES)
def test_qkv_rope_store_serves_several_weights(regime: Any, random: Random, device: torch.device) -> None:
    case = make_qkv(random, device, num_tokens=2)
    check_qkv(case, regime, weights=[dense(part) for part in case["w"].split([6 * 16, 2 * 16, 2 * 16])])


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.float32])
def test_qkv_rope_store_casts_to_the_cache_dtype(
    cache_dtype: torch.dtype, random: Random, device: torch.device
) -> None:
    case = make_qkv(random, device)
    case["room"] = case["room"].to(cache_dtype)
    for actual, expected in zip(run_qkv(case, "tile"), expected_qkv(case), strict=True):
        torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-3, atol=1e-5)


def run_verb(verb: str, case: dict[str, Any], residual: Tensor, regime: Any) -> tuple[Tensor, ...]:
    weights, arguments = [dense(case["w"])], (case["norm_weight"], EPS)
    if verb == "qkv_rope_store":
        return run_qkv(case, regime)
    if verb == "linear_add":
        return (linear.linear_add(case["x"], weights, case["bias"], residual, regime=regime),)
    return (getattr(linear, verb)(case["x"], *arguments, weights, case["bias"], regime=regime),)


def expected_verb(verb: str, case: dict[str, Any], residual: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    if verb == "qkv_rope_store":
        return expected_qkv(case, dtype)
    x, norm_weight, w, bias = (case[name].to(dtype) for name in ("x", "norm_weight", "w", "bias"))
    ops, weight = TorchOps(dtype, x.device), torch_linear(w, bias)
    if verb == "linear_add":
        return (ops.linear_add(x, weight, residual.to(dtype)),)
    return (getattr(ops, verb)(x, Norm(norm_weight, EPS), weight),)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("verb", ["linear_add", "lm_head", "gate_up_silu", "qkv_rope_store"])
def test_low_precision_error_is_near_the_reference(
    verb: str, regime: Any, dtype: torch.dtype, random: Random, device: torch.device
) -> None:
    """At most twice TorchOps' error in the same dtype, both against fp64. The interpreter truncates where it casts to
    bf16, and those errors all point one way: there the bound only tells rounding from nonsense."""
    allowance = 8.0 if dtype == torch.bfloat16 and device.type == "cpu" else 2.0
    case = make_qkv(random, device)
    for name in ("x", "norm_weight", "w", "bias", "room"):
        case[name] = case[name].to(dtype)
    residual = random(case["x"].shape[0], case["w"].shape[0]).to(dtype)
    actual = run_verb(verb, case, residual, regime)
    low, exact = (expected_verb(verb, case, residual, kind) for kind in (dtype, torch.float64))
    for ours, reference, truth in zip(actual, low, exact, strict=True):
        error, bound = ((value.double() - truth.double()).abs().max().item() for value in (ours, reference))
        assert error <= allowance * bound


@pytest.mark.parametrize("regime", ["gemv", "tile", "wide"])
def test_regime_gives_a_token_the_same_bits_in_any_batch(regime: Any, random: Random, device: torch.device) -> None:
    num_tokens = 3 if regime == "gemv" else 19
    x, w, weight = random(num_tokens, 200), random(20, 200), 1 + 0.2 * random(200)
    together = linear.gate_up_silu(x, weight, EPS, [dense(w)], None, regime=regime)
    for token in (0, num_tokens - 1):
        alone = linear.gate_up_silu(x[token : token + 1], weight, EPS, [dense(w)], None, regime=regime)
        assert torch.equal(alone[0], together[token])


def test_no_tokens_give_no_rows(random: Random) -> None:
    for regime in REGIMES:
        assert run_add(random(0, 48), random(5, 48), None, None, regime).shape == (0, 5)


def test_choose_regime_follows_the_table(device: torch.device) -> None:
    plain = dense(torch.empty(8, 32, device=device))
    packed = Weight(torch.empty(8, 4, dtype=torch.int32), 32, "Q4_0")
    expected = {1: ("gemv", "gemv"), 2: ("tile", "tile"), 16: ("tile", "tile"), 17: ("vendor", "wide")}
    expected |= {64: ("vendor", "wide"), 65: ("vendor", "vendor")}
    for num_tokens, regimes in expected.items():
        found = tuple(linear.choose_regime([weight], num_tokens) for weight in (plain, packed))
        assert found == regimes
    assert linear.choose_regime([plain, packed], 17) == "wide"


def test_merge_joins_neighbours_of_one_type(random: Random) -> None:
    first, second, third = random(3, 32), random(5, 32), random(2, 32).half()
    joined, other = merge([dense(first), dense(second), dense(third)])
    assert torch.equal(joined.codes, torch.cat([first, second]))
    assert torch.equal(other.codes, third)


QKV_MUTATIONS = [
    ("linear_kernels", "rows = pairs // HALF * HEAD_DIM + pairs % HALF +", "rows = pairs +"),
    ("linear_kernels", "head < num_heads + num_kv_heads", "head < num_heads"),
    ("linear_kernels", "first * cos - second * sin, second * cos", "first * cos + second * sin, second * cos"),
    ("linear_kernels", "position * HEAD_DIM + HALF + lane", "position * HEAD_DIM + lane"),
    ("linear_kernels", "position = tl.load(positions_ptr + tokens", "position = tl.load(positions_ptr + tokens * 0"),
    ("linear_kernels", "slot // block_size * stride_block", "slot // block_size * stride_head"),
    ("linear_kernels", "stored = mask & (slot >= 0)", "stored = mask"),
    ("linear_kernels", "k_head < num_kv_heads)", "k_head <= num_kv_heads)"),
    ("linear_kernels", "v_head = k_head - num_kv_heads", "v_head = k_head - num_kv_heads + 1"),
    ("linear_kernels", "bias_ptr + first_head * HEAD_DIM + rows", "bias_ptr + rows"),
    ("linear_kernels", "tl.store(places + HALF,", "tl.store(places,"),
    ("linear_tile", "normalised.to(tl.float32) * weight.to(tl.float32)", "normalised.to(tl.float32)"),
    ("linear_tile", "tokens.to(tl.int64)[:, None] * stride_token", "tokens.to(tl.int64)[:, None] * K"),
    ("linear_tile", "keep_dims=True) / K + eps", "keep_dims=True) / BLOCK_K + eps"),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mistake may make NaN, and the check must see it
@pytest.mark.parametrize("mutation", [None, *QKV_MUTATIONS], ids=str)
def test_qkv_mutation_is_caught(mutation: Any, assert_caught: Any, random: Random, device: torch.device) -> None:
    case = make_qkv(random, device, heads=(3, 2, 6), num_tokens=2)
    case["slot_mapping"][1] = -1
    parts = case["w"].split([3 * 6, 4 * 6])

    def check(module: Any) -> None:
        check_qkv(case, "tile", module, [dense(part) for part in parts])

    check(linear) if mutation is None else assert_caught("linear", mutation, check)


ADD_MUTATIONS = [
    ("linear_kernels", "rows = tl.program_id(0) // token_tiles * BLOCK_N", "rows = tl.program_id(0) * BLOCK_N"),
    ("linear_kernels", "acc += residual.to(tl.float32)", "acc += 0"),
    ("linear_kernels", "residual_ptr + tokens * stride_residual", "residual_ptr + tokens * stride_out * 0"),
    ("linear_kernels", "out_ptr + tokens * stride_out +", "out_ptr + tokens * stride_out * 0 +"),
    ("linear_tile", "w, columns = w_next, upcoming", "columns = upcoming"),
    ("linear_tile", "upcoming = columns + BLOCK_K", "upcoming = columns + BLOCK_K // 2"),
    ("linear_tile", "acc += w.to(tl.float32) * x.to(tl.float32)", "acc = w.to(tl.float32) * x.to(tl.float32)"),
    ("linear", "residual[:, rows],", "residual,"),
    ("linear", "out[:, rows],", "out,"),
    ("linear", "bias[rows],", "bias,"),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutation", [None, *ADD_MUTATIONS], ids=str)
def test_linear_add_mutation_is_caught(mutation: Any, assert_caught: Any, random: Random, device: torch.device) -> None:
    x, w, bias, residual = random(2, 700), random(7, 700) * 0.05, random(7), strided(random(2, 7))
    expected = TorchOps(device=device).linear_add(x, torch_linear(w, bias), residual)
    weights = [dense(part) for part in w.split([4, 3])]

    def check(module: Any) -> None:
        assert_close(module.linear_add(x, weights, bias, residual, regime="gemv"), expected)

    check(linear) if mutation is None else assert_caught("linear", mutation, check)


GATE_UP_MUTATIONS = [
    ("linear_kernels", "rows = pairs + place // (BLOCK_N // 2) * intermediate_size", "rows = pairs + place"),
    ("linear_kernels", "row_mask = pairs < intermediate_size", "row_mask = rows < intermediate_size"),
    ("linear_kernels", "hidden = gate / (1.0 + tl.exp(-gate)) * up", "hidden = up / (1.0 + tl.exp(-up)) * gate"),
    ("linear_kernels", "tokens.to(tl.int64)[None, :] * stride_out + pairs", "tokens[None, :] * 0 + pairs"),
    (
        "linear_tile",
        "start + tl.arange(0, BLOCK_K)[None, :]\n        w =",
        "tl.arange(0, BLOCK_K)[None, :]\n        w =",
    ),
    ("linear_kernels", "acc, (2, BLOCK_N // 2, BLOCK_M)), (1, 2, 0)", "acc, (BLOCK_N // 2, 2, BLOCK_M)), (0, 2, 1)"),
    ("linear_tile", "normalised = (x.to(tl.float32) * scale)", "normalised = (x.to(tl.float32))"),
    ("linear_tile", "acc = _dot(w, x, acc, DOT_FP32)", "acc = _dot(w, x, acc * 0, DOT_FP32)"),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutation", [None, *GATE_UP_MUTATIONS], ids=str)
def test_gate_up_mutation_is_caught(mutation: Any, assert_caught: Any, random: Random, device: torch.device) -> None:
    x, w, norm = random(2, 150), random(2 * 11, 150) * 0.1, Norm(1 + 0.2 * random(150), EPS)
    expected = TorchOps(device=device).gate_up_silu(x, norm, torch_linear(w))

    def check(module: Any) -> None:
        assert_close(module.gate_up_silu(x, norm.weight, EPS, [dense(w)], None, regime="tile"), expected)

    check(linear) if mutation is None else assert_caught("linear", mutation, check)
