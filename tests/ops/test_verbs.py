"""Each verb of the forward pass on every backend that runs here, against the same arithmetic in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from inferneo_core.batch import AttentionMetadata
from inferneo_core.errors import BackendUnavailable, ShapeError
from inferneo_core.ops.base import CacheLayer, Linear, Norm, Ops, Segment
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.torch_ops import TorchOps

MakeLinear = Callable[..., Linear]
EPS = 1e-5


@pytest.fixture(params=["torch", "cpu-scalar", "cpu-avx2", "cpu-avx512", "cpu-avx512bf16"])
def verbs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ops:
    """Each backend and instruction set that this machine has; two lanes share the work where there are lanes."""
    backend, _, isa = request.param.partition("-")
    if backend == "torch":
        return TorchOps()
    monkeypatch.setenv("INFERNEO_CPU_ISA", isa)
    try:
        return CpuOps(num_threads=2)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def random() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def make_linear(random: Callable[..., Tensor]) -> MakeLinear:
    def make(out_features: int, in_features: int, *, bias: bool = False) -> Linear:
        weight = Segment(random(out_features, in_features) * in_features**-0.5)
        return Linear((weight,), in_features, random(out_features) if bias else None)

    return make


def exact(x: Tensor, linear: Linear, norm: Norm | None = None) -> Tensor:
    """The (normed) product in fp64."""
    x = x.double()
    if norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
    y = x @ linear.weight.double().T
    return y if linear.bias is None else y + linear.bias.double()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_tokens", "out_features", "in_features"), [(1, 48, 96), (5, 123, 33), (130, 17, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_add_adds_product_and_residual(
    verbs: Ops, random: Any, make_linear: MakeLinear, num_tokens: int, out_features: int, in_features: int, bias: bool
) -> None:
    linear, x = make_linear(out_features, in_features, bias=bias), random(num_tokens, in_features)
    residual = random(num_tokens, out_features)
    prepared = verbs.prepare(linear, keeps_rows=True)
    assert_near(verbs.linear_add(x, prepared, residual), exact(x, linear) + residual)
    assert_near(verbs.linear_add(x, prepared, None), exact(x, linear))


def test_linear_add_takes_one_tensor_as_input_and_residual(verbs: Ops, random: Any, make_linear: MakeLinear) -> None:
    linear, x = make_linear(40, 40), random(3, 40)
    assert_near(verbs.linear_add(x, verbs.prepare(linear), x), exact(x, linear) + x)


@pytest.mark.parametrize(("num_tokens", "intermediate", "hidden"), [(1, 80, 48), (7, 77, 123), (300, 160, 32)])
def test_gate_up_silu_is_the_gated_product(
    verbs: Ops, random: Any, make_linear: MakeLinear, num_tokens: int, intermediate: int, hidden: int
) -> None:
    linear, norm = make_linear(2 * intermediate, hidden, bias=True), Norm(random(hidden), EPS)
    x = random(num_tokens, hidden) * 4
    gate, up = exact(x, linear, norm).chunk(2, dim=1)
    assert_near(verbs.gate_up_silu(x, norm, verbs.prepare(linear)), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("num_rows", [1, 4, 70])
def test_lm_head_norms_and_projects(verbs: Ops, random: Any, make_linear: MakeLinear, num_rows: int) -> None:
    linear, norm, x = make_linear(263, 48), Norm(random(48), EPS), random(num_rows, 48)
    assert_near(verbs.lm_head(x, norm, verbs.prepare(linear)), exact(x, linear, norm))


def test_embed_gives_rows(verbs: Ops, random: Any, make_linear: MakeLinear) -> None:
    linear = make_linear(123, 5)
    ids = torch.tensor([7, 0, 122, 7])
    assert torch.equal(verbs.embed(ids, verbs.prepare(linear, keeps_rows=True)), linear.weight[ids])


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (6, 6, 14), (5, 1, 80), (2, 1, 16)])
def test_qkv_rope_store_rotates_and_stores(
    verbs: Ops,
    random: Any,
    make_linear: MakeLinear,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cache_dtype: torch.dtype,
) -> None:
    hidden, block_size = 48, 4
    linear = make_linear((num_heads + 2 * num_kv_heads) * head_dim, hidden, bias=True)
    norm, x = Norm(random(hidden), EPS), random(7, hidden)
    positions = torch.tensor([0, 1, 2, 19, 3, 4, 11])
    slots = torch.tensor([31, 0, 5, 6, 17, 23, 9])
    angles = torch.arange(20)[:, None] * 0.3 ** torch.arange(head_dim // 2)  # [max_model_len, head_dim / 2]
    rope = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    before = random(8, num_kv_heads, block_size, head_dim).to(cache_dtype)
    cache = CacheLayer(before.clone(), before.clone())

    q = verbs.qkv_rope_store(x, norm, verbs.prepare(linear), positions, rope, cache, slots)

    expected = exact(x, linear, norm).view(7, -1, head_dim)
    pairs = torch.complex(*expected[:, : num_heads + num_kv_heads].chunk(2, dim=-1))
    turned = pairs * torch.polar(torch.ones(20, head_dim // 2).double(), angles.double())[positions, None]
    rotated = torch.cat([turned.real, turned.imag], dim=-1)
    assert q.shape == (7, num_heads, head_dim)
    assert_near(q, rotated[:, :num_heads])
    tolerance = torch.finfo(cache_dtype).eps
    for side, values in (("k", rotated[:, num_heads:]), ("v", expected[:, num_heads + num_kv_heads :])):
        pages: Tensor = getattr(cache, side)
        stored = pages.transpose(1, 2).flatten(0, 1)  # [num_slots, num_kv_heads, head_dim]
        torch.testing.assert_close(stored[slots].double(), values, rtol=tolerance, atol=1e-5)
        untouched = torch.ones(32, dtype=torch.bool)
        untouched[slots] = False
        assert torch.equal(stored[untouched], before.transpose(1, 2).flatten(0, 1)[untouched])


def test_verbs_refuse_what_does_not_fit(verbs: Ops, random: Any, make_linear: MakeLinear) -> None:
    linear, norm, x = verbs.prepare(make_linear(40, 48)), Norm(torch.ones(48), EPS), random(3, 47)
    cache = CacheLayer(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 8))
    ids, rope = torch.arange(3), torch.zeros(10, 8)
    metadata = AttentionMetadata(
        torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32),
        torch.zeros(1, 1, dtype=torch.int32), 3, 3,
    )  # fmt: skip
    refused: list[Callable[[], object]] = [
        lambda: verbs.linear_add(x, linear, None),
        lambda: verbs.linear_add(random(3, 48), linear, random(3, 39)),
        lambda: verbs.gate_up_silu(x, norm, linear),
        lambda: verbs.lm_head(x, norm, linear),
        lambda: verbs.qkv_rope_store(x, norm, linear, ids, rope, cache, ids),
        lambda: verbs.qkv_rope_store(random(3, 48), norm, linear, ids, torch.zeros(10, 6), cache, ids),
        lambda: verbs.attention(random(3, 6, 6), cache, metadata),
        lambda: verbs.attention(random(3, 4, 8), cache, metadata),
    ]
    for call in refused:
        with pytest.raises(ShapeError):
            call()
