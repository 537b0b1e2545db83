"""RMSNorm, Q, K and V projections, RoPE, and the store into the cache: one layer's, by tokens a step."""

from __future__ import annotations

from collections.abc import Callable

from inferneo_benchmarks.selection import parameters

from inferneo_core.config import ModelConfig


@parameters()
def test_qkv_rope_store(
    bench_verb: Callable[..., None], backend: str, config: ModelConfig, weights: str, size: int
) -> None:
    bench_verb("qkv_rope_store", backend, weights, config=config, num_tokens=size)
