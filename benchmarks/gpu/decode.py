"""Batch-1 decode through Engine.stream: tokens a second, and the share of the bandwidth floor."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
from inferneo_benchmarks.gpu.measure import copy_bandwidth, require, write
from inferneo_benchmarks.gpu.models import random_engine
from inferneo_benchmarks.models import MODELS

from inferneo_core import Engine, SamplingParams

CONTEXT, TOKENS = 1024, 256


def weight_bytes(engine: Engine) -> int:
    """Bytes that a token reads: every weight but the embedding, of which one row; a tied one is the head and counts."""
    model = engine._runner.model
    layers = ((layer.qkv, layer.out, layer.gate_up, layer.down) for layer in model.layers)
    linears = [model.head, *itertools.chain.from_iterable(layers)]
    return sum(weight.num_bytes for linear in linears for weight in getattr(linear, "weights"))  # noqa: B009


def stream_seconds(engine: Engine, prompt: list[int], params: SamplingParams) -> list[float]:
    """Times between the tokens of one stream, the first (the prefill) left out."""
    stamps = []
    for _ in engine.stream(prompt, params):
        stamps.append(time.perf_counter())
    return [later - earlier for earlier, later in itertools.pairwise(stamps)]


def measure(model: str, quant_type: str = "") -> None:
    started = time.perf_counter()
    arguments: dict[str, Any] = {"ops": "triton", "device": "cuda", "max_model_len": 4096, "max_num_seqs": 1}
    with random_engine(MODELS[model], quant_type, dtype="bfloat16", enable_prefix_caching=False, **arguments) as engine:
        ready_s = time.perf_counter() - started
        prompt = [(7 * i) % 250 for i in range(CONTEXT)]
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        stream_seconds(engine, prompt, params)
        gaps = [gap for _ in range(3) for gap in stream_seconds(engine, prompt, params)]
        require(len(gaps) == 3 * (TOKENS - 1), f"{len(gaps)} tokens came")
        config = engine.model_config
        kv_bytes = 2 * config.num_layers * config.kv_size * 2 * (CONTEXT + TOKENS // 2)
        bytes_read = weight_bytes(engine) + kv_bytes
        before = torch.cuda.max_memory_allocated()
    seconds = sum(gaps) / len(gaps)
    bandwidth = copy_bandwidth()
    write(
        shape=model,
        quant_type=quant_type or "bf16",
        tokens_per_s=round(1 / seconds, 1),
        median_gap_us=round(statistics.median(gaps) * 1e6, 1),
        bytes_per_token=bytes_read,
        gb_s=round(bytes_read / seconds / 1e9, 1),
        share_of_floor=round(bytes_read / seconds / 1e9 / bandwidth, 3),
        ready_s=round(ready_s, 1),
        peak_memory_bytes=before,
    )
