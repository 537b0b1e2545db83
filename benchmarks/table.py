"""Results as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from inferneo_benchmarks.compare import Comparison, noise
from inferneo_benchmarks.results import Result


def result_table(result: Result) -> str:
    """A row a benchmark: median, achieved rates, share of the roofline, noise between passes."""
    rows = [("benchmark", "median", "GB/s", "TFLOP/s", "share", "noise")]
    for one in result.measurements:
        share, deviation = result.share(one), noise(one)
        rows.append(
            (
                one.name,
                in_time(one.median_s),
                f"{one.gb_s:.1f}" if one.num_bytes else "",
                f"{one.tflop_s:.3f}" if one.num_operations else "",
                "" if share is None else f"{share:.0%}",
                "" if deviation is None else f"{deviation:.1%}",
            )
        )
    lines = [_aligned(rows)]
    for device, ceilings in result.ceilings.items():
        rates = ", ".join(f"{kind} {rate / 1e12:.2f} TFLOP/s" for kind, rate in ceilings.operations_per_s.items())
        lines.append(f"ceilings of the {device}: {ceilings.bytes_per_s / 1e9:.1f} GB/s, {rates}")
    return "\n".join(lines)


def comparison_table(comparison: Comparison) -> str:
    """A row a benchmark, the changed ones first, and one sentence that says it all."""
    rows = [("benchmark", "before", "after", "change", "chance", "verdict")]
    order = sorted(comparison.differences, key=lambda one: (one.verdict == "no difference", -abs(one.change)))
    for one in order:
        rows.append(
            (
                one.name,
                in_time(one.before_s),
                in_time(one.after_s),
                f"{one.change:+.1%}",
                f"±{one.margin:.1%}",
                one.verdict,
            )
        )
    return "\n".join([_aligned(rows), *comparison.remarks, comparison.summary])


def in_time(seconds: float) -> str:
    """Seconds in the unit that leaves one to three digits before the point."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *rest = row
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
