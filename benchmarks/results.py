"""The result of a run: what was measured, where, and on which code, as one JSON file.

A run has several passes, each a process of its own: what differs between processes of the same code (where memory lies,
on which cores threads run) then shows inside one run, as noise.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inferneo_benchmarks.floors import Ceilings

SCHEMA = 1
TOLERANCE = 0.1  # how far a kernel may beat the probes before its count is not believed


@dataclass(frozen=True)
class Measurement:
    """One benchmark over all passes.

    Attributes:
        name: "linear_add[cpu-smollm2-135m-Q4_1-1x576x576]".
        group: the verb, or the part of the engine.
        device: whose ceilings apply: "cpu" or "cuda"; "" where none do.
        num_bytes, num_operations, compute: what one call must move and compute (counts.py); 0 and "" where not counted.
        probe: kind of the probe (timing.py).
        seconds: a pass each: of one call, a round each.
        probe_seconds: of the probe right before.
        facts: further figures, by name: the median of the passes.
        latencies_ms: what a distribution is drawn of, where there is one.
    """

    name: str
    group: str
    device: str
    num_bytes: int
    num_operations: int
    compute: str
    probe: str
    seconds: list[list[float]]
    probe_seconds: list[list[float]]
    facts: dict[str, Any] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(second for rounds in self.seconds for second in rounds)

    @property
    def gb_s(self) -> float:
        return self.num_bytes / self.median_s / 1e9

    @property
    def tflop_s(self) -> float:
        return self.num_operations / self.median_s / 1e12

    def share(self, ceilings: Ceilings) -> float:
        """Of the roofline, in 0 to 1: the least time that the machine could take over the time it took."""
        return ceilings.floor_seconds(self.num_bytes, self.num_operations, self.compute) / self.median_s


@dataclass(frozen=True)
class Result:
    """A run.

    Attributes:
        when: ISO 8601, UTC.
        commit: {"id": ..., "dirty": ...}, as git says.
        machine: processor, cores, memory, GPU.
        versions: of Python, torch and what else moves figures.
        options: what was asked for.
        ceilings: by device, the median of the passes', raised to what a kernel reached.
        measurements: in the order of their running.
        steps: whole steps, as Engine.profile saw them: {"name", "device", "total_s", "verbs": {verb: {"seconds",
            "floor_seconds"}}}.
    """

    when: str
    commit: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]
    ceilings: dict[str, Ceilings]
    measurements: list[Measurement]
    steps: list[dict[str, Any]]

    def share(self, measurement: Measurement) -> float | None:
        """A measurement's share of the roofline; None where nothing was counted."""
        if not measurement.num_bytes:
            return None
        return measurement.share(self.ceilings[measurement.device])

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": SCHEMA, **_rounded(asdict(self))}, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Result:
    """Read a result file.

    Raises:
        ValueError: it is none, or of another schema.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no result of a benchmark run: {error}") from error
    schema = found.pop("schema", None) if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}; this version reads {SCHEMA} (measure again)")
    found["ceilings"] = {device: Ceilings(**ceilings) for device, ceilings in found["ceilings"].items()}
    found["measurements"] = [Measurement(**measurement) for measurement in found["measurements"]]
    return Result(**found)


def merge(passes: Sequence[Mapping[str, Any]], **about: Any) -> Result:
    """One Result of what the passes wrote.

    Args:
        passes: each {"ceilings": [...], "fastest": [...], "benchmarks": [...], "steps": [...]}, of conftest.py.
        about: when, commit, machine, versions and options of the run.
    Raises:
        ValueError: a kernel beats what its device was seen to do by more than TOLERANCE: its count is wrong, or its
            operands lay in a cache.
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for one in passes:
        for found in one["benchmarks"]:
            by_name.setdefault(found["name"], []).append(found)
    measurements = [_merged(found) for found in by_name.values()]
    ceilings = _over_passes(passes, "ceilings", statistics.median)
    for device, fastest in _over_passes(passes, "fastest", max).items():
        _check(measurements, device, fastest)
    return Result(
        **about,
        ceilings={device: _raised(one, measurements) for device, one in ceilings.items()},
        measurements=measurements,
        steps=list({step["name"]: step for one in passes for step in one["steps"]}.values()),
    )


def _merged(passes: Sequence[Mapping[str, Any]]) -> Measurement:
    """One benchmark over its passes; a fact is the median of theirs."""
    return Measurement(
        **{
            **passes[0],
            "seconds": [one["seconds"] for one in passes],
            "probe_seconds": [one["probe_seconds"] for one in passes],
            "facts": {fact: statistics.median(one["facts"][fact] for one in passes) for fact in passes[0]["facts"]},
            "latencies_ms": [latency for one in passes for latency in one["latencies_ms"]],
        }
    )


def _over_passes(
    passes: Iterable[Mapping[str, Any]], what: str, choose: Callable[[Iterable[float]], float]
) -> dict[str, Ceilings]:
    """By device: of each rate, what `choose` makes of the passes'."""
    found: dict[str, list[Ceilings]] = {}
    for one in passes:
        for ceilings in one[what]:
            found.setdefault(ceilings["device"], []).append(Ceilings(**ceilings))
    return {
        device: Ceilings(
            device,
            seen[0].num_threads,
            choose([one.bytes_per_s for one in seen]),
            {kind: choose([one.operations_per_s[kind] for one in seen]) for kind in seen[0].operations_per_s},
        )
        for device, seen in found.items()
    }


def _check(measurements: Iterable[Measurement], device: str, fastest: Ceilings) -> None:
    """Refuse a kernel that beats the fastest that its device was seen to be."""
    for one in measurements:
        if one.device == device and one.num_bytes and (share := one.share(fastest)) > 1 + TOLERANCE:
            raise ValueError(
                f"{one.name} reaches {share:.0%} of the roofline measured beside it; its count is wrong, or "
                "its operands lay in a cache"
            )


def _raised(ceilings: Ceilings, measurements: Sequence[Measurement]) -> Ceilings:
    """What a kernel does the machine can do: a ceiling that one exceeds is raised to it."""
    rates = dict(ceilings.operations_per_s)
    bytes_per_s = ceilings.bytes_per_s
    for one in measurements:
        if one.device != ceilings.device or not one.num_bytes:
            continue
        bytes_per_s = max(bytes_per_s, one.num_bytes / one.median_s)
        rates[one.compute] = max(rates[one.compute], one.num_operations / one.median_s)
    return Ceilings(ceilings.device, ceilings.num_threads, bytes_per_s, rates)


def _rounded(value: Any) -> Any:
    """The same with six significant digits, which is more than any clock gives."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
