"""Llama 8B with 256 streams of 512 + 256 tokens: tokens a second of the whole."""

from __future__ import annotations

import time
from typing import Any

from inferneo_benchmarks.gpu.measure import require, write
from inferneo_benchmarks.gpu.models import random_engine
from inferneo_benchmarks.models import MODELS

from inferneo_core import SamplingParams

NUM_STREAMS, PROMPT, OUTPUT = 256, 512, 256


def main() -> None:
    limits: dict[str, Any] = {"max_model_len": 1024, "max_num_batched_tokens": 4096, "max_num_seqs": NUM_STREAMS}
    with random_engine(
        MODELS["llama-3.1-8b"], ops="triton", dtype="bfloat16", enable_prefix_caching=False, **limits
    ) as engine:
        prompts = [[(stream * 31 + index * 7) % 250 for index in range(PROMPT)] for stream in range(NUM_STREAMS)]
        params = [SamplingParams(max_tokens=OUTPUT, seed=index, ignore_eos=True) for index in range(NUM_STREAMS)]
        engine.generate(prompts[:8], params[:8])
        started = time.perf_counter()
        completions = engine.generate(prompts, params)
        seconds = time.perf_counter() - started
    generated = sum(len(completion.token_ids) for completion in completions)
    require(generated == NUM_STREAMS * OUTPUT, f"{generated} tokens came")
    write(
        streams=NUM_STREAMS,
        seconds=round(seconds, 2),
        output_tokens_per_s=round(generated / seconds, 1),
        total_tokens_per_s=round((generated + NUM_STREAMS * PROMPT) / seconds, 1),
    )


if __name__ == "__main__":
    main()
