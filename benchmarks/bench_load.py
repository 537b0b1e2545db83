"""From nothing to the first token, in a process of its own: `import inferneo_core`, loading, the first answer; and how
much memory that and the answer take at their highest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
from inferneo_benchmarks.timing import CpuMeter, Samples

pytestmark = [pytest.mark.backend("cpu"), pytest.mark.model("smollm2-135m")]

PHASES = ("import", "load", "first_answer")
PROGRAM = """
import json, sys, time
from pathlib import Path
import torch

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before, num_tokens = kilobytes("VmRSS"), int(sys.argv[2])
started = time.perf_counter()
from inferneo_core import Engine, SamplingParams
imported = time.perf_counter()
engine = Engine("smollm2-135m-instruct", ops="cpu", num_threads=int(sys.argv[1]), max_model_len=1024)
loaded = time.perf_counter()
stream = engine.stream([5] * 16, SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True))
assert next(stream).index == 0
answered = time.perf_counter()
assert sum(1 for _ in stream) == num_tokens - 1
peak_mb = (kilobytes("VmHWM") - before) * 1024 / 1e6
engine.close()
seconds = {"import": imported - started, "load": loaded - imported, "first_answer": answered - loaded}
print(json.dumps({"seconds": seconds, "peak_mb": peak_mb}))
"""


class Loads:
    """Attributes: phases, the seconds of each; peak_mb above what a process has after `import torch`, a process each;
    num_tokens of the answer."""

    def __init__(self, num_tokens: int) -> None:
        self.phases = {phase: Samples() for phase in PHASES}
        self.peak_mb: list[float] = []
        self.num_tokens = num_tokens

    def add(self, num_threads: int, probe: float) -> None:
        command = [sys.executable, "-c", PROGRAM, str(num_threads), str(self.num_tokens)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        self.peak_mb.append(found["peak_mb"])
        for phase, seconds in found["seconds"].items():
            self.phases[phase].seconds.append(seconds)
            self.phases[phase].probe_seconds.append(probe)


@pytest.fixture(scope="module")
def loads(request: pytest.FixtureRequest, cpu_meter: CpuMeter, num_threads: int) -> Loads:
    """A process or, in a full run, three."""
    is_full = request.config.getoption("--full")
    found = Loads(num_tokens=624 if is_full else 8)
    for _ in range(3 if is_full else 1):
        found.add(num_threads, cpu_meter.probe("python"))
    return found


@pytest.mark.parametrize("phase", PHASES)
def test_load(benchmark: Any, record: Callable[..., Any], cpu_meter: CpuMeter, loads: Loads, phase: str) -> None:
    """`import` is that of inferneo_core after torch's."""
    benchmark.pedantic(lambda: None)  # the time is the other process's own
    one = record("load", loads.phases[phase], cpu_meter, "python")
    if phase == PHASES[-1]:
        one.facts.update(peak_mb=round(median(loads.peak_mb), 1), num_tokens=loads.num_tokens)
