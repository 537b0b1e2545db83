"""The C++ sampler at a vocabulary of 128,256: time, GB/s of logits read, and their share of this machine's copy speed.

    pytest benchmarks/bench_sampler.py -o python_files='bench_*.py'

Each benchmark first checks its tokens against the reference. The logits of `peaked` fall off as those of a
language model; `normal` ones are wide, the worst case for top-p. `torch` is the usual sort-based sampler.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inferneo_core.batch import (
    INV_TEMPERATURE,
    MIN_P,
    POSITION,
    SEED,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    SamplingBatch,
    empty_sampling_batch,
)
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.torch_ops import TorchOps

VOCAB_SIZE = 128_256
SETTINGS: dict[str, dict[int, float]] = {
    "greedy": {INV_TEMPERATURE: 0.0},
    "plain": {INV_TEMPERATURE: 1.25},
    "min_p": {INV_TEMPERATURE: 1.25, MIN_P: 0.05},
    "top_p": {INV_TEMPERATURE: 1.25, TOP_P: 0.9},
    "typical": {INV_TEMPERATURE: 1.25, TYPICAL_P: 0.9},
    "top_k_top_p_min_p": {INV_TEMPERATURE: 1.25, TOP_P: 0.9, MIN_P: 0.05},
}


def make_batch(num_seqs: int, name: str) -> SamplingBatch:
    batch = empty_sampling_batch(num_seqs)
    for column, value in SETTINGS[name].items():
        batch.floats[:, column] = value
    batch.ints[:, TOP_K] = 50 if name.startswith("top_k") else 0
    batch.ints[:, SEED], batch.ints[:, POSITION] = torch.arange(num_seqs), 100
    return batch


def make_logits(num_seqs: int, shape: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_seqs, VOCAB_SIZE, generator=generator)
    if shape == "peaked":  # a Zipf-like tail: the k-th of a random order lies 1.5 * ln(k) below the first
        ranks = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator) for _ in range(num_seqs)])
        logits = logits * 0.5 + 18 - 1.5 * (ranks + 1).float().log()
    return logits.to(dtype)


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of one thread's memcpy of one row of logits; best of 50."""
    source = np.zeros(VOCAB_SIZE, dtype=np.float32)
    target, times = np.empty_like(source), []
    for _ in range(50):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def measure(benchmark: Any, call: Callable[[], object], num_bytes: int, bandwidth: float) -> None:
    benchmark(call)
    if benchmark.stats is None:  # --benchmark-disable
        return
    rate = num_bytes / benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = round(rate / 1e9, 2)
    benchmark.extra_info["share of copy bandwidth"] = round(rate / bandwidth, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["peaked", "normal"])
@pytest.mark.parametrize("name", SETTINGS)
def test_one_row(benchmark: Any, copy_bandwidth: float, name: str, shape: str, dtype: torch.dtype) -> None:
    logits, batch, ops = make_logits(1, shape, dtype), make_batch(1, name), CpuOps(num_threads=1)
    assert torch.equal(ops.sample(logits, batch).token_ids, TorchOps().sample(logits, batch).token_ids)
    measure(benchmark, lambda: ops.sample(logits, batch), logits.nbytes, copy_bandwidth)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("name", ["greedy", "plain", "top_k_top_p_min_p"])
def test_64_rows(benchmark: Any, copy_bandwidth: float, name: str, num_threads: int) -> None:
    logits, batch, ops = make_logits(64, "normal", torch.float32), make_batch(64, name), CpuOps(num_threads=num_threads)
    expected = torch.cat([CpuOps(num_threads=1).sample(row[None], one).token_ids for row, one in _split(logits, batch)])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(ops.sample(logits, batch).token_ids, expected)
        measure(benchmark, lambda: ops.sample(logits, batch), logits.nbytes, copy_bandwidth)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_logprobs", [0, 20])
def test_score(benchmark: Any, copy_bandwidth: float, num_logprobs: int) -> None:
    logits, targets, ops = make_logits(1, "peaked", torch.float32), torch.tensor([7]), CpuOps(num_threads=1)
    expected = logits.double().log_softmax(1)[0, 7]
    assert abs(float(ops.score(logits, targets, num_logprobs).logprobs) - float(expected)) < 1e-5  # type: ignore[arg-type]
    measure(benchmark, lambda: ops.score(logits, targets, num_logprobs), logits.nbytes, copy_bandwidth)


def test_call_overhead(benchmark: Any) -> None:
    logits, batch, ops = torch.arange(32.0)[None], empty_sampling_batch(1), CpuOps(num_threads=1)
    assert ops.sample(logits, batch).token_ids.tolist() == [31]
    benchmark(lambda: ops.sample(logits, batch))


def test_torch_sort_sampler(benchmark: Any, copy_bandwidth: float) -> None:
    logits = make_logits(1, "peaked", torch.float32)

    def call() -> Tensor:
        values, ids = logits.sort(dim=1, descending=True)
        probabilities = (values[:, :50] * 1.25).softmax(1)
        kept = (probabilities.cumsum(1) - probabilities < 0.9) & (probabilities >= 0.05 * probabilities[:, :1])
        return ids.gather(1, (probabilities * kept).multinomial(1))

    assert 0 <= int(call()) < VOCAB_SIZE
    measure(benchmark, call, logits.nbytes, copy_bandwidth)


def _split(logits: Tensor, batch: SamplingBatch) -> list[tuple[Tensor, SamplingBatch]]:
    return [
        (row, SamplingBatch(batch.floats[i : i + 1], batch.ints[i : i + 1], None, None, None, None, -1))
        for i, row in enumerate(logits)
    ]
