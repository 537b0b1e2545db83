"""Where an engine step's time goes: schedule, build, tape (network and sampler), update and delivery, by batch size.

    pytest benchmarks/bench_step.py -o python_files='bench_*.py'

On the default model. Each benchmark checks that its streams yield what they should before it is believed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from inferneo_core import Engine, SamplingParams

PARTS = {
    "schedule": ("_scheduler", "schedule"),
    "build": ("_runner._builder", "model_input"),
    "build_sampling": ("_runner._builder", "sampling_batch"),
    "tape": ("_runner._tape", "launch"),
    "update": ("_scheduler", "update"),
    "deliver": ("", "_deliver"),
}


@contextmanager
def timed_parts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Seconds spent in each part of a step while the block runs."""
    seconds: dict[str, float] = defaultdict(float)
    with monkeypatch.context() as patch:
        for part, (path, method) in PARTS.items():
            owner: Any = engine
            for name in filter(None, path.split(".")):
                owner = getattr(owner, name)
            target = type(owner)
            patch.setattr(target, method, _timed(getattr(target, method), part, seconds))
        yield seconds


def _timed(method: Callable[..., Any], part: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - started

    return timed


@pytest.mark.parametrize("num_seqs", [1, 8, 32])
def test_decode_step(num_seqs: int, benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=1000, temperature=0.8, top_p=0.9, seed=1, ignore_eos=True)
    with Engine("smollm2-135m-instruct", max_model_len=1100, enable_prefix_caching=False) as engine:
        streams = [engine.stream([5, 6, 7, index + 1], params) for index in range(num_seqs)]
        assert all(next(stream).index == 0 for stream in streams)
        steps_before = engine.stats().steps
        with timed_parts(engine, monkeypatch) as seconds:
            started = time.perf_counter()
            benchmark.pedantic(engine.step, rounds=20, warmup_rounds=3)
            elapsed = time.perf_counter() - started
        steps = engine.stats().steps - steps_before
        assert all(next(stream).index == 1 for stream in streams)
        for stream in streams:
            stream.close()
    benchmark.extra_info.update({f"{part}_us": round(seconds[part] / steps * 1e6, 1) for part in PARTS})
    benchmark.extra_info["tokens_per_s"] = round(num_seqs * steps / elapsed, 1)
    benchmark.extra_info["outside_kernels_us"] = round((elapsed - seconds["tape"]) / steps * 1e6, 1)
    print(f"\n{num_seqs} sequences: {benchmark.extra_info}")
