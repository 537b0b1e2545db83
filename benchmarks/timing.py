"""Timing: rounds of a program in turns with rounds of a probe, so that each is seen in the other's milliseconds.

A shared machine's clock and memory bandwidth move by a third within an hour. A probe is a piece of work that does not
change (reading memory, multiplying in registers, counting in Python). The ratio of the two stays when the machine
moves, so it is what two runs are compared by; shares of the ceiling come from the times themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import quantiles
from typing import Any, TypeAlias

import torch
from inferneo_benchmarks.floors import Ceilings, CpuProbe

PROBE_BYTES = 24 * 2**20
MIN_ROUNDS, MAX_ROUNDS = 7, 100
MATRIX = 8192  # rows and columns of the product that shows a GPU's matrix peak


@dataclass
class Samples:
    """Attributes: seconds of one call, and seconds of the probe right before, a round each."""

    seconds: list[float] = field(default_factory=list)
    probe_seconds: list[float] = field(default_factory=list)


class CpuMeter:
    """Times programs on the CPU.

    Args:
        num_threads: what the ceilings are measured with.
    """

    device = "cpu"

    def __init__(self, num_threads: int) -> None:
        self._probe = CpuProbe(num_threads)
        self._rates = self._probe.rates()

    @property
    def ceilings(self) -> Ceilings:
        """The upper decile of all samples so far. The best of thousands would be an accident's: two cores that share a
        path to memory read twice as fast in the milliseconds that a hypervisor lends them two."""
        best = {kind: quantiles(rates, n=10, method="inclusive")[-1] for kind, rates in self._rates.items()}
        return Ceilings("cpu", self._probe.num_threads, best.pop("read"), best)

    @property
    def fastest(self) -> Ceilings:
        """The best of all samples: what no kernel can beat, accident or not."""
        best = {kind: max(rates) for kind, rates in self._rates.items()}
        return Ceilings("cpu", self._probe.num_threads, best.pop("read"), best)

    def learn(self, kind: str, probe_seconds: Sequence[float]) -> None:
        """Let samples of a probe say something about its ceiling, too."""
        if kind in self._rates:
            self._rates[kind] += [(PROBE_BYTES if kind == "read" else 1e9) / seconds for seconds in probe_seconds]

    def probe(self, kind: str) -> float:
        """Seconds of a fixed piece of work: "read", "int8", "fp32", "bf16", or "python" for what runs in Python."""
        if kind == "python":
            started = time.perf_counter()
            _count_in_python()
            return time.perf_counter() - started
        if kind == "read":
            return PROBE_BYTES / self._probe.read(PROBE_BYTES)
        return 1e9 / self._probe.multiply(kind)

    def seconds(self, program: Callable[[], Any]) -> float:
        started = time.perf_counter()
        program()
        return time.perf_counter() - started


class GpuMeter:
    """Times programs on the GPU, by events on its own clock."""

    device = "cuda"

    def __init__(self) -> None:
        self._source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        self._target = torch.empty_like(self._source)
        self._matrices = {
            kind: torch.randn(2, MATRIX, MATRIX, device="cuda").to(dtype)
            for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
        copying = 2 * self._source.nbytes / self._best(lambda: self._target.copy_(self._source))
        reading = self._source.nbytes / self._best(lambda: self._source.view(torch.float32).sum())
        products = {kind: 2 * MATRIX**3 / self._best(partial(self._multiply, kind)) for kind in self._matrices}
        self.ceilings = Ceilings("cuda", 0, max(copying, reading), products)

    @property
    def fastest(self) -> Ceilings:
        """What no kernel can beat."""
        return self.ceilings

    def learn(self, kind: str, probe_seconds: Sequence[float]) -> None:
        """Raise a ceiling to the best of a probe's samples: a GPU's clock has no accidents."""
        best = (2 * self._source.nbytes if kind == "read" else 2 * MATRIX**3) / min(probe_seconds)
        if kind == "read":
            self.ceilings = replace(self.ceilings, bytes_per_s=max(self.ceilings.bytes_per_s, best))
        elif kind in self.ceilings.operations_per_s:
            rates = self.ceilings.operations_per_s
            self.ceilings = replace(self.ceilings, operations_per_s={**rates, kind: max(rates[kind], best)})

    def _best(self, work: Callable[[], Any]) -> float:
        return min(self.seconds(work) for _ in range(15))

    def _multiply(self, kind: str) -> torch.Tensor:
        return self._matrices[kind][0] @ self._matrices[kind][1]

    def probe(self, kind: str) -> float:
        """Seconds of a fixed piece of work: "read", "fp32" or "bf16"; "python" on the host."""
        if kind == "python":
            started = time.perf_counter()
            _count_in_python()
            return time.perf_counter() - started
        if kind == "read":
            return self.seconds(lambda: self._target.copy_(self._source))
        return self.seconds(lambda: self._multiply(kind))

    def seconds(self, program: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        program()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


Meter: TypeAlias = CpuMeter | GpuMeter


def measure(
    benchmark: Any,
    meter: Meter,
    program: Callable[[], Any],
    *,
    probe: str,
    num_calls: int = 1,
    budget_s: float = 0.25,
    min_rounds: int = MIN_ROUNDS,
) -> Samples:
    """Rounds of a program, each right after one of the probe, within a budget of time.

    Args:
        benchmark: pytest-benchmark's fixture.
        meter: of the device that the program runs on.
        program: what to time.
        probe: kind of the probe.
        num_calls: calls in a program; the seconds are of one.
        budget_s: for all rounds together; there are at least min_rounds.
    """
    samples = Samples()
    program()
    a_round = meter.seconds(program) + meter.probe(probe)
    rounds = max(min_rounds, min(MAX_ROUNDS, int(budget_s / a_round)))

    def run() -> None:
        samples.seconds.append(meter.seconds(program) / num_calls)

    benchmark.pedantic(run, setup=lambda: samples.probe_seconds.append(meter.probe(probe)), rounds=rounds)
    return samples


def _count_in_python() -> dict[int, int]:
    counts: dict[int, int] = {}
    for number in range(4000):
        counts[number & 63] = counts.get(number & 63, 0) + number
    return counts
