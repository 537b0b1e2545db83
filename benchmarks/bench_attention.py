"""Attention over the paged cache: prefill, decode, and both in one call.

Sequences are named query_len x seq_len: "8x(1x512)" are eight that each decode a token at 512 tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable

from inferneo_benchmarks.counts import SequenceWork
from inferneo_benchmarks.selection import Choice, parameters

from inferneo_core.config import ModelConfig

QUICK = ("1x(1x512)", "1x(1x4096)", "8x(1x512)", "1x(128x128)", "1x(512x2048)", "8x(1x512)+1x(128x128)")
FULL = ("1x(1x8192)", "32x(1x1024)", "1x(2048x2048)")
GPU = ("32x(1x4096)", "64x(1x1024)", "1x(8192x8192)")


def mixtures(choice: Choice) -> list[str]:
    """The mixtures for a choice: attention reads no weights, so one type of them each is enough."""
    if choice.backend == "torch":
        return [QUICK[3]]
    if choice.weights not in (("Q4_1", "Q4_K") if choice.backend == "cpu" else ("BF16",)):
        return []
    if choice.is_full:
        return list(FULL)
    return list(QUICK) if choice.backend == "cpu" else [*QUICK, *GPU]


def sequences(mixture: str) -> list[SequenceWork]:
    """The sequences that a name stands for."""
    found = []
    for part in mixture.split("+"):
        times, _, lengths = part.partition("x(")
        query_len, _, seq_len = lengths.rstrip(")").partition("x")
        found += [SequenceWork(int(query_len), int(seq_len))] * int(times)
    return found


@parameters(mixtures)
def test_attention(bench_verb: Callable[..., None], backend: str, config: ModelConfig, weights: str, size: str) -> None:
    bench_verb("attention", backend, weights, config=config, sequences=sequences(size))
