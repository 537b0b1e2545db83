"""RMSNorm, gate and up projections, SiLU(gate) * up: one layer's, by tokens a step."""

from __future__ import annotations

from collections.abc import Callable

from inferneo_benchmarks.selection import parameters

from inferneo_core.config import ModelConfig


@parameters()
def test_gate_up_silu(
    bench_verb: Callable[..., None], backend: str, config: ModelConfig, weights: str, size: int
) -> None:
    bench_verb("gate_up_silu", backend, weights, config=config, num_tokens=size)
