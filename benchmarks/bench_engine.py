"""The engine as its users see it: first token, tokens after it, many streams at once, and what a step costs outside
the kernels. On the default model."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from operator import attrgetter
from statistics import median
from typing import Any

import pytest
from inferneo_benchmarks import counts
from inferneo_benchmarks.bench_model import MAX_TOKENS, STORAGE, TOKENS_A_SAMPLE, engine_of, prompt, whole
from inferneo_benchmarks.counts import SequenceWork
from inferneo_benchmarks.timing import CpuMeter, Samples, measure

from inferneo_core import Engine, SamplingParams

pytestmark = [pytest.mark.backend("cpu"), pytest.mark.model("smollm2-135m")]
KERNELS = "tape"
PARTS = {  # of a step that only decodes: the methods that do each
    "schedule": ("_scheduler.schedule", "_scheduler.extend"),
    "build": ("_runner._builder.next_decode", "_runner._builder.model_input", "_runner._builder.sampling_batch"),
    KERNELS: ("_runner._tape.launch", "_runner._tape.again"),
    "update": ("_scheduler.update",),
    "deliver": ("_deliver",),
}
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(num_threads: int) -> Iterator[Engine]:
    with engine_of("cpu", "smollm2-135m", num_threads) as made:
        (answer,) = made.generate(["The capital of France is"], SamplingParams(max_tokens=3, **GREEDY))
        assert answer.text.startswith(" Paris")
        yield made


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--budget"))


@pytest.mark.parametrize("length", [16, 128, pytest.param(512, marks=pytest.mark.full)])
def test_first_token(
    benchmark: Any, record: Callable[..., Any], cpu_meter: CpuMeter, engine: Engine, budget: float, length: int
) -> None:
    salts = itertools.count()

    def first() -> None:
        with engine.stream(prompt(length, next(salts)), SamplingParams(max_tokens=1, **GREEDY)) as stream:
            assert next(stream).index == 0

    samples = measure(benchmark, cpu_meter, first, probe="int8", budget_s=budget)
    count = whole(counts.step(engine.model_config, STORAGE["cpu"], [SequenceWork(length, length)]))
    fields = {"num_bytes": count.num_bytes, "num_operations": count.num_operations, "compute": "int8"}
    fields["latencies_ms"] = [second * 1e3 for second in samples.seconds]
    one = record("engine", samples, cpu_meter, "int8", **fields)
    one.facts["prompt_tokens_per_s"] = round(length / one.median_s, 1)


def test_token_after_token(
    benchmark: Any, record: Callable[..., Any], cpu_meter: CpuMeter, engine: Engine, budget: float
) -> None:
    with engine.stream(prompt(16), SamplingParams(max_tokens=MAX_TOKENS, **GREEDY)) as stream:
        assert next(stream).index == 0

        def tokens() -> None:
            for _ in range(TOKENS_A_SAMPLE):
                next(stream)

        samples = measure(benchmark, cpu_meter, tokens, probe="read", num_calls=TOKENS_A_SAMPLE, budget_s=budget * 2)
    one = record("engine", samples, cpu_meter, "read", latencies_ms=[second * 1e3 for second in samples.seconds])
    one.facts["tokens_per_s"] = round(1 / one.median_s, 1)


@pytest.mark.parametrize("num_streams", [8, pytest.param(32, marks=pytest.mark.full)])
def test_streams(
    benchmark: Any, record: Callable[..., Any], cpu_meter: CpuMeter, engine: Engine, num_streams: int
) -> None:
    """Whole answers of many streams; latencies are the times between two tokens of one stream, prefills included."""
    params = SamplingParams(max_tokens=24, **GREEDY)
    gaps: list[float] = []

    def generate() -> None:
        streams = [engine.stream(prompt(64, salt), params) for salt in range(num_streams)]
        latest: dict[int, float] = {}
        for _ in range(24):
            for stream in streams:
                next(stream)
                now = time.perf_counter()
                if stream.request_id in latest:
                    gaps.append((now - latest[stream.request_id]) * 1e3)
                latest[stream.request_id] = now
        assert all(stream.finish_reason == "length" for stream in streams)

    samples = measure(benchmark, cpu_meter, generate, probe="read", budget_s=0.0, min_rounds=2)
    one = record("engine", samples, cpu_meter, "read", latencies_ms=gaps)
    one.facts["tokens_per_s"] = round(24 * num_streams / one.median_s, 1)


@pytest.mark.parametrize("num_seqs", [1, 8, pytest.param(32, marks=pytest.mark.full)])
def test_step_outside_kernels(
    benchmark: Any,
    record: Callable[..., Any],
    cpu_meter: CpuMeter,
    monkeypatch: pytest.MonkeyPatch,
    engine: Engine,
    num_seqs: int,
) -> None:
    """Scheduling, building, delivery: a step's time less that of its part of a call into C++; the parts are facts."""
    params = SamplingParams(max_tokens=400, temperature=0.8, top_p=0.9, seed=1, ignore_eos=True)
    streams = [engine.stream([5, 6, 7, salt + 1], params) for salt in range(num_seqs)]
    assert all(next(stream).index == 0 for stream in streams)
    samples, by_part = Samples(), defaultdict[str, list[float]](list)
    taken = timed_parts(engine, monkeypatch)

    def step() -> None:
        taken.clear()
        before = engine.stats().steps
        seconds = cpu_meter.seconds(engine.step)
        num_steps = engine.stats().steps - before
        samples.seconds.append((seconds - taken[KERNELS]) / num_steps)
        for part in PARTS:
            by_part[part].append(taken[part] / num_steps)

    benchmark.pedantic(step, setup=lambda: samples.probe_seconds.append(cpu_meter.probe("python")), rounds=40)
    for stream in streams:
        stream.close()
    assert min(samples.seconds) > 0
    one = record("engine", samples, cpu_meter, "python")
    one.facts.update({f"{part}_us": round(median(seconds) * 1e6, 1) for part, seconds in by_part.items()})


def timed_parts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds spent in each of PARTS since the dict was cleared, from now on."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args)
            finally:
                seconds[part] += time.perf_counter() - started

        return call

    for part, methods in PARTS.items():
        for path in methods:
            *owners, name = path.split(".")
            owner = type(attrgetter(".".join(owners))(engine)) if owners else type(engine)
            monkeypatch.setattr(owner, name, timed(getattr(owner, name), part))
    return seconds
