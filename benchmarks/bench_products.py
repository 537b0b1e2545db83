"""The default model's own products and nothing else: the practical floor of a step, and a token beside it.

One tape holds a step's products with their packed weights, each ending at the team's barrier as in the model. What a
step takes beyond them goes to attention, norms, the sampler and Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import pytest
import torch
from inferneo_benchmarks.bench_model import TOKENS_A_SAMPLE, engine_of, prompt
from inferneo_benchmarks.counts import Count
from inferneo_benchmarks.timing import CpuMeter, Samples, measure
from torch import Tensor

from inferneo_core import Engine, SamplingParams
from inferneo_core.ops.base import Linear
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.cpu_tape import TapeRecorder

pytestmark = [pytest.mark.backend("cpu"), pytest.mark.model("smollm2-135m")]
MAX_ERROR = 0.02  # of a product beside the one with exact activations: they are rounded to int8


@pytest.fixture(scope="module")
def engine(num_threads: int) -> Iterator[Engine]:
    with engine_of("cpu", "smollm2-135m", num_threads) as made:
        yield made


def weights_of(engine: Engine) -> list[Linear]:
    """Every weight that a step multiplies, in the order of `model.py`."""
    model = engine._runner.model
    layers = [weight for layer in model.layers for weight in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    return [*layers, model.head]


def products(engine: Engine, weights: list[Linear], num_tokens: int) -> Callable[[], Tensor]:
    """All these products of num_tokens random rows in one call."""
    ops = engine._runner.ops
    assert isinstance(ops, CpuOps)
    generator = torch.Generator().manual_seed(0)
    tape, inputs = TapeRecorder(), {}
    for weight in weights:
        width = weight.in_features
        if width not in inputs:
            inputs[width] = tape.input(torch.randn(num_tokens, width, generator=generator))
        tape.linear_add(inputs[width], weight, None)
    return lambda: tape.run(ops.team)


def count_of(weights: list[Linear], num_tokens: int) -> Count:
    """Packed weights once; activations stay in the caches."""
    num_operations = sum(2 * num_tokens * weight.out_features * weight.in_features for weight in weights)
    return Count(sum(weight.weight.nbytes for weight in weights), num_operations)


def check(engine: Engine, weight: Linear) -> None:
    x = torch.randn(3, weight.in_features, generator=torch.Generator().manual_seed(1))
    exact = x @ torch.ops.inferneo.packed_rows(weight.weight, torch.arange(weight.out_features)).T
    found = engine._runner.ops.linear_add(x, weight, None)
    assert float((found - exact).norm() / exact.norm()) < MAX_ERROR


@pytest.mark.parametrize("num_tokens", [1, 8, 128, *(pytest.param(n, marks=pytest.mark.full) for n in (4, 32, 512))])
def test_products(
    request: pytest.FixtureRequest,
    benchmark: Any,
    record: Callable[..., Any],
    cpu_meter: CpuMeter,
    engine: Engine,
    num_tokens: int,
) -> None:
    weights = weights_of(engine)
    for weight in weights[:4]:
        check(engine, weight)
    count = count_of(weights, num_tokens)
    by_memory = cpu_meter.ceilings.floor_seconds(count.num_bytes, 0, "int8")
    probe = "read" if by_memory >= cpu_meter.ceilings.floor_seconds(0, count.num_operations, "int8") else "int8"
    budget = request.config.getoption("--budget")
    samples = measure(benchmark, cpu_meter, products(engine, weights, num_tokens), probe=probe, budget_s=budget)
    fields = {"num_bytes": count.num_bytes, "num_operations": count.num_operations, "compute": "int8"}
    one = record("products", samples, cpu_meter, probe, **fields)
    one.facts["tokens_per_s"] = round(num_tokens / one.median_s, 1)


@pytest.mark.parametrize("context", [16, *(pytest.param(n, marks=pytest.mark.full) for n in (2048, 4096))])
def test_token_beside_its_products(
    request: pytest.FixtureRequest,
    benchmark: Any,
    record: Callable[..., Any],
    cpu_meter: CpuMeter,
    engine: Engine,
    context: int,
) -> None:
    """Tokens of a stream in turns with the products alone, which are their probe."""
    alone = products(engine, weights_of(engine), 1)
    samples = Samples()
    rounds = max(10, int(20 * request.config.getoption("--budget")))
    params = SamplingParams(max_tokens=(rounds + 2) * TOKENS_A_SAMPLE, temperature=0.0, ignore_eos=True)

    def seconds_each(program: Callable[[], object]) -> float:
        return cpu_meter.seconds(lambda: [program() for _ in range(TOKENS_A_SAMPLE)]) / TOKENS_A_SAMPLE

    with engine.stream(prompt(context), params) as stream:
        assert next(stream).index == 0

        def tokens() -> None:
            samples.seconds.append(seconds_each(lambda: next(stream)))

        benchmark.pedantic(tokens, setup=lambda: samples.probe_seconds.append(seconds_each(alone)), rounds=rounds)
    one = record("products", samples, cpu_meter, "products")
    one.facts["tokens_per_s"] = round(1 / one.median_s, 1)
    one.facts["share_of_the_products_alone"] = round(median(samples.probe_seconds) / one.median_s, 3)
