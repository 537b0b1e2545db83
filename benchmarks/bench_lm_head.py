"""The final RMSNorm and the output head, by rows that are sampled."""

from __future__ import annotations

from collections.abc import Callable

from inferneo_benchmarks.selection import Choice, parameters

from inferneo_core.config import ModelConfig


def rows(choice: Choice) -> list[int]:
    """Prefill draws one token a sequence, so few rows will do; a large head takes seconds to make and to check."""
    if choice.backend == "cpu" and choice.model != "smollm2-135m" and not choice.is_full:
        return []
    return [tokens for tokens in choice.tokens if tokens <= 64]


@parameters(rows)
def test_lm_head(bench_verb: Callable[..., None], backend: str, config: ModelConfig, weights: str, size: int) -> None:
    bench_verb("lm_head", backend, weights, config=config, num_rows=size)
