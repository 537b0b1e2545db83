"""Which benchmarks a run selects, and the random weights that they multiply."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch
from inferneo_benchmarks import __main__ as program
from inferneo_benchmarks.quant_blocks import SCALES, random_blocks

from inferneo_core.weights.dequant import BLOCK_TYPES, dequantize

VERBS = ("qkv_rope_store", "attention", "linear_add", "gate_up_silu", "lm_head", "sample")


def collected(*options: str) -> Counter[tuple[str, str]]:
    """(file, name) of every benchmark that a run with these options would run on the CPU."""
    command = [sys.executable, "-m", "pytest", *program.PYTEST, "--collect-only", "--backend", "cpu", *options]
    command += [str(program.HERE / name) for name in program.FILES.values()]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = (line.partition("::") for line in output.splitlines() if "::" in line)
    return Counter((path.rpartition("/")[2], name) for path, _, name in names)


@pytest.fixture(scope="module")
def quick() -> Counter[tuple[str, str]]:
    return collected()


@pytest.fixture(scope="module")
def full() -> Counter[tuple[str, str]]:
    return collected("--full")


@pytest.mark.parametrize("verb", VERBS)
def test_quick_run_times_every_verb(quick: Counter[tuple[str, str]], verb: str) -> None:
    assert any(path == program.FILES[verb] for path, _ in quick)


def test_full_run_adds_to_the_quick_one(quick: Counter[tuple[str, str]], full: Counter[tuple[str, str]]) -> None:
    assert quick < full
    assert ("bench_gate_up_silu.py", "test_gate_up_silu[cpu-smollm2-135m-Q4_1-8]") in quick  # both name it
    assert ("bench_gate_up_silu.py", "test_gate_up_silu[cpu-smollm2-135m-Q4_1-512]") not in quick


def test_full_run_times_nothing_twice(full: Counter[tuple[str, str]]) -> None:
    assert set(full.values()) == {1}


def test_sampler_is_timed_once_a_vocabulary(full: Counter[tuple[str, str]]) -> None:
    names = [name for _, name in full if name.startswith("test_sample[") and name.endswith("-1-greedy]")]
    assert sorted(names) == [
        "test_sample[cpu-llama-3.2-1b-Q4_K-1-greedy]",
        "test_sample[cpu-smollm2-135m-Q4_1-1-greedy]",
    ]


@pytest.mark.parametrize("quant_type", list(BLOCK_TYPES))
def test_random_blocks_are_weights_of_a_usual_size(quant_type: str) -> None:
    """Were a scale to stand elsewhere, random bits would be scales: up to 65,504, or not a number."""
    data = random_blocks(3, 512, quant_type, torch.Generator().manual_seed(0))
    assert data.shape == (3, 512 // BLOCK_TYPES[quant_type].block_size * BLOCK_TYPES[quant_type].type_size)
    weights = dequantize(data, quant_type)
    assert weights.shape == (3, 512)
    assert 0 < float(weights.abs().max()) < 10
    assert float(weights.std()) > 1e-3


def test_random_blocks_know_every_type() -> None:
    assert set(SCALES) == set(BLOCK_TYPES)
