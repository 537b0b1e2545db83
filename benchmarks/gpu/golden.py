"""The engine's tokens on the GPU against the reference on the CPU, and that serving compiles nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from inferneo_benchmarks.gpu.measure import require, write
from inferneo_benchmarks.gpu.models import random_engine
from inferneo_benchmarks.models import MODELS

from inferneo_core import Engine, SamplingParams
from inferneo_core.config import ModelConfig, RopeConfig

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "smollm2_greedy.json"
TINY = ModelConfig(263, 256, 512, 3, 4, 2, 64, 1e-5, 1024, RopeConfig())
PROMPTS = [[5, 80, 200, 13, 7], [9] * 70, [1], list(range(33)), [30, 31, 32] * 40]
PARAMS = [
    SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=0.8, seed=1, ignore_eos=True),
    SamplingParams(max_tokens=35, seed=2, top_p=0.9, top_k=40, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=20, temperature=0.0, repetition_penalty=1.2, ignore_eos=True),
    SamplingParams(max_tokens=30, seed=3, min_p=0.05, logit_bias={7: 2.0}, ignore_eos=True),
]


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """The kernels that Triton compiles while the block runs."""
    compiled: list[str] = []

    def note(*args: Any, **kwargs: Any) -> None:
        compiled.append(str(kwargs.get("repr", kwargs.get("fn"))))

    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield compiled
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


def tokens(engine: Engine) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in engine.generate(PROMPTS, PARAMS)]


def tiny() -> dict[str, Any]:
    """A tiny Llama in fp32 on both, its weights made on the CPU so that they are the same."""
    limits: dict[str, Any] = {"weights_on": "cpu", "dtype": "float32", "max_model_len": 512, "max_num_seqs": 4}
    limits["max_num_batched_tokens"] = 64
    with random_engine(TINY, ops="torch", device="cpu", **limits) as engine:
        expected = tokens(engine)
    with random_engine(TINY, ops="triton", device="cuda", **limits) as engine:
        with counted_compilations() as compiled:
            actual = tokens(engine)
        again = tokens(engine)
    with counted_compilations() as hook_works:
        random_engine(
            MODELS["smollm2-135m"], ops="triton", device="cuda", dtype="float16", max_model_len=64, max_num_seqs=1
        ).close()
    require(actual == expected, f"{actual} is not {expected}")
    require(again == actual, "a second run gave other tokens")
    require(bool(hook_works), "the compilation hook notes nothing, so a silent one proves nothing")
    require(not compiled, f"serving compiled {compiled}")
    return {"tiny": "equal to the reference", "compilations_while_serving": 0}


def default_model() -> dict[str, Any]:
    path = os.environ.get("INFERNEO_MODEL", "")
    if not Path(path).is_file():
        return {"default_model": "skipped: INFERNEO_MODEL names no file"}
    golden = json.loads(GOLDEN.read_text())
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    with Engine(path, ops="triton", device="cuda", dtype="float32", max_model_len=256) as engine:
        completions = engine.generate([entry["prompt"] for entry in golden], params)
    for entry, completion in zip(golden, completions, strict=True):
        require(list(completion.token_ids) == entry["token_ids"], f"{entry['prompt']!r} -> {completion.text!r}")
    with Engine(path, ops="triton", device="cuda", max_model_len=2048, max_num_seqs=1) as engine:
        long = SamplingParams(max_tokens=512, temperature=0.0, ignore_eos=True)
        timings = [engine.generate(["Once upon a time"], long)[0].timings for _ in range(3)]
    rates = [timing.tokens_per_s for timing in timings if timing is not None]
    return {"default_model": "equal to transformers", "default_model_tokens_per_s": round(max(rates), 1)}


def main() -> None:
    write(**tiny(), **default_model())


if __name__ == "__main__":
    main()
