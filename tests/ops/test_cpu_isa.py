"""The verbs in C++ give the same bits on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inferneo_core.batch import AttentionMetadata
from inferneo_core.cache_rows import row_elements, to_rows
from inferneo_core.errors import BackendUnavailable
from inferneo_core.ops.base import CacheLayer, Linear, Norm, Segment
from inferneo_core.ops.cpu_ops import CpuOps

EPS = 1e-5
LENS = ((1, 1), (1, 700), (3, 5), (40, 300), (2, 259))  # (query_len, seq_len) of each sequence


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def dense(ops: CpuOps, rows: int, columns: int) -> Linear:
    return ops.prepare(Linear((Segment(random(rows, columns)),), columns))


def norm_and_project(ops: CpuOps) -> Tensor:
    return ops.lm_head(random(5, 123), Norm(random(123), EPS), dense(ops, 77, 123))


def gate_up_silu(ops: CpuOps) -> Tensor:
    return ops.gate_up_silu(random(3, 200), Norm(random(200), EPS), dense(ops, 2 * 37, 200))


def qkv_rope_store(ops: CpuOps, dtype: torch.dtype) -> Tensor:
    head_dim, positions = 14, torch.tensor([0, 7, 3])
    shape = (2, 2, 4, row_elements(head_dim, dtype))
    cache = CacheLayer(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
    angles = torch.arange(10)[:, None] * 0.3 ** torch.arange(head_dim // 2)
    rope = torch.cat([angles.cos(), angles.sin()], dim=1)
    weight = dense(ops, 8 * head_dim, 64)
    q = ops.qkv_rope_store(random(3, 64), Norm(random(64), EPS), weight, positions, rope, cache, positions)
    return torch.cat([q.flatten(), cache.k.flatten(), cache.v.flatten()])


def attention(ops: CpuOps, head_dim: int, dtype: torch.dtype) -> Tensor:
    max_blocks = 44
    tables = torch.arange(len(LENS) * max_blocks).flip(0).view(len(LENS), max_blocks).int()
    side = to_rows(random(tables.numel(), 2, 16, head_dim), dtype)
    cache = CacheLayer(side, side.clone())
    query_lens, seq_lens = torch.tensor(LENS).int().unbind(1)
    starts = torch.cat([torch.zeros(1), query_lens.cumsum(0)]).int()
    metadata = AttentionMetadata(starts, seq_lens.contiguous(), tables, 40, 700)
    return ops.attention(random(int(starts[-1]), 6, head_dim) * 2, cache, metadata)


CASES: dict[str, Callable[[CpuOps], Tensor]] = {
    "norm": norm_and_project,
    "gate_up_silu": gate_up_silu,
    "qkv_rope_store_fp16": lambda ops: qkv_rope_store(ops, torch.float16),
    "qkv_rope_store_int8": lambda ops: qkv_rope_store(ops, torch.int8),
    "attention_bf16": lambda ops: attention(ops, 64, torch.bfloat16),
    "attention_bf16_odd": lambda ops: attention(ops, 21, torch.bfloat16),
    "attention_fp16": lambda ops: attention(ops, 20, torch.float16),
    "attention_fp32": lambda ops: attention(ops, 48, torch.float32),
    "attention_int8": lambda ops: attention(ops, 64, torch.int8),
    "attention_int8_odd": lambda ops: attention(ops, 22, torch.int8),
}


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16"])
@pytest.mark.parametrize("case", CASES)
def test_verb_gives_the_scalar_bits(case: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNEO_CPU_ISA", "scalar")
    expected = CASES[case](CpuOps(2))
    monkeypatch.setenv("INFERNEO_CPU_ISA", isa)
    try:
        ops = CpuOps(2)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    assert torch.equal(CASES[case](ops), expected)
