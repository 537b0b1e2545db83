"""The two projections onto the residual stream, of attention and of the MLP: one layer's, by tokens a step."""

from __future__ import annotations

from collections.abc import Callable

from inferneo_benchmarks.selection import parameters

from inferneo_core.config import ModelConfig


@parameters()
def test_linear_add_out(
    bench_verb: Callable[..., None], backend: str, config: ModelConfig, weights: str, size: int
) -> None:
    shape = {"num_rows": config.hidden_size, "num_columns": config.q_size, "num_tokens": size}
    bench_verb("linear_add", backend, weights, **shape)


@parameters()
def test_linear_add_down(
    bench_verb: Callable[..., None], backend: str, config: ModelConfig, weights: str, size: int
) -> None:
    shape = {"num_rows": config.hidden_size, "num_columns": config.intermediate_size, "num_tokens": size}
    bench_verb("linear_add", backend, weights, **shape)
