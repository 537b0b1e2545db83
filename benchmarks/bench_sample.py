"""The sampler over logits that fall off as a language model's do: greedy, plain, and with top-k, top-p and min-p."""

from __future__ import annotations

from collections.abc import Callable

from inferneo_benchmarks.selection import Choice, parameters
from inferneo_benchmarks.verbs import SAMPLERS

from inferneo_core.config import ModelConfig


def rows_and_samplers(choice: Choice) -> list[str]:
    """The sampler reads no weights, so one type of them a model is enough."""
    if choice.backend == "torch":
        return ["1-filters"]
    rows = (1, 8) if choice.backend == "cpu" else (1, 128)
    return [f"{count}-{sampler}" for count in rows for sampler in SAMPLERS] if choice.weights != "Q8_0" else []


@parameters(rows_and_samplers)
def test_sample(bench_verb: Callable[..., None], backend: str, config: ModelConfig, weights: str, size: str) -> None:
    rows, _, sampler = size.partition("-")
    bench_verb("sample", backend, weights, vocab_size=config.vocab_size, num_rows=int(rows), sampler=sampler)
