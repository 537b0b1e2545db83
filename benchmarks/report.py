"""A result as one HTML page that needs nothing else, and its pictures as PNGs beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from inferneo_benchmarks.compare import Comparison, noise
from inferneo_benchmarks.plots import all_plots
from inferneo_benchmarks.results import Result
from inferneo_benchmarks.table import in_time

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { font-weight: 600; } h2 { margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: right; padding: 3px 9px; border-bottom: 1px solid #e4e4e4; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; word-break: break-all; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.slower { color: #b00020; } .faster { color: #187a2f; } .remark { color: #8a5a00; }
"""


def write_report(folder: Path, result: Result, before: Result | None, comparison: Comparison | None) -> Path:
    """Write report.html and its pictures; returns the page.

    Args:
        folder: made if it is not there.
        result: of the run.
        before, comparison: of the run that it is held against, if there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = all_plots(result, comparison)
    for name, png in plots.items():
        (folder / name).write_bytes(png)
    page = folder / "report.html"
    page.write_text(html(result, plots, before, comparison), encoding="utf-8")
    return page


def html(
    result: Result, plots: Mapping[str, bytes], before: Result | None = None, comparison: Comparison | None = None
) -> str:
    """The page."""
    parts = ["<h1>Inferneo benchmarks</h1>", _facts(result)]
    if before is not None and comparison is not None:
        parts += ["<h2>Before and after</h2>", _comparison(before, comparison)]
    parts += [_picture(name, png) for name, png in plots.items()]
    parts += ["<h2>All benchmarks</h2>", _measurements(result)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Inferneo benchmarks</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _facts(result: Result) -> str:
    commit = result.commit.get("id", "unknown")[:12] + (" with changes" if result.commit.get("dirty") else "")
    rows = [("when", result.when), ("commit", commit), *result.machine.items(), *result.versions.items()]
    rows += [("threads", result.options.get("threads", "")), ("passes", result.options.get("passes", ""))]
    for device, ceilings in result.ceilings.items():
        rates = ", ".join(f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in ceilings.operations_per_s.items())
        rows.append((f"ceilings of the {device}", f"{ceilings.bytes_per_s / 1e9:.1f} GB/s, {rates}"))
    return _table((), [(name.replace("_", " "), str(value)) for name, value in rows])


def _measurements(result: Result) -> str:
    head = ("benchmark", "median", "GB/s", "TFLOP/s", "share of the roofline", "noise", "")
    rows = []
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
                ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in one.facts.items()),
            )
        )
    return _table(head, rows)


def _comparison(before: Result, comparison: Comparison) -> str:
    head = ("benchmark", "before", "after", "change", "chance", "noise before", "noise after", "verdict")
    rows = [
        (
            one.name,
            in_time(one.before_s),
            in_time(one.after_s),
            f"{one.change:+.1%}",
            f"±{one.margin:.1%}",
            f"{one.noise_before:.1%}",
            f"{one.noise_after:.1%}",
            one.verdict,
        )
        for one in sorted(comparison.differences, key=lambda one: (one.verdict == "no difference", -abs(one.change)))
    ]
    remarks = "".join(f'<p class="remark">{escape(remark)}</p>' for remark in comparison.remarks)
    intro = f"<p>Against the run of {escape(before.when)}: <strong>{escape(comparison.summary)}</strong>.</p>"
    return intro + remarks + _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["<table>"]
    if head:
        lines.append("<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>")
    for row in rows:
        kind = f' class="{row[-1]}"' if row[-1] in ("slower", "faster") else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _picture(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{escape(Path(name).stem)}" src="data:image/png;base64,{data}">'
