"""The default model's products with its packed weights, and nothing else: the practical floor of a step.

    pytest benchmarks/bench_linear.py -o python_files='bench_*.py' -s

One tape holds a step's products, each ending at the team's barrier as in the model. Beside the time stand GB/s of
weights read and Gop/s, each also as a share of what floors.py measures on this machine right before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from floors import measure
from torch import Tensor

from inferneo_core import Engine
from inferneo_core.model import Llama
from inferneo_core.ops.base import Linear
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.cpu_tape import TapeRecorder

KINDS = ("qkv", "out", "gate_up", "down")


@pytest.fixture(scope="module")
def model() -> Iterator[Llama]:
    with Engine("smollm2-135m-instruct", ops="cpu", max_model_len=512) as engine:
        yield engine._runner.model


@pytest.fixture(scope="module", params=[1, 2], ids=["1thread", "2threads"])
def num_threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def products_tape(weights: list[Linear], num_tokens: int) -> TapeRecorder:
    """A tape of all these products of num_tokens random rows."""
    generator = torch.Generator().manual_seed(0)
    tape = TapeRecorder()
    inputs: dict[int, Tensor] = {}
    for weight in weights:
        width = weight.in_features
        if width not in inputs:
            inputs[width] = tape.input(torch.randn(num_tokens, width, generator=generator))
        tape.linear_add(inputs[width], weight, None)
    return tape


def check(ops: CpuOps, weight: Linear) -> None:
    x = torch.randn(3, weight.in_features, generator=torch.Generator().manual_seed(1))
    exact = x @ torch.ops.inferneo.packed_rows(weight.weight, torch.arange(weight.out_features)).T
    assert float((ops.linear_add(x, weight, None) - exact).norm() / exact.norm()) < 0.02


def report(benchmark: Any, num_threads: int, weights: list[Linear], num_tokens: int) -> None:
    """Time the products; note GB/s of weights and Gop/s, and their shares of the machine's floors."""
    ops, floors = CpuOps(num_threads), measure(num_threads)
    tape = products_tape(weights, num_tokens)
    benchmark.pedantic(lambda: tape.run(ops.team), rounds=15 if num_tokens < 100 else 5, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    gb_s = sum(weight.weight.numel() for weight in weights) / seconds / 1e9
    gop_s = sum(2 * weight.out_features * weight.in_features for weight in weights) * num_tokens / seconds / 1e9
    benchmark.extra_info.update(
        tokens_per_s=round(num_tokens / seconds, 1),
        gb_s=round(gb_s, 1),
        share_of_read=round(gb_s / floors.read_gb_s, 2),
        gop_s=round(gop_s, 1),
        share_of_int8=round(gop_s / floors.int8_gop_s, 2),
        round_trip_ns=floors.round_trip_ns,
    )
    print(f"\n{seconds * 1e3:.3f} ms {benchmark.extra_info}")


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_of_all_layers(kind: str, benchmark: Any, model: Llama, num_threads: int) -> None:
    weights = [getattr(layer, kind) for layer in model.layers]
    check(CpuOps(num_threads), weights[0])
    report(benchmark, num_threads, weights, 1)


def test_head(benchmark: Any, model: Llama, num_threads: int) -> None:
    check(CpuOps(num_threads), model.head)
    report(benchmark, num_threads, [model.head], 1)


def test_all_products_of_a_decode_step(benchmark: Any, model: Llama, num_threads: int) -> None:
    weights = [getattr(layer, kind) for layer in model.layers for kind in KINDS]
    report(benchmark, num_threads, [*weights, model.head], 1)


@pytest.mark.parametrize("num_tokens", [4, 8, 32, 128, 512])
def test_all_products_of_the_layers(num_tokens: int, benchmark: Any, model: Llama, num_threads: int) -> None:
    weights = [getattr(layer, kind) for layer in model.layers for kind in KINDS]
    report(benchmark, num_threads, weights, num_tokens)
