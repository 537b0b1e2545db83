"""Attention over a cache in bf16: its definition, how far that may lead from the exact one, and where bits may part."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inferneo_core.batch import AttentionMetadata
from inferneo_core.errors import BackendUnavailable
from inferneo_core.ops.base import CacheLayer
from inferneo_core.ops.cpu_ops import CpuOps

KEY_CHUNK = 256  # keys whose weights are relative to one largest score
ROUNDING = 2.0**-8  # the most that rounding to bf16 moves a number, relative to it
CASES = ((1, 1, 64), (1, 77, 64), (40, 600, 64), (3, 259, 14), (30, 100, 80), (1, 40, 7), (20, 21, 7))


def operands(query_len: int, seq_len: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [query_len, 3, head_dim] fp32 and one KV head's k, v [seq_len, head_dim], numbers of bf16."""
    generator = torch.Generator().manual_seed(seq_len)
    q = torch.randn(query_len, 3, head_dim, generator=generator) * 2
    k, v = (torch.randn(seq_len, head_dim, generator=generator).bfloat16() for _ in range(2))
    return q, k, v


def attend(cpu: CpuOps, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The verb, over one sequence in blocks of 16 whose last one is full of NaN behind the last token."""
    (query_len, _, head_dim), seq_len = q.shape, k.shape[0]
    num_blocks = -(-seq_len // 16)
    sides = []
    for side in (k, v):
        room = side.new_full((num_blocks * 16, head_dim), float("nan"))
        room[:seq_len] = side
        sides.append(room.view(num_blocks, 1, 16, head_dim))
    starts, lens = torch.tensor([0, query_len]).int(), torch.tensor([seq_len]).int()
    metadata = AttentionMetadata(starts, lens, torch.arange(num_blocks).int()[None], query_len, seq_len)
    return cpu.attention(q, CacheLayer(*sides), metadata).view(q.shape)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """[query_len, 3, seq_len] fp64; -inf where a query does not see a key."""
    first = k.shape[0] - q.shape[0]
    is_future = torch.arange(k.shape[0]) > first + torch.arange(q.shape[0])[:, None]
    return (q.double() @ k.double().T).masked_fill(is_future[:, None], float("-inf"))


def scaled(q: Tensor) -> Tensor:
    return q * torch.tensor(1.0 / q.shape[-1] ** 0.5)


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries and weights in bf16, the rest exact: queries are scaled for powers of two.

    A weight's rounding is relative to its chunk's largest score.
    """
    factor = torch.tensor(math.log2(math.e)) / torch.tensor(float(q.shape[-1])).sqrt()
    chunks = list(scores_of((q * factor).bfloat16(), k).split(KEY_CHUNK, dim=-1))
    parts = []
    for scores, values in zip(chunks, v.double().split(KEY_CHUNK), strict=True):
        largest = scores.amax(dim=-1, keepdim=True)
        weights = (scores - largest).exp2().nan_to_num(0.0).bfloat16().double()  # nan: a chunk that nobody sees
        parts.append((largest, weights.sum(dim=-1, keepdim=True), weights @ values))
    most = torch.stack([largest for largest, _, _ in parts]).amax(dim=0)
    total = sum((largest - most).exp2() * weight for largest, weight, _ in parts)
    return sum((largest - most).exp2() * values for largest, _, values in parts) / total


@pytest.mark.parametrize(("query_len", "seq_len", "head_dim"), CASES)
def test_attention_is_the_definition(cpu: CpuOps, query_len: int, seq_len: int, head_dim: int) -> None:
    """A score's last bit can tip a weight's rounding, by 2**-8 of it: so for a few numbers the bound is wider."""
    q, k, v = operands(query_len, seq_len, head_dim)
    error = (attend(cpu, q, k, v) - definition(q, k, v)).abs()
    assert (error < 1e-5).double().mean() > 0.97
    assert error.max() < ROUNDING * v.abs().max()


@pytest.mark.parametrize(("query_len", "seq_len", "head_dim"), CASES)
def test_attention_stays_within_the_stated_error(cpu: CpuOps, query_len: int, seq_len: int, head_dim: int) -> None:
    """Scores move by at most d, weights by a factor within 1 +- 2**-8 besides, and so does their sum."""
    q, k, v = operands(query_len, seq_len, head_dim)
    weights = scores_of(scaled(q.double()), k).softmax(dim=-1)  # [query_len, 3, seq_len]
    moved = ROUNDING * (scaled(q.double()).abs() @ k.double().abs().T).amax(dim=-1, keepdim=True)
    factor = (2 * moved).exp() * (1 + ROUNDING) / (1 - ROUNDING)
    bound = (factor - 1) * (weights @ v.double().abs())
    error = (attend(cpu, q, k, v) - weights @ v.double()).abs()
    assert (error <= bound + 1e-6).all()
    assert error.mean() < 0.05 * v.double().abs().mean()  # the bound is the worst case: errors cancel


def test_bits_part_only_below_the_smallest_normal_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dot product of bf16 takes a subnormal for 0; a fused multiply-add does not."""
    q, _, v = operands(9, 50, 64)
    k, v = torch.zeros(50, 64).bfloat16(), (v.double() * 2.0**-126).bfloat16()
    outputs = []
    for isa in ("avx2", "avx512bf16"):
        monkeypatch.setenv("INFERNEO_CPU_ISA", isa)
        try:
            outputs.append(attend(CpuOps(1), q, k, v))
        except BackendUnavailable as error:
            pytest.skip(str(error))
    difference = (outputs[0].double() - outputs[1].double()).abs().max()
    assert 0.0 < difference <= 50 * 2 * 2.0**-126
