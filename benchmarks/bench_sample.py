"""The sampler over logits that fall off as a language model's do, and the log-probabilities of what it drew.

Samplers are named by what they filter; "wide" logits have hundreds of tokens at the cut, the worst case for top-p.
"""

from __future__ import annotations

from collections.abc import Callable

from inferneo_benchmarks.selection import Choice, parameters

from inferneo_core.config import ModelConfig

SAMPLERS = ("greedy", "plain", "filters")
FULL_SAMPLERS = ("min_p", "top_p", "top_p-wide", "typical", "typical-wide")


# The sampler reads no weights, so one model a vocabulary is enough.
VOCABULARIES = (
    ("cpu", "smollm2-135m", "Q4_1"),
    ("cpu", "llama-3.2-1b", "Q4_K"),
    ("triton", "llama-3.2-1b", "BF16"),
)


def rows_and_samplers(choice: Choice) -> list[str]:
    if choice.backend == "torch":  # it sorts, which takes 10 ms a row
        return [] if choice.is_full else ["1-filters"]
    if choice[:3] not in VOCABULARIES:
        return []
    if choice.is_full:
        return [f"1-{sampler}" for sampler in FULL_SAMPLERS] + [f"64-{sampler}" for sampler in SAMPLERS]
    return [f"{rows}-{sampler}" for rows in (1, 8 if choice.backend == "cpu" else 128) for sampler in SAMPLERS]


def listed(choice: Choice) -> list[int]:
    """How many log-probabilities are listed."""
    return [0, 20] if choice.is_full and choice[:3] in VOCABULARIES else []


@parameters(rows_and_samplers)
def test_sample(bench_verb: Callable[..., None], backend: str, config: ModelConfig, weights: str, size: str) -> None:
    rows, sampler, *wide = size.split("-")
    shape = {"vocab_size": config.vocab_size, "num_rows": int(rows), "sampler": sampler, "is_wide": bool(wide)}
    bench_verb("sample", backend, weights, **shape)


@parameters(listed)
def test_score(bench_verb: Callable[..., None], backend: str, config: ModelConfig, weights: str, size: int) -> None:
    bench_verb("score", backend, weights, vocab_size=config.vocab_size, num_rows=1, num_logprobs=size)
