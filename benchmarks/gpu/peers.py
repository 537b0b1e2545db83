"""transformers on the same shape: static cache, and compiled where torch.compile works."""

from __future__ import annotations

import time
from typing import Any

import torch
from inferneo_benchmarks.gpu.measure import write
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

CONTEXT, TOKENS = 1024, 64


def tokens_per_s(model: Any, compiled: bool) -> float:
    """Batch-1 greedy decode behind a prompt of 1,024 tokens."""
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + 4 * TOKENS)
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if compiled else model.forward
    prompt = torch.arange(CONTEXT, device="cuda")[None] % 250
    position = torch.arange(CONTEXT, device="cuda")
    with torch.inference_mode():
        model(prompt, past_key_values=cache, cache_position=position, use_cache=True)
        token = torch.tensor([[5]], device="cuda")
        started = 0.0
        for index in range(2 * TOKENS):
            if index == TOKENS:  # the first half warms up
                torch.cuda.synchronize()
                started = time.perf_counter()
            position = torch.tensor([CONTEXT + index], device="cuda")
            output = step(token.clone(), past_key_values=cache, cache_position=position, use_cache=True)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
        torch.cuda.synchronize()
    return TOKENS / (time.perf_counter() - started)


def main() -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    result: dict[str, Any] = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        try:
            result[f"transformers_1b_{name}_tokens_per_s"] = round(tokens_per_s(model, compiled), 1)
        except Exception as error:  # a peer that does not run here is a fact about the peer
            result[f"transformers_1b_{name}_tokens_per_s"] = f"did not run: {type(error).__name__}: {error}"[:300]
    write(**result)


if __name__ == "__main__":
    main()
