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
from inferneo_benchmarks.quant_blocks import random_blocks
from torch import Tensor

from inferneo_core.batch import (
    INV_TEMPERATURE,
    MIN_P,
    POSITION,
    SEED,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    AttentionMetadata,
    SamplingBatch,
    empty_sampling_batch,
)
from inferneo_core.config import ModelConfig
from inferneo_core.kv_cache import KVCache
from inferneo_core.ops.base import CacheLayer, Linear, Norm, Segment
from inferneo_core.ops.torch_ops import TorchOps

BLOCK_SIZE = 16
SAMPLERS: dict[str, dict[int, float]] = {
    "greedy": {INV_TEMPERATURE: 0.0},
    "plain": {INV_TEMPERATURE: 1.25},
    "filters": {INV_TEMPERATURE: 1.25, TOP_P: 0.9, MIN_P: 0.05},
    "min_p": {INV_TEMPERATURE: 1.25, MIN_P: 0.05},
    "top_p": {INV_TEMPERATURE: 1.25, TOP_P: 0.9},
    "typical": {INV_TEMPERATURE: 1.25, TYPICAL_P: 0.9},
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
        data = random_blocks(num_rows, num_columns, type_, self._generator)
        return Linear((Segment(data, type_),), num_columns)

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


def sample(
    backend: Backend, vocab_size: int, num_rows: int, sampler: str, is_wide: bool = False
) -> tuple[Case, counts.Count]:
    """Draws from logits that fall off as a language model's do, or from wide ones: the worst case for top-p."""
    count = counts.sample(vocab_size, num_rows)
    num_copies = 4 if backend.name == "torch" else backend.num_copies(count)  # it sorts, which takes 10 ms a row
    memory = _logits(vocab_size, num_rows, is_wide).to(backend.device).repeat(num_copies, 1, 1)
    batch = _sampling_batch(num_rows, sampler).to(backend.device)

    def call(ops: Any, inputs: tuple[Tensor, ...], copy: int) -> Tensor:
        token_ids: Tensor = ops.sample(memory[copy], batch).token_ids
        return token_ids

    return Case(call, (), num_copies, is_eager=True), count


def score(backend: Backend, vocab_size: int, num_rows: int, num_logprobs: int) -> tuple[Case, counts.Count]:
    """Log-probabilities of one token a row, and of the likeliest num_logprobs."""
    count = counts.score(vocab_size, num_rows, num_logprobs)
    num_copies = 4 if backend.name == "torch" else backend.num_copies(count)
    memory = _logits(vocab_size, num_rows, is_wide=False).to(backend.device).repeat(num_copies, 1, 1)
    targets = torch.arange(7, 7 + num_rows).to(backend.device)

    def call(ops: Any, inputs: tuple[Tensor, ...], copy: int) -> Tensor:
        logprobs: Tensor = ops.score(memory[copy], targets, num_logprobs).logprobs
        return logprobs

    return Case(call, (), num_copies, is_eager=True), count


def _logits(vocab_size: int, num_rows: int, is_wide: bool) -> Tensor:
    """[num_rows, vocab_size] fp32; unless wide, the k-th of a random order lies 1.5 * ln(k) below the first."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    if is_wide:
        return logits
    ranks = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(num_rows)])
    return logits * 0.5 + 18 - 1.5 * (ranks + 1).float().log()


def _sampling_batch(num_rows: int, sampler: str) -> SamplingBatch:
    batch = empty_sampling_batch(num_rows)
    for column, value in SAMPLERS[sampler].items():
        batch.floats[:, column] = value
    batch.ints[:, TOP_K] = 50 if sampler == "filters" else 0
    batch.ints[:, SEED], batch.ints[:, POSITION] = torch.arange(num_rows), 100
    return replace(batch, has_filters=sampler not in ("greedy", "plain"))


def relative_error(backend: Backend, verb: str, shape: dict[str, Any]) -> float:
    """How far one call is from the reference's in fp32 on the same operands: norm of the difference over the norm.

    Tokens have no norm: the share of those that differ.
    """
    build = {"qkv_rope_store": qkv_rope_store, "attention": attention, "linear_add": linear_add}
    build |= {"gate_up_silu": gate_up_silu, "lm_head": lm_head, "sample": sample, "score": score}
    found, expected = (_result(one, build[verb], shape) for one in (backend, _Reference(backend)))
    if verb == "sample":
        return float((found != expected).double().mean())
    return float((found - expected).norm() / expected.norm())


def _result(backend: Backend, build: Any, shape: dict[str, Any]) -> Tensor:
    case, _ = build(backend, **shape)
    with torch.inference_mode():
        result: Tensor = case.call(backend.ops, case.inputs, 0)
    return result.cpu() if result.dtype == torch.int64 else result.double().flatten().cpu()


class _Reference(Backend):
    """TorchOps in fp32 on the same device, given the operands that another backend is given."""

    def __init__(self, backend: Backend) -> None:
        self.name = "torch"
        self.device = backend.device
        self.ops = TorchOps(torch.float32, self.device)
        self.storage = backend.storage
        self._cache_dtype = backend.cache_dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        return self._cache_dtype

    def num_copies(self, count: counts.Count) -> int:
        return 1
