"""From nothing to the first token: `import inferneo_core`, loading, and the first answer, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from inferneo_benchmarks.timing import CpuMeter, Samples

pytestmark = [pytest.mark.backend("cpu"), pytest.mark.model("smollm2-135m")]

PROGRAM = """
import json, sys, time
import torch

started = time.perf_counter()
from inferneo_core import Engine, SamplingParams
imported = time.perf_counter()
engine = Engine("smollm2-135m-instruct", ops="cpu", num_threads=int(sys.argv[1]), max_model_len=1024)
loaded = time.perf_counter()
first = next(engine.stream([5] * 16, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)))
assert first.index == 0
answered = time.perf_counter()
engine.close()
print(json.dumps({"import": imported - started, "load": loaded - imported, "first_answer": answered - loaded}))
"""


@pytest.fixture(scope="module")
def phases(request: pytest.FixtureRequest, cpu_meter: CpuMeter, num_threads: int) -> dict[str, Samples]:
    """Seconds of each phase, a process or three."""
    found = {phase: Samples() for phase in ("import", "load", "first_answer")}
    for _ in range(3 if request.config.getoption("--full") else 1):
        probe = cpu_meter.probe("python")
        command = [sys.executable, "-c", PROGRAM, str(num_threads)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for phase, seconds in json.loads(output.splitlines()[-1]).items():
            found[phase].seconds.append(seconds)
            found[phase].probe_seconds.append(probe)
    return found


@pytest.mark.parametrize("phase", ["import", "load", "first_answer"])
def test_load(
    benchmark: Any, record: Callable[..., Any], cpu_meter: CpuMeter, phases: dict[str, Samples], phase: str
) -> None:
    """`import` is that of inferneo_core after torch's."""
    benchmark.extra_info["seconds"] = phases[phase].seconds
    benchmark.pedantic(lambda: None)  # the time is the other process's own
    record("load", phases[phase], cpu_meter, "python")
