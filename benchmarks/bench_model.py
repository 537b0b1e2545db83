"""Whole steps of the network by batch and context, and where each one's time goes, verb by verb."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from inferneo_benchmarks import counts
from inferneo_benchmarks.counts import Count, SequenceWork
from inferneo_benchmarks.gpu.models import random_engine
from inferneo_benchmarks.models import MODELS, Storage
from inferneo_benchmarks.timing import MAX_ROUNDS, CpuMeter, GpuMeter, Meter, measure

from inferneo_core import Engine, Profile, SamplingParams
from inferneo_core.config import ModelConfig

TOKENS_A_SAMPLE = 12  # whole bursts, be they of 1, 2, 3 or 4 steps
MAX_TOKENS = (MAX_ROUNDS + 2) * TOKENS_A_SAMPLE
CPU, GPU = pytest.mark.backend("cpu"), pytest.mark.backend("triton")
DEFAULT = pytest.mark.model("smollm2-135m")
STORAGE = {"cpu": Storage("Q4_1", 4, 2, head="Q8_0"), "triton": Storage("BF16", 2, 2)}
GPU_MODELS = ("llama-3.2-1b", "llama-3.1-8b")


def steps() -> list[Any]:
    """(backend, model, sequences, context) of every step that is timed."""
    found = []
    for num_seqs, context, *marks in ((1, 16), (8, 16), (1, 1024), (32, 128, "full"), (1, 4096, "full")):
        chosen = [getattr(pytest.mark, mark) for mark in marks]
        sizes = f"{num_seqs}x{context}"
        values = ("cpu", "smollm2-135m", num_seqs, context)
        found.append(pytest.param(*values, id=f"cpu-smollm2-135m-{sizes}", marks=[CPU, DEFAULT, *chosen]))
        for model in GPU_MODELS:
            on = [GPU, pytest.mark.model(model), *chosen]
            found.append(pytest.param("triton", model, num_seqs, context, id=f"triton-{model}-{sizes}", marks=on))
    return found


@contextmanager
def engine_of(backend: str, model: str, num_threads: int, **arguments: Any) -> Iterator[Engine]:
    """The default model on a CPU, random weights of a known shape on a GPU."""
    arguments = {"enable_prefix_caching": False, "max_model_len": 5376, "max_num_seqs": 32, **arguments}
    if backend == "triton":
        with random_engine(MODELS[model], ops="triton", dtype="bfloat16", **arguments) as engine:
            yield engine
    else:
        with Engine("smollm2-135m-instruct", ops="cpu", num_threads=num_threads, **arguments) as engine:
            yield engine


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(7 * index + salt) % 250 + 1 for index in range(length)]


def whole(by_verb: Mapping[str, Count]) -> Count:
    return sum(by_verb.values(), Count(0, 0))


def run_steps(engine: Engine) -> None:
    """TOKENS_A_SAMPLE steps."""
    end = engine.stats().steps + TOKENS_A_SAMPLE
    while engine.stats().steps < end:
        assert engine.step(), "the streams have ended"


def product_type(backend: str) -> str:
    return "int8" if backend == "cpu" else "bf16"


@pytest.mark.parametrize(("backend", "model", "num_seqs", "context"), steps())
def test_decode_step(
    request: pytest.FixtureRequest,
    benchmark: Any,
    record: Callable[..., Any],
    num_threads: int,
    backend: str,
    model: str,
    num_seqs: int,
    context: int,
) -> None:
    meter: CpuMeter = request.getfixturevalue("cpu_meter")  # steps are seen from the host, on a GPU too
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    with engine_of(backend, model, num_threads) as engine:
        streams = [engine.stream(prompt(context, salt), params) for salt in range(num_seqs)]
        assert all(next(stream).index == 0 for stream in streams)
        budget = request.config.getoption("--budget") * 2
        samples = measure(
            benchmark, meter, lambda: run_steps(engine), probe="read", num_calls=TOKENS_A_SAMPLE, budget_s=budget
        )
        by_verb = dict(counts.step(engine.model_config, STORAGE[backend], [SequenceWork(1, context)] * num_seqs))
        for stream in streams:
            stream.close()
    count = whole(by_verb)
    fields: dict[str, Any] = {"num_bytes": count.num_bytes, "num_operations": count.num_operations}
    if backend == "triton":  # its roofs are the GPU's
        fields["device"] = request.getfixturevalue("gpu_meter").device
    kind = product_type(backend)
    one = record("model", samples, meter, "read", compute=kind, **fields)
    one.facts["tokens_per_s"] = round(num_seqs / one.median_s, 1)


@pytest.mark.parametrize(
    ("backend", "model", "context"),
    [
        pytest.param("cpu", "smollm2-135m", 16, id="cpu-smollm2-135m-16", marks=[CPU, DEFAULT]),
        pytest.param("cpu", "smollm2-135m", 1024, id="cpu-smollm2-135m-1024", marks=[CPU, DEFAULT]),
        *(
            pytest.param("triton", model, 1024, id=f"triton-{model}-1024", marks=[GPU, pytest.mark.model(model)])
            for model in GPU_MODELS
        ),
    ],
)
def test_verbs_of_a_step(
    request: pytest.FixtureRequest, benchmark: Any, num_threads: int, backend: str, model: str, context: int
) -> None:
    meter: Meter = request.getfixturevalue("gpu_meter" if backend == "triton" else "cpu_meter")
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    with engine_of(backend, model, num_threads) as engine:
        profile: Profile = benchmark.pedantic(engine.profile, args=(prompt(context), params), rounds=1, warmup_rounds=1)
        config = engine.model_config
    keep = request.getfixturevalue("record_step")
    assert len(profile.completion.token_ids) == 24
    prefill, decode = ([SequenceWork(context, context)], [SequenceWork(1, context + 12)])
    keep(
        f"prefill of {context}, {backend} {model}",
        meter,
        *_breakdown(profile, "prefill", config, backend, prefill, meter),
    )
    keep(
        f"decode at {context}, {backend} {model}", meter, *_breakdown(profile, "decode", config, backend, decode, meter)
    )


def _breakdown(
    profile: Profile, kind: Any, config: ModelConfig, backend: str, work: list[SequenceWork], meter: CpuMeter | GpuMeter
) -> tuple[float, dict[str, dict[str, float]]]:
    """Seconds of a median step, and of each verb beside its floor."""
    by_verb = dict(counts.step(config, STORAGE[backend], work))
    by_verb["next_tokens"] = by_verb["lm_head"] + by_verb["sample"]  # where a backend runs the two as one
    taken = profile.verb_seconds(kind)
    verbs = {}
    for verb, seconds in taken.items():
        count, compute = by_verb[verb], "fp32" if verb == "attention" and backend == "cpu" else product_type(backend)
        floor = meter.ceilings.floor_seconds(count.num_bytes, count.num_operations, compute)
        verbs[verb] = {"seconds": seconds, "floor_seconds": floor}
    total = sum(step.seconds for step in profile.of_kind(kind)) / len(profile.of_kind(kind))
    return max(total, sum(taken.values())), verbs
