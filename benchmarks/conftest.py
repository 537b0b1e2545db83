"""Options, the meters, and how a benchmark's samples come into the result of its pass."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from inferneo_benchmarks import verbs
from inferneo_benchmarks.backends import Backend, has_gpu
from inferneo_benchmarks.results import Measurement
from inferneo_benchmarks.timing import CpuMeter, GpuMeter, Meter, Samples, measure

MAX_ERROR = 0.03  # of a verb against the reference in fp32: int8 activations cost 1%
MAX_LATENCIES = 400


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("inferneo")
    group.addoption("--full", action="store_true", help="every model, type and shape, not only the quick ones")
    group.addoption("--backend", action="append", help="only this backend: torch, cpu or triton; may be repeated")
    group.addoption("--bench-model", action="append", help="only this model; may be repeated")
    group.addoption("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    group.addoption("--budget", type=float, default=0.25, help="seconds that one benchmark's rounds may take")
    group.addoption("--unchecked", action="store_true", help="do not compare results with the reference first")
    group.addoption("--pass-json", type=Path, help="write this pass's samples here")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left out of the quick selection")
    config.addinivalue_line("markers", "backend(name): needs this backend")
    config.addinivalue_line("markers", "model(name): of this model's shapes")
    config.stash[_RECORD] = {"benchmarks": [], "steps": []}
    config.stash[_METERS] = []


_RECORD = pytest.StashKey[dict[str, list[Any]]]()
_METERS = pytest.StashKey[list[Meter]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for and what this machine cannot run."""
    wanted = [item for item in items if _is_wanted(config, item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


def _is_wanted(config: pytest.Config, item: pytest.Item) -> bool:
    if item.get_closest_marker("full") and not config.getoption("--full"):
        return False
    for kind, option in (("backend", "--backend"), ("model", "--bench-model")):
        marker, asked = item.get_closest_marker(kind), config.getoption(option)
        if asked and (marker is None or marker.args[0] not in asked):
            return False
    backend = item.get_closest_marker("backend")
    return backend is None or backend.args[0] != "triton" or has_gpu()


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--pass-json")
    if path is not None:
        meters, record = session.config.stash[_METERS], session.config.stash[_RECORD]
        ceilings = [meter.ceilings.as_json() for meter in meters]
        fastest = [meter.fastest.as_json() for meter in meters]
        path.write_text(json.dumps({**record, "ceilings": ceilings, "fastest": fastest}), encoding="utf-8")


@pytest.fixture(scope="session")
def num_threads(request: pytest.FixtureRequest) -> int:
    threads = int(request.config.getoption("--threads"))
    torch.set_num_threads(threads)
    return threads


@pytest.fixture(scope="session")
def cpu_meter(request: pytest.FixtureRequest, num_threads: int) -> CpuMeter:
    """The ceilings of the CPU, measured as the run starts."""
    meter = CpuMeter(num_threads)
    request.config.stash[_METERS].append(meter)
    return meter


@pytest.fixture(scope="session")
def gpu_meter(request: pytest.FixtureRequest) -> GpuMeter:
    """The ceilings of the GPU."""
    meter = GpuMeter()
    request.config.stash[_METERS].append(meter)
    return meter


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., Measurement]:
    """record(group, samples, **fields) puts a measurement into the pass's result, and shows it."""

    def keep_measurement(group: str, samples: Samples, meter: Meter, probe: str, **fields: Any) -> Measurement:
        counted = {"num_bytes": 0, "num_operations": 0, "compute": ""}
        known = {"device": meter.device, "facts": {}, "latencies_ms": [], **counted, **fields}
        known["latencies_ms"] = known["latencies_ms"][:MAX_LATENCIES]
        name = request.node.name.removeprefix("test_")
        one = Measurement(
            name, group, probe=probe, seconds=[samples.seconds], probe_seconds=[samples.probe_seconds], **known
        )
        stash = request.config.stash[_RECORD]
        # facts may still be added to: the same dict stands in the record.
        flat = {"seconds": samples.seconds, "probe_seconds": samples.probe_seconds, "facts": one.facts}
        stash["benchmarks"].append({**asdict(one), **flat})
        meter.learn(probe, samples.probe_seconds)
        return one

    return keep_measurement


@pytest.fixture
def record_step(request: pytest.FixtureRequest) -> Callable[..., None]:
    """record_step(name, meter, total_s, verbs) keeps one step by verb."""

    def keep_step(name: str, meter: Meter, total_s: float, verbs: dict[str, dict[str, float]]) -> None:
        step = {"name": name, "device": meter.device, "total_s": total_s, "verbs": verbs}
        request.config.stash[_RECORD]["steps"].append(step)

    return keep_step


@pytest.fixture
def bench_verb(
    request: pytest.FixtureRequest, benchmark: Any, num_threads: int, record: Callable[..., Measurement]
) -> Callable[..., None]:
    """bench_verb(verb, backend, weights, **shape) checks a verb's result, times it, and records it."""

    def run(verb: str, backend_name: str, weights: str, **shape: Any) -> None:
        backend = Backend(backend_name, weights, num_threads)
        meter: Meter = request.getfixturevalue("gpu_meter" if backend.device.type == "cuda" else "cpu_meter")
        if not request.config.getoption("--unchecked"):
            error = verbs.relative_error(backend, verb, shape)
            assert error <= MAX_ERROR, f"{verb} is {error:.3f} away from the reference"
        case, count = getattr(verbs, verb)(backend, **shape)
        compute = backend.compute(verb)
        ceilings = meter.ceilings
        by_memory = ceilings.floor_seconds(count.num_bytes, 0, compute)
        probe = "read" if by_memory >= ceilings.floor_seconds(0, count.num_operations, compute) else compute
        budget = request.config.getoption("--budget")
        program, num_calls = backend.program(case), case.num_copies
        samples = measure(benchmark, meter, program, probe=probe, num_calls=num_calls, budget_s=budget)
        counted = {**asdict(count), "compute": compute}
        one_measurement = record(verb, samples, meter, probe, facts={"calls": num_calls}, **counted)
        benchmark.extra_info.update(
            us=round(one_measurement.median_s * 1e6, 2),
            gb_s=round(one_measurement.gb_s, 2),
            tflop_s=round(one_measurement.tflop_s, 4),
            share=round(one_measurement.share(ceilings), 3),
        )

    return run
