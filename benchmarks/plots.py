"""The report's pictures, each as the bytes of a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from inferneo_benchmarks.compare import MIN_CHANGE, Comparison
from inferneo_benchmarks.floors import Ceilings
from inferneo_benchmarks.results import Measurement, Result
from matplotlib.figure import Figure

VERBS = ("embed", "qkv_rope_store", "attention", "linear_add", "gate_up_silu", "lm_head", "sample")
COLOURS = {name: f"C{index}" for index, name in enumerate((*VERBS, "next_tokens", "everything else"))}
MARKERS = {"cpu": "o", "triton": "D", "torch": "x"}
DPI = 110


def roofline(ceilings: Ceilings, measurements: Sequence[Measurement]) -> bytes:
    """Every counted kernel under the roofs of its device.

    Source: Williams et al., doi 10.1145/1498765.1498785.
    """
    figure, axes = _axes(10, 6.2)
    points = [(one.num_operations / one.num_bytes, one.tflop_s, one) for one in measurements]
    low, high = min(x for x, _, _ in points) / 2, max(x for x, _, _ in points) * 2
    for kind, peak in ceilings.operations_per_s.items():
        if kind not in {one.compute for one in measurements}:
            continue
        ridge = peak / ceilings.bytes_per_s
        xs = [low, min(max(ridge, low), high), max(high, ridge * 2)]
        roof = [min(peak, x * ceilings.bytes_per_s) / 1e12 for x in xs]
        axes.plot(xs, roof, color="0.35", linewidth=1.2)
        axes.annotate(
            f"{kind} {peak / 1e12:.3g} TFLOP/s", (xs[-1], roof[-1]), ha="right", va="bottom", fontsize=9, color="0.25"
        )
    axes.annotate(
        f"{ceilings.bytes_per_s / 1e9:.0f} GB/s",
        (low, low * ceilings.bytes_per_s / 1e12),
        xytext=(4, 8),
        textcoords="offset points",
        fontsize=9,
        color="0.25",
    )
    labelled: set[str] = set()
    for x, y, one in points:
        backend = one.name.partition("[")[2].partition("-")[0]
        kind = f"{one.group}, {backend}" if backend in MARKERS else one.group  # not every benchmark names a backend
        label = kind if kind not in labelled else None
        labelled.add(kind)
        axes.plot(
            x, y, MARKERS.get(backend, "s"), color=COLOURS.get(one.group, "0.5"), markersize=7, alpha=0.85, label=label
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte, counted from the shapes")
    axes.set_ylabel("TFLOP/s (int8: Top/s)")
    axes.set_title(f"Roofline of the {ceilings.device.upper()}")
    axes.legend(fontsize=8, ncols=2, loc="lower right")
    return _png(figure)


def breakdown(steps: Sequence[dict[str, Any]]) -> bytes:
    """Each step's time by verb, beside the floor that counts and ceilings give."""
    figure, axes = _axes(10, 1.6 + 0.95 * len(steps))
    labels: list[str] = []
    shown: set[str] = set()
    for place, step in enumerate(steps):
        spent = sum(verb["seconds"] for verb in step["verbs"].values())
        parts = {name: verb["seconds"] for name, verb in step["verbs"].items()}
        parts["everything else"] = max(step["total_s"] - spent, 0.0)
        floors = {name: verb["floor_seconds"] for name, verb in step["verbs"].items()}
        for row, bar in ((0.0, parts), (0.36, floors)):
            start = 0.0
            for name, seconds in bar.items():
                label = name if name not in shown else None
                shown.add(name)
                colour = COLOURS.get(name, "0.6")
                axes.barh(place + row, seconds / step["total_s"], 0.32, start, color=colour, label=label)
                start += seconds / step["total_s"]
            axes.annotate(
                f"{start * step['total_s'] * 1e3:.2f} ms" + (" floor" if row else ""),
                (start, place + row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        labels.append(step["name"])
    axes.set_yticks([place + 0.18 for place in range(len(steps))], labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18)
    axes.set_xlabel("share of the step's time")
    axes.set_title("Steps by verb: as measured, and at the roofline")
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.28 if len(steps) < 3 else -0.15))
    return _png(figure)


def distributions(measurements: Sequence[Measurement]) -> bytes:
    """Cumulative distributions of latencies."""
    figure, axes = _axes(10, 4.6)
    for one in measurements:
        ordered = sorted(one.latencies_ms)
        shares = [(rank + 1) / len(ordered) for rank in range(len(ordered))]
        axes.step(ordered, shares, where="post", label=one.name)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("share of the latencies up to there")
    axes.set_title("Latencies")
    axes.legend(fontsize=8)
    return _png(figure)


def changes(comparison: Comparison) -> bytes:
    """Each benchmark's change, and what chance alone may bring."""
    ordered = sorted(comparison.differences, key=lambda one: one.change)
    figure, axes = _axes(10, 1.4 + 0.24 * len(ordered))
    colours = {"slower": "tab:red", "faster": "tab:green", "no difference": "0.55"}
    for place, one in enumerate(ordered):
        axes.errorbar(
            one.change * 100, place, xerr=one.margin * 100, fmt="o", color=colours[one.verdict], markersize=4, capsize=2
        )
    axes.axvspan(-MIN_CHANGE * 100, MIN_CHANGE * 100, color="0.9", zorder=0)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(ordered)), [one.name for one in ordered], fontsize=7)
    axes.set_xlabel("change of the time in percent; bars: what chance may bring; grey band: too small to matter")
    axes.set_title("Before and after")
    return _png(figure)


def all_plots(result: Result, comparison: Comparison | None) -> dict[str, bytes]:
    """The pictures that a result has data for, by file name."""
    found: dict[str, bytes] = {}
    for device, ceilings in result.ceilings.items():
        counted = [one for one in result.measurements if one.device == device and one.num_operations]
        if counted:
            found[f"roofline-{device}.png"] = roofline(ceilings, counted)
    if result.steps:
        found["steps.png"] = breakdown(result.steps)
    with_latencies = [one for one in result.measurements if one.latencies_ms]
    if with_latencies:
        found["latencies.png"] = distributions(with_latencies)
    if comparison is not None and comparison.differences:
        found["changes.png"] = changes(comparison)
    return found


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
