"""Fixtures: each instruction set in turn; the sampler's batches with named columns, seeded logits and backends."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inferneo_core.batch import (
    CHOICE,
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
from inferneo_core.errors import BackendUnavailable
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.torch_ops import TorchOps

Build = Callable[[str, Sequence[str], Sequence[Path], Path], None]
MakeBatch = Callable[..., SamplingBatch]
MakeLogits = Callable[..., Tensor]


IS_ARM = platform.machine() in ("aarch64", "arm64")


@pytest.fixture(params=["scalar", "neon"] if IS_ARM else ["scalar", "avx2", "avx512", "avx512bf16"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CpuOps:
    """CpuOps on each instruction set that this machine has."""
    monkeypatch.setenv("INFERNEO_CPU_ISA", request.param)
    try:
        ops = CpuOps(num_threads=2)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    assert ops.isa == request.param
    return ops


@pytest.fixture
def isa(cpu: CpuOps) -> str:
    """Its name; whatever runs on CpuOps runs on it."""
    return cpu.isa


@pytest.fixture(scope="session")
def build() -> Build:
    """build(compiler, flags, sources, program) compiles C++ files side by side and links them."""

    def make(compiler: str, flags: Sequence[str], sources: Sequence[Path], program: Path) -> None:
        objects = [f"{program}.{index}.o" for index in range(len(sources))]
        commands = [[compiler, *flags, "-c", str(path), "-o", out] for path, out in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(lambda command: subprocess.run(command, check=True), commands):
                pass
        subprocess.run([compiler, *flags, *objects, "-o", str(program)], check=True)

    return make


@pytest.fixture(scope="session")
def make_batch() -> MakeBatch:
    """Rows that share their filters; row i has its own seed, position and choice."""

    def make(
        num_seqs: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        typical_p: float = 1.0,
        seed: int = 0,
        num_logprobs: int = -1,
    ) -> SamplingBatch:
        batch = empty_sampling_batch(num_seqs, num_logprobs)
        batch.floats[:, INV_TEMPERATURE] = 1 / temperature if temperature else 0.0
        batch.floats[:, TOP_P], batch.floats[:, MIN_P], batch.floats[:, TYPICAL_P] = top_p, min_p, typical_p
        batch.ints[:, TOP_K] = top_k
        batch.ints[:, SEED] = (torch.arange(num_seqs) + seed) * -7046029254386353131  # spreads them over 64 bits
        batch.ints[:, POSITION] = torch.arange(num_seqs) * 31 % 4096
        batch.ints[:, CHOICE] = torch.arange(num_seqs) % 3
        return batch

    return make


@pytest.fixture(scope="session")
def make_logits() -> MakeLogits:
    """Normal logits; with ties they are multiples of one half."""

    def make(num_rows: int, vocab_size: int, *, scale: float = 3.0, seed: int = 0, ties: bool = False) -> Tensor:
        logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
        return (logits * 2).round() / 2 if ties else logits

    return make


@pytest.fixture(params=["torch", "cpu"])
def ops(request: pytest.FixtureRequest) -> TorchOps:
    """Every backend that runs on this machine."""
    return CpuOps() if request.param == "cpu" else TorchOps()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Gives torch two threads, whatever the environment says."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
