"""Each verb as a Case: random operands of a model's shapes, and what the reference makes of the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from inferneo_benchmarks import counts
from inferneo_benchmarks.backends import TORCH_DTYPES, Backend, Case
from inferneo_benchmarks.counts import SequenceWork
from inferneo_benchmarks.models import DENSE_BYTES
from torch import Tensor

from inferneo_core.batch import (
    INV_TEMPERATURE,
    MIN_P,
    POSITION,
    SEED,
    TOP_K,
    TOP_P,
    AttentionMetadata,
    SamplingBatch,
    empty_sampling_batch,
)
from inferneo_core.config import ModelConfig
from inferneo_core.kv_cache import KVCache
from inferneo_core.ops.base import CacheLayer, Linear, Norm, Segment
from inferneo_core.ops.torch_ops import TorchOps
from inferneo_core.weights.dequant import BLOCK_TYPES

BLOCK_SIZE = 16
# Where a block's fp16 scales stand; the rest are codes, and any bits are right.
_SCALES = {"Q4_0": (0, 2), "Q4_1": (0, 4), "Q5_0": (0, 2), "Q5_1": (0, 4), "Q8_0": (0, 2), "Q4_K": (0, 4)}
_SCALES |= {"Q5_K": (0, 4), "Q6_K": (208, 210)}
SAMPLERS: dict[str, dict[int, float]] = {
    "greedy": {INV_TEMPERATURE: 0.0},
    "plain": {INV_TEMPERATURE: 1.25},
    "filters": {INV_TEMPERATURE: 1.25, TOP_P: 0.9, MIN_P: 0.05},
}


class Operands:
    """Seeded random tensors on a backend's device."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._generator = torch.Generator().manual_seed(0)

    def activations(self, num_tokens: int, width: int) -> Tensor:
        return self._random(num_tokens, width).to(self._backend.device, self._backend.ops.dtype)

    def norm(self, width: int) -> Norm:
        return Norm((1 + 0.1 * self._random(width)).to(self._backend.device, self._backend.ops.dtype), 1e-5)

    def linear(self, num_rows: int, num_columns: int) -> Linear:
        """As a loader makes it, in the backend's storage type."""
        type_ = self._backend.storage.weights
        if type_ in DENSE_BYTES:
            dense = self._random(num_rows, num_columns) * num_columns**-0.5
            return Linear((Segment(dense.to(TORCH_DTYPES[type_])),), num_columns)
        block, size = BLOCK_TYPES[type_]
        shape = (num_rows, num_columns // block, size)
        data = torch.randint(256, shape, dtype=torch.uint8, generator=self._generator)
        start, end = _SCALES[type_]
        scale = torch.full(((end - start) // 2,), 1e-3, dtype=torch.float16)
        data[..., start:end] = scale.view(torch.uint8)
        return Linear((Segment(data.flatten(1), type_),), num_columns)

    def cache(self, config: ModelConfig, num_blocks: int, num_copies: int) -> list[CacheLayer]:
        """As many layers of a KVCache as there are copies, all full."""
        backend = self._backend
        cache = KVCache(
            replace(config, num_layers=num_copies), num_blocks, BLOCK_SIZE, backend.cache_dtype, backend.device
        )
        first = cache.layers[0]
        filled = self._random(*first.k.shape).to(first.k.dtype)
        for layer in cache.layers:
            layer.k.copy_(filled)
            layer.v.copy_(filled)
        return list(cache.layers)

    def metadata(self, sequences: Sequence[SequenceWork]) -> AttentionMetadata:
        """Sequences over blocks in random order."""
        num_blocks = [-(-sequence.seq_len // BLOCK_SIZE) for sequence in sequences]
        order = torch.randperm(sum(num_blocks), generator=self._generator).int()
        tables = torch.zeros(len(sequences), max(num_blocks), dtype=torch.int32)
        for row, blocks in zip(tables, order.split(num_blocks), strict=True):
            row[: len(blocks)] = blocks
        starts = [0, *itertools.accumulate(sequence.query_len for sequence in sequences)]
        seq_lens = [sequence.seq_len for sequence in sequences]
        return AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_tables=tables,
            max_query_len=max(sequence.query_len for sequence in sequences),
            max_seq_len=max(seq_lens),
        ).to(self._backend.device)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


def qkv_rope_store(backend: Backend, config: ModelConfig, num_tokens: int) -> tuple[Case, counts.Count]:
    """num_tokens of one sequence, from its start."""
    count = counts.qkv_rope_store(config, backend.storage, num_tokens)
    num_copies = backend.num_copies(count)
    operands, device = Operands(backend), backend.device
    weights = backend.copies(operands.linear(config.q_size + 2 * config.kv_size, config.hidden_size), num_copies)
    x, norm = operands.activations(num_tokens, config.hidden_size), operands.norm(config.hidden_size)
    caches = operands.cache(config, -(-num_tokens // BLOCK_SIZE), num_copies)
    positions = torch.arange(num_tokens, device=device)
    angles = positions[:, None].cpu() * torch.logspace(0, -4, config.head_dim // 2)
    rope = torch.cat([angles.cos(), angles.sin()], dim=1).to(device)

    def call(ops: Any, inputs: tuple[Tensor, ...], copy: int) -> Tensor:
        q: Tensor = ops.qkv_rope_store(inputs[0], norm, weights[copy], positions, rope, caches[copy], positions)
        return q

    return Case(call, (x,), num_copies, positions=positions, slot_mapping=positions), count


def attention(backend: Backend, config: ModelConfig, sequences: Sequence[SequenceWork]) -> tuple[Case, counts.Count]:
    """Any mixture of prefill and decode."""
    count = counts.attention(config, backend.storage, sequences)
    num_copies = backend.num_copies(count)
    operands = Operands(backend)
    metadata = operands.metadata(sequences)
    num_blocks = sum(-(-sequence.seq_len // BLOCK_SIZE) for sequence in sequences)
    caches = operands.cache(config, num_blocks, num_copies)
    q = operands.activations(sum(sequence.query_len for sequence in sequences), config.q_size)
    q = q.view(len(q), config.num_heads, config.head_dim)

    def call(ops: Any, inputs: tuple[Tensor, ...], copy: int) -> Tensor:
        attended: Tensor = ops.attention(inputs[0], caches[copy], metadata)
        return attended

    return Case(call, (q,), num_copies, attention=metadata), count


def linear_add(backend: Backend, num_rows: int, num_columns: int, num_tokens: int) -> tuple[Case, counts.Count]:
    """A projection onto the residual stream."""
    count = counts.linear_add(backend.storage, num_tokens, num_rows, num_columns)
    num_copies = backend.num_copies(count)
    operands = Operands(backend)
    weights = backend.copies(operands.linear(num_rows, num_columns), num_copies)
    x, residual = operands.activations(num_tokens, num_columns), operands.activations(num_tokens, num_rows)

    def call(ops: Any, inputs: tuple[Tensor, ...], copy: int) -> Tensor:
        added: Tensor = ops.linear_add(inputs[0], weights[copy], inputs[1])
        return added

    return Case(call, (x, residual), num_copies), count


def gate_up_silu(backend: Backend, config: ModelConfig, num_tokens: int) -> tuple[Case, counts.Count]:
    count = counts.gate_up_silu(config, backend.storage, num_tokens)
    num_copies = backend.num_copies(count)
    operands = Operands(backend)
    weights = backend.copies(operands.linear(2 * config.intermediate_size, config.hidden_size), num_copies)
    x, norm = operands.activations(num_tokens, config.hidden_size), operands.norm(config.hidden_size)

    def call(ops: Any, inputs: tuple[Tensor, ...], copy: int) -> Tensor:
        gated: Tensor = ops.gate_up_silu(inputs[0], norm, weights[copy])
        return gated

    return Case(call, (x,), num_copies), count


def lm_head(backend: Backend, config: ModelConfig, num_rows: int) -> tuple[Case, counts.Count]:
    count = counts.lm_head(config, backend.storage, num_rows)
    num_copies = backend.num_copies(count)
    operands = Operands(backend)
    weights = backend.copies(operands.linear(config.vocab_size, config.hidden_size), num_copies)
    x, norm = operands.activations(num_rows, config.hidden_size), operands.norm(config.hidden_size)

    def call(ops: Any, inputs: tuple[Tensor, ...], copy: int) -> Tensor:
        logits: Tensor = ops.lm_head(inputs[0], norm, weights[copy])
        return logits

    return Case(call, (x,), num_copies, rows=torch.arange(num_rows)), count


def sample(backend: Backend, vocab_size: int, num_rows: int, sampler: str) -> tuple[Case, counts.Count]:
    """Logits that fall off as a language model's do: the k-th of a random order lies 1.5 * ln(k) below the first."""
    count = counts.sample(vocab_size, num_rows)
    num_copies = 4 if backend.name == "torch" else backend.num_copies(count)  # it sorts, which takes 10 ms a row
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(num_rows)])
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 0.5 + 18 - 1.5 * (ranks + 1).float().log()
    memory = logits.to(backend.device).repeat(num_copies, 1, 1)
    batch = _sampling_batch(num_rows, sampler).to(backend.device)

    def call(ops: Any, inputs: tuple[Tensor, ...], copy: int) -> Tensor:
        token_ids: Tensor = ops.sample(memory[copy], batch).token_ids
        return token_ids

    return Case(call, (), num_copies, is_eager=True), count


def _sampling_batch(num_rows: int, sampler: str) -> SamplingBatch:
    batch = empty_sampling_batch(num_rows)
    for column, value in SAMPLERS[sampler].items():
        batch.floats[:, column] = value
    batch.ints[:, TOP_K] = 50 if sampler == "filters" else 0
    batch.ints[:, SEED], batch.ints[:, POSITION] = torch.arange(num_rows), 100
    return replace(batch, has_filters=sampler == "filters")


def relative_error(backend: Backend, verb: str, shape: dict[str, Any]) -> float:
    """How far one call is from the reference's in fp32 on the same operands: norm of the difference over the norm.

    Tokens have no norm: the share of those that differ.
    """
    build = {"qkv_rope_store": qkv_rope_store, "attention": attention, "linear_add": linear_add}
    build |= {"gate_up_silu": gate_up_silu, "lm_head": lm_head, "sample": sample}
    found, expected = (_result(one, build[verb], shape) for one in (backend, _Reference(backend)))
    if verb == "sample":
        return float((found != expected).double().mean())
    return float((found - expected).norm() / expected.norm())


def _result(backend: Backend, build: Any, shape: dict[str, Any]) -> Tensor:
    case, _ = build(backend, **shape)
    with torch.inference_mode():
        result: Tensor = case.call(backend.ops, case.inputs, 0)
    return result.cpu() if result.dtype == torch.int64 else result.double().flatten(1).cpu()


class _Reference(Backend):
    """TorchOps in fp32 on the CPU, given the operands that another backend is given."""

    def __init__(self, backend: Backend) -> None:
        self.name = "torch"
        self.device = torch.device("cpu")
        self.ops = TorchOps(torch.float32)
        self.storage = backend.storage
        self._cache_dtype = backend.cache_dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        return self._cache_dtype

    def num_copies(self, count: counts.Count) -> int:
        return 1
