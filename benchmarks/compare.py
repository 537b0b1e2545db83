"""Whether two runs differ: the same code twice should be "no difference", a kernel a tenth slower should be found.

A pass gives one figure a benchmark: log(time / time of the probe), each in its fastest round, for what disturbs a
machine only ever adds time. What a pass happens to meet (a busy neighbour, another core, memory on other
pages) shifts all its rounds together, so rounds of one pass say nothing about noise; the passes do. With a handful of
passes a benchmark's own variance is itself a guess, so the mean of it and of the typical benchmark's is taken, as
moderated t tests do. A difference counts if it is significant among as many benchmarks as were compared, and larger
than MIN_CHANGE.

Source: Smyth, doi 10.2202/1544-6115.1027 (moderated t); Bonferroni.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from inferneo_benchmarks.results import Measurement, Result

ERROR_RATE = 0.05  # of calling two runs of the same code different anywhere
MIN_CHANGE = 0.04  # below, code that happens to be aligned otherwise may be the cause
MIN_PASSES = 3

Verdict = Literal["slower", "faster", "no difference"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One benchmark in two runs.

    Attributes:
        name: the benchmark.
        before_s, after_s: median seconds of a call in either run, as they were.
        change: of the time, the machine's own drift taken out: 0.1 is a tenth slower.
        margin: the change that chance alone may bring, among so many benchmarks.
        noise_before, noise_after: standard deviation of the passes, as a share of the time.
    """

    name: str
    before_s: float
    after_s: float
    change: float
    margin: float
    noise_before: float
    noise_after: float

    @property
    def verdict(self) -> Verdict:
        if abs(self.change) <= max(self.margin, MIN_CHANGE):
            return "no difference"
        return "slower" if self.change > 0 else "faster"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs.

    Attributes:
        differences: a benchmark of both runs each.
        only_before, only_after: names of the others.
        remarks: what makes the comparison doubtful: another machine, other versions, other threads.
    """

    differences: list[Difference]
    only_before: list[str]
    only_after: list[str]
    remarks: list[str]

    @property
    def changed(self) -> list[Difference]:
        return [one for one in self.differences if one.verdict != "no difference"]

    @property
    def summary(self) -> str:
        if not self.differences:
            return "no benchmark is in both runs"
        if not self.changed:
            return f"no difference in {len(self.differences)} benchmarks"
        parts = (f"{one.name} is {abs(one.change):.1%} {one.verdict}" for one in self.changed)
        return f"{len(self.changed)} of {len(self.differences)} benchmarks differ: " + "; ".join(parts)


def compare(before: Result, after: Result) -> Comparison:
    """Hold a run against an earlier one.

    Raises:
        ValueError: a run has too few passes to know its own noise.
    """
    old, new = ({one.name: one for one in run.measurements} for run in (before, after))
    names = [name for name in new if name in old]
    for name in names:
        for run in (old, new):
            if len(run[name].seconds) < MIN_PASSES:
                raise ValueError(
                    f"{name} has {len(run[name].seconds)} passes; a comparison needs {MIN_PASSES} "
                    "(inferneo bench --passes)"
                )
    figures = {name: (_pass_figures(old[name]), _pass_figures(new[name])) for name in names}
    typical = statistics.median(_pooled_variance(*pair) for pair in figures.values()) if figures else 0.0
    differences = []
    for name, (first, second) in figures.items():
        degrees = 2 * (len(first) + len(second) - 2)
        variance = (_pooled_variance(first, second) + typical) / 2
        error = math.sqrt(variance * (1 / len(first) + 1 / len(second)))
        differences.append(
            Difference(
                name,
                old[name].median_s,
                new[name].median_s,
                change=math.expm1(statistics.fmean(second) - statistics.fmean(first)),
                margin=math.expm1(student_t(1 - ERROR_RATE / len(figures) / 2, degrees) * error),
                noise_before=statistics.stdev(first),
                noise_after=statistics.stdev(second),
            )
        )
    return Comparison(
        differences,
        only_before=[name for name in old if name not in new],
        only_after=[name for name in new if name not in old],
        remarks=list(_remarks(before, after)),
    )


def noise(measurement: Measurement) -> float | None:
    """Standard deviation of a benchmark's passes, as a share of its time; None of a single pass."""
    figures = _pass_figures(measurement)
    return statistics.stdev(figures) if len(figures) > 1 else None


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, to 1% from 4 degrees of freedom on at the probabilities used here.

    Source: the expansion of Abramowitz and Stegun, 26.7.5.
    """
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**power for power, term in enumerate(terms, 1))


def _pass_figures(measurement: Measurement) -> list[float]:
    """One figure a pass: log of time over probe."""
    return [
        math.log(min(seconds) / min(probes))
        for seconds, probes in zip(measurement.seconds, measurement.probe_seconds, strict=True)
    ]


def _pooled_variance(first: list[float], second: list[float]) -> float:
    squares = sum((len(figures) - 1) * statistics.variance(figures) for figures in (first, second))
    return squares / (len(first) + len(second) - 2)


def _remarks(before: Result, after: Result) -> Iterable[str]:
    for what in ("machine", "versions"):
        old, new = getattr(before, what), getattr(after, what)
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                yield f"{what}: {key} was {old.get(key)}, is {new.get(key)}"
    if before.options.get("threads") != after.options.get("threads"):
        yield f"threads: {before.options.get('threads')} before, {after.options.get('threads')} after"
