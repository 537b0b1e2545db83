"""The default model on CpuOps, end to end: decode, prefill, first token, concurrent streams, load and memory.

    pytest benchmarks/bench_cpu_model.py -o python_files='bench_*.py' -s

Decode stands beside its floor, the weight products alone, measured in turns with it; prefill beside the machine's
integer peak. Every benchmark first checks that the engine says what it should.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import pytest
from bench_linear import products_tape
from floors import measure
from peer_worker import prompt_ids

from inferneo_core import Engine, SamplingParams
from inferneo_core.ops.cpu_ops import CpuOps

THREADS = 2
OPERATIONS = 2 * 106.2e6  # integer multiply-adds in the layers' products, for every token of a prompt
GREEDY = {"temperature": 0.0, "ignore_eos": True}

LOAD = """
import time
import torch

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = status("VmRSS")
started = time.perf_counter()
from inferneo_core import Engine, SamplingParams
with Engine("smollm2-135m-instruct", num_threads=2, max_model_len=1024) as engine:
    stream = engine.stream([5] * 16, SamplingParams(max_tokens=624, temperature=0.0, ignore_eos=True))
    next(stream)
    first = time.perf_counter() - started
    assert sum(1 for _ in stream) == 623
print(first, status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(
        "smollm2-135m-instruct", ops="cpu", num_threads=THREADS, enable_prefix_caching=False, max_num_seqs=40
    ) as engine:
        (answer,) = engine.generate(["The capital of France is"], SamplingParams(max_tokens=3, **GREEDY))
        assert answer.text.startswith(" Paris")
        yield engine


def timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@pytest.mark.parametrize("context", [8, 2048, 8000])
def test_decode(context: int, engine: Engine, benchmark: Any) -> None:
    model, ops = engine._runner.model, engine._runner.ops
    assert isinstance(ops, CpuOps)
    weights = [weight for layer in model.layers for weight in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    products = products_tape([*weights, model.head], 1)
    floors = []
    with engine.stream(prompt_ids(context), SamplingParams(max_tokens=180, **GREEDY)) as stream:
        assert next(stream).index == 0

        def token() -> None:
            floors.append(timed(lambda: products.run(ops.team)))

        benchmark.pedantic(lambda: next(stream), setup=token, rounds=150, warmup_rounds=5)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        tokens_per_s=round(1 / seconds, 1), share_of_the_products_alone=round(median(floors) / seconds, 3)
    )
    print(f"\ndecode at {context}: {benchmark.extra_info}")


@pytest.mark.parametrize("num_tokens", [16, 128, 512])
def test_first_token(num_tokens: int, engine: Engine, benchmark: Any) -> None:
    salts = iter(range(10**6))

    def first() -> None:
        with engine.stream(prompt_ids(num_tokens, next(salts)), SamplingParams(max_tokens=1, **GREEDY)) as stream:
            assert next(stream).index == 0

    floors = measure(THREADS)
    benchmark.pedantic(first, rounds=15, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        tokens_per_s=round(num_tokens / seconds, 1),
        share_of_the_integer_peak=round(num_tokens * OPERATIONS / seconds / (floors.int8_gop_s * 1e9), 3),
    )
    print(f"\n{num_tokens} tokens to the first one drawn: {seconds * 1e3:.1f} ms, {benchmark.extra_info}")


@pytest.mark.parametrize("num_streams", [8, 32])
def test_streams(num_streams: int, engine: Engine, benchmark: Any) -> None:
    prompts = [prompt_ids(128, salt) for salt in range(num_streams)]
    params = SamplingParams(max_tokens=128, **GREEDY)

    def generate() -> None:
        assert all(len(answer.token_ids) == 128 for answer in engine.generate(prompts, params))

    benchmark.pedantic(generate, rounds=3)
    benchmark.extra_info["tokens_per_s"] = round(128 * num_streams / benchmark.stats.stats.median, 1)
    print(f"\n{num_streams} streams: {benchmark.extra_info}")


def test_load(benchmark: Any) -> None:
    """From `import inferneo_core` to the first token, and the peak above `import torch` after 640 tokens."""
    figures = []

    def load() -> None:
        output = subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True, text=True).stdout
        figures.append([float(figure) for figure in output.split()])

    benchmark.pedantic(load, rounds=3)
    first, peak = (median(column) for column in zip(*figures, strict=True))
    benchmark.extra_info.update(first_token_s=round(first, 3), peak_mb=round(peak / 1e6, 1))
    print(f"\nload: {benchmark.extra_info}")
