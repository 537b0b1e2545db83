"""The kernels around a prefill's matrix products, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inferneo_kernels import elementwise, embedding
from inferneo_kernels.quant_layout import repack
from torch import Tensor

from inferneo_core.ops import torch_ops
from inferneo_core.ops.base import Norm
from inferneo_core.weights.dequant import dequantize

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK_SIZE = 4


def assert_as_close_as_the_reference(actual: Tensor, reference: Callable[..., Tensor], *inputs: Tensor) -> None:
    """fp32: to 1e-5. Lower: at most twice the reference's own error against fp64, and two ulp of the largest value.

    The ulps are for the interpreter, in which a cast to bf16 truncates.
    """
    exact = reference(*(x.double() for x in inputs))
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
        return
    own_error = (reference(*inputs).double() - exact).abs().max()
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max()
    assert (actual.double() - exact).abs().max() <= 2 * own_error + 2 * ulp


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=generator) * 2).to(dtype)


def norm_reference(x: Tensor, weight: Tensor) -> Tensor:
    if x.dtype != torch.float64:
        return torch_ops.rms_norm(x, Norm(weight, 1e-5))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def check_rms_norm(module: ModuleType, device: torch.device, dtype: torch.dtype, size: int = 123) -> None:
    generator = torch.Generator().manual_seed(size)
    wide = random(generator, 5, size + 3, dtype=dtype)
    x, weight = wide[:, :size], random(generator, size, dtype=dtype)
    y = module.rms_norm(wide.to(device)[:, :size], weight.to(device), 1e-5)
    assert_as_close_as_the_reference(y.cpu(), norm_reference, x, weight)
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(module.rms_norm(x.to(device), weight.to(device), 1e-5, rows.to(device)), y[rows.to(device)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 48, 123, 576])
def test_rms_norm_agrees(device: torch.device, dtype: torch.dtype, size: int) -> None:
    check_rms_norm(elementwise, device, dtype, size)


def rope_reference(num_heads: int, head_dim: int, angles: Tensor) -> Callable[[Tensor], Tensor]:
    """qkv -> [num_tokens, heads, head_dim], with every head rotated but those of V."""

    def rotate(qkv: Tensor) -> Tensor:
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        cos, sin = angles.to(torch.promote_types(qkv.dtype, torch.float32))[:, None].chunk(2, dim=-1)
        first, second = heads.to(cos.dtype).chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(qkv.dtype)
        num_kv_heads = (heads.shape[1] - num_heads) // 2
        return torch.cat([turned[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]], dim=1)

    return rotate


def check_rope_store(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int, int] = (6, 2, 16),
    cache_dtype: torch.dtype | None = None,
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(head_dim)
    num_tokens, num_blocks = 5, 4
    qkv = random(generator, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    rope = torch.randn(40, head_dim, generator=generator)
    positions, slots = torch.tensor([0, 39, 7, 8, 3]), torch.tensor([13, 0, -1, 6, 15])
    guard = 9.0
    # The first block of the tensor below belongs to nobody: what a padding slot must not touch.
    caches = torch.full((2, num_blocks + 1, num_kv_heads, BLOCK_SIZE, head_dim), guard, dtype=cache_dtype or dtype)
    caches = caches.to(device)
    q = module.rope_store(
        qkv.to(device),
        positions.to(device),
        rope.to(device),
        caches[0, 1:],
        caches[1, 1:],
        slots.to(device),
        num_heads,
    )
    rotated = rope_reference(num_heads, head_dim, rope[positions])
    k, v = torch.full((2, num_tokens, num_kv_heads, head_dim), guard, dtype=caches.dtype).unbind()
    stored = caches.cpu()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k[token], v[token] = stored[:, 1 + slot // BLOCK_SIZE, :, slot % BLOCK_SIZE]
            stored[:, 1 + slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = guard
    assert (stored == guard).all()
    live = slots >= 0
    assert (k[~live] == guard).all()
    parts = (slice(num_heads), slice(num_heads, num_heads + num_kv_heads), slice(num_heads + num_kv_heads, None))
    for actual, part, rows in zip((q.cpu(), k, v), parts, (live | ~live, live, live), strict=True):
        if actual.dtype == qkv.dtype:
            assert_as_close_as_the_reference(actual[rows], lambda x, p=part, r=rows: rotated(x)[r, p], qkv)
        else:
            torch.testing.assert_close(actual[rows], rotated(qkv)[rows, part].to(actual.dtype), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 64), (5, 1, 80), (3, 3, 96), (8, 2, 128)], ids=str)
def test_rope_store_agrees(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    check_rope_store(elementwise, device, dtype, heads)


def test_rope_store_rounds_to_the_caches_dtype(device: torch.device) -> None:
    check_rope_store(elementwise, device, torch.float32, cache_dtype=torch.bfloat16)


def silu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def check_silu_mul(module: ModuleType, device: torch.device, dtype: torch.dtype, size: int = 123) -> None:
    gate_up = random(torch.Generator().manual_seed(size), 3, 2 * size, dtype=dtype)
    actual = module.silu_mul(gate_up.to(device)).cpu()
    assert actual.shape == (3, size)
    assert_as_close_as_the_reference(actual, silu_reference, gate_up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 123, 1536])
def test_silu_mul_agrees(device: torch.device, dtype: torch.dtype, size: int) -> None:
    check_silu_mul(elementwise, device, dtype, size)


def check_add(module: ModuleType, device: torch.device, dtype: torch.dtype, size: int = 123) -> None:
    generator = torch.Generator().manual_seed(size)
    x, residual = random(generator, 3, size, dtype=dtype), random(generator, 3, size, dtype=dtype)
    moved = x.clone().to(device)
    assert module.add_(moved, residual.to(device)) is moved
    assert_as_close_as_the_reference(moved.cpu(), torch.add, x, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 123, 1536])
def test_add_agrees(device: torch.device, dtype: torch.dtype, size: int) -> None:
    check_add(elementwise, device, dtype, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 123, 1536])
def test_embedding_copies_rows(device: torch.device, generator: torch.Generator, dtype: torch.dtype, size: int) -> None:
    table = random(generator, 19, size, dtype=dtype).to(device)
    ids = torch.tensor([18, 0, 7, 7], device=device)
    assert torch.equal(embedding.embed(ids, table), table[ids])


def test_embedding_dequantises_rows(device: torch.device, generator: torch.Generator) -> None:
    blocks = torch.randint(256, (9, 2 * 34), generator=generator, dtype=torch.uint8)
    blocks[:, [1, 35]] = 0x2C  # the upper bytes of the scales: finite, and neither tiny nor huge
    ids = torch.tensor([8, 0, 3, 3])
    rows = embedding.embed(ids.to(device), repack(blocks.to(device), "Q8_0"), torch.float32)
    assert torch.equal(rows.cpu(), dequantize(blocks, "Q8_0")[ids])


def test_no_tokens_launch_nothing(device: torch.device) -> None:
    none = torch.empty(0, 16, device=device)
    ids, cache = torch.empty(0, dtype=torch.int64, device=device), torch.empty(1, 1, 4, 4, device=device)
    assert elementwise.rms_norm(none, torch.ones(16, device=device), 1e-5).shape == (0, 16)
    assert elementwise.rope_store(none, ids, torch.ones(3, 4, device=device), cache, cache, ids, 2).shape == (0, 2, 4)
    assert elementwise.silu_mul(none).shape == (0, 8)
    assert elementwise.add_(none, none).shape == (0, 16)
    assert embedding.embed(ids, torch.ones(3, 16, device=device)).shape == (0, 16)


FP32 = torch.float32
MUTATIONS: dict[tuple[str, str, str], Callable[[ModuleType, torch.device], None]] = {
    ("elementwise", "hidden_size + eps", "hidden_size"): lambda m, d: check_tiny_norm(m, d),
    (
        "elementwise",
        "other=0.0).to(tl.float32)\n    weight =",
        "other=1.0).to(tl.float32)\n    weight =",
    ): lambda m, d: check_rms_norm(m, d, FP32),
    ("elementwise", "x_ptr + row * stride_token", "x_ptr + row * hidden_size"): lambda m, d: check_rms_norm(m, d, FP32),
    ("elementwise", "first32 * cos - second32 * sin", "first32 * cos + second32 * sin"): lambda m, d: check_rope_store(
        m, d
    ),
    ("elementwise", "inside & (slot >= 0)", "inside"): lambda m, d: check_rope_store(m, d),
    ("elementwise", "slot % BLOCK_SIZE * stride_slot", "slot % BLOCK_SIZE"): lambda m, d: check_rope_store(m, d),
    ("elementwise", "tl.store(v_ptrs + HALF, second", "tl.store(v_ptrs + HALF, rotated_second"): lambda m, d: (
        check_rope_store(m, d)
    ),
    ("elementwise", "1.0 + tl.exp(-gate)", "1.0 + tl.exp(gate)"): lambda m, d: check_silu_mul(m, d, FP32),
    ("elementwise", "residual + x", "residual"): lambda m, d: check_add(m, d, FP32),
    ("elementwise", "tl.program_id(0).to(tl.int64) * size", "tl.program_id(0).to(tl.int64)"): lambda m, d: check_add(
        m, d, FP32
    ),
}


def check_tiny_norm(module: ModuleType, device: torch.device) -> None:
    """Rows whose mean square is as small as epsilon."""
    x = random(torch.Generator().manual_seed(0), 2, 16) * 1e-3
    y = module.rms_norm(x.to(device), torch.ones(16, device=device), 1e-5)
    assert_as_close_as_the_reference(y.cpu(), norm_reference, x, torch.ones(16))


def test_elementwise_passes_the_checks_of_its_mutations(device: torch.device) -> None:
    for check in MUTATIONS.values():
        check(elementwise, device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mistake may make NaN, and the check must see it
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_elementwise_mutation_is_caught(
    mutation: Any, assert_caught: Callable[..., None], device: torch.device
) -> None:
    assert_caught("elementwise", mutation, lambda module: MUTATIONS[mutation](module, device))
