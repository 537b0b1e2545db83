"""Llama 8B in steps of many: the host's time in a decode step of 64 sequences, and a prefill of 2,048 tokens."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from inferneo_benchmarks.gpu.measure import matmul_peak, require, write
from inferneo_benchmarks.gpu.models import random_engine
from inferneo_benchmarks.models import MODELS

from inferneo_core import Engine, SamplingParams
from inferneo_core.runner import Pending


def host_us(engine: Engine, num_seqs: int) -> tuple[float, float]:
    """Median host and whole time of a decode step, in microseconds: what is not spent in Pending.wait is the host's."""
    waited = [0.0]
    wait = Pending.wait

    def timed_wait(pending: Pending) -> object:
        started = time.perf_counter()
        output = wait(pending)
        waited[0] += time.perf_counter() - started
        return output

    params = SamplingParams(max_tokens=200, temperature=0.8, seed=1, ignore_eos=True)
    streams = [engine.stream([index % 250 + 1, 5, 9], params) for index in range(num_seqs)]
    host, whole = [], []
    Pending.wait = timed_wait  # type: ignore[method-assign,assignment]
    try:
        for step in range(150):
            waited[0], started = 0.0, time.perf_counter()
            require(engine.step(), "there was nothing to do")
            if step >= 20:
                whole.append(time.perf_counter() - started)
                host.append(whole[-1] - waited[0])
    finally:
        Pending.wait = wait  # type: ignore[method-assign]
        for stream in streams:
            stream.close()
    return statistics.median(host) * 1e6, statistics.median(whole) * 1e6


def prefill_seconds(engine: Engine, num_tokens: int) -> float:
    """Median time from a prompt's arrival to its first token."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    times = []
    for run in range(8):
        prompt = [(index * 7 + run) % 250 for index in range(num_tokens)]
        started = time.perf_counter()
        (completion,) = engine.generate([prompt], params)
        times.append(time.perf_counter() - started)
        require(len(completion.token_ids) == 1, "no token came")
    return statistics.median(times[2:])


def main() -> None:
    limits: dict[str, Any] = {"max_model_len": 2304, "max_num_batched_tokens": 2048, "max_num_seqs": 64}
    with random_engine(
        MODELS["llama-3.1-8b"], ops="triton", dtype="bfloat16", enable_prefix_caching=False, **limits
    ) as engine:
        config = engine.model_config
        host, whole = host_us(engine, 64)
        seconds = prefill_seconds(engine, 2048)
    per_layer = config.hidden_size * (2 * config.q_size + 2 * config.kv_size + 3 * config.intermediate_size)
    flop = 2 * 2048 * config.num_layers * per_layer + 2 * 2048**2 * config.q_size * config.num_layers
    torch.cuda.empty_cache()
    write(
        host_us_per_step_at_64=round(host, 1),
        step_us_at_64=round(whole, 1),
        prefill_2048_ms=round(seconds * 1e3, 2),
        prefill_tflop_s=round(flop / seconds / 1e12, 1),
        prefill_share_of_peak=round(flop / seconds / 1e12 / matmul_peak(), 3),
    )


if __name__ == "__main__":
    main()
