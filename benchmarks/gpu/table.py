"""The results of the GPU check beside their targets, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Result = Mapping[str, Any]
# What is measured, where it stands in which part's result, its target, and whether more is better. Targets are for an
# H100 with 3.35 TB/s; shares of the floor measured in the same run hold on any GPU.
ROWS: tuple[tuple[str, str, Callable[[Result], Any], float, bool], ...] = (
    ("1B bf16, batch 1, tokens/s", "decode_1b", lambda r: r["tokens_per_s"], 1000, True),
    ("1B bf16, batch 1, share of the floor", "decode_1b", lambda r: r["share_of_floor"], 0.74, True),
    ("8B bf16, batch 1, tokens/s", "decode_8b", lambda r: r["tokens_per_s"], 185, True),
    ("8B bf16, batch 1, share of the floor", "decode_8b", lambda r: r["share_of_floor"], 0.83, True),
    ("8B Q4_K, batch 1, tokens/s", "decode_8b_q4", lambda r: r["tokens_per_s"], 462, True),
    (
        "decode attention, 32 x 4k, share of the floor",
        "attention",
        lambda r: _attention(r, 32, 1, "share_of_floor"),
        0.8,
        True,
    ),
    ("prefill attention, 8k, TFLOP/s", "attention", lambda r: _attention(r, 1, 8192, "tflop_s"), 450, True),
    ("prefill 8B, 2,048 tokens, share of the matrix peak", "batched", lambda r: r["prefill_share_of_peak"], 0.6, True),
    ("sampling 128 x 128k, top-k and top-p, us", "sampling", lambda r: _sampling(r), 100, False),
    ("host time a decode step at batch 64, us", "batched", lambda r: r["host_us_per_step_at_64"], 100, False),
    ("default model, batch 1, tokens/s", "golden", lambda r: r["default_model_tokens_per_s"], 1500, True),
)


def _attention(result: Result, num_seqs: int, query_len: int, what: str) -> Any:
    wanted = (num_seqs, query_len, 128)
    rows = (row for row in result["rows"] if (row["num_seqs"], row["query_len"], row["head_dim"]) == wanted)
    return next(rows)[what]


def _sampling(result: Result) -> Any:
    rows = (row for row in result["rows"] if (row["num_seqs"], row["kind"]) == (128, "top_k 50, top_p 0.9"))
    return next(rows)["us"]


def table(results: Mapping[str, Result]) -> str:
    """Parts that have no result are rows that say so."""
    lines = ["| part | status | seconds | |", "| --- | --- | ---: | --- |"]
    for name, result in results.items():
        facts = {key: value for key, value in result.items() if isinstance(value, (int, float, str))}
        shown = ", ".join(f"{key} {value}" for key, value in facts.items() if key not in ("status", "seconds"))
        lines.append(f"| {name} | {result['status']} | {result.get('seconds', '')} | {shown} |")
    lines += ["", "| what | measured | target | |", "| --- | ---: | ---: | --- |"]
    for what, part, pick, target, more_is_better in ROWS:
        result = results.get(part, {})
        try:
            value = pick(result)
        except (KeyError, StopIteration):
            lines.append(f"| {what} | not measured | {target:g} | {result.get('status', 'not run')} |")
            continue
        reached = value >= target if more_is_better else value <= target
        lines.append(f"| {what} | {value:g} | {target:g} | {'reached' if reached else 'missed'} |")
    return "\n".join(lines) + "\n"
