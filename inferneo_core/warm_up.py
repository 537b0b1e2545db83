"""Everything that serving may launch, launched once before: Triton compiles a kernel when it first meets it.

The kernels' configurations follow from the model's shapes and from a few thresholds in the number of tokens, so a
handful of sizes meets them all. What runs here computes rows that no one reads and stores nothing in the cache.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from inferneo_core.batch import AttentionMetadata, ModelInput, SamplingBatch, empty_sampling_batch
from inferneo_core.kv_cache import KVCache
from inferneo_core.model import Llama
from inferneo_core.ops.base import Ops

logger = logging.getLogger(__name__)

THRESHOLDS = (1, 2, 17, 65, 256)  # around the switch-overs of the linear kernels, and the slabs of prompt scores


@torch.inference_mode()
def warm_up(
    model: Llama, cache: KVCache, ops: Ops, *, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int
) -> None:
    """Run steps of every kind that is not captured: prefills, mixed steps, prompt scores, draws of every variety.

    Args:
        model, cache, ops: what a step runs.
        max_num_batched_tokens, max_num_seqs, max_model_len: the engine's limits.
    """
    started = time.perf_counter()
    vocab_size = model.head.out_features
    powers = itertools.takewhile(lambda size: size < max_num_batched_tokens, (2**i for i in range(31)))
    sizes = sorted({*(size for size in THRESHOLDS if size < max_num_batched_tokens), *powers, max_num_batched_tokens})
    for size in tqdm(sizes, desc="Compiling", unit="size", leave=False, disable=not sys.stderr.isatty()):
        for is_mixed in (False, True) if size > 2 else (False,):
            x = model.forward(ops, _step(size, is_mixed, cache.block_size, max_model_len, ops.device), cache)
        logits = ops.lm_head(x[: max(THRESHOLDS)], model.norm, model.head)
        ops.score(logits, torch.zeros(len(logits), dtype=torch.int64, device=ops.device), 1)
    compiled = time.perf_counter()
    logger.info("compiled steps of up to %d tokens in %.3f s", max_num_batched_tokens, compiled - started)
    for num_seqs in sorted({*(size for size in (1, 2, 17, 33, 65) if size < max_num_seqs), max_num_seqs}):
        rows = torch.zeros(num_seqs, dtype=torch.int64, device=ops.device)
        for sampling in _varieties(num_seqs, vocab_size, ops.device):
            ops.next_tokens(x, model.norm, model.head, rows, sampling)
    logger.info("compiled the sampler in %.3f s", time.perf_counter() - compiled)


def _step(num_tokens: int, is_mixed: bool, block_size: int, max_model_len: int, device: torch.device) -> ModelInput:
    """One prompt of so many tokens, or, mixed, a decode and a prompt; as many prompts as max_model_len makes it."""
    first = 1 if is_mixed else min(num_tokens, max_model_len)
    lengths = [first]
    while (left := num_tokens - sum(lengths)) > 0:
        lengths.append(min(left, max_model_len))
    longest = max(lengths)

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    attention = AttentionMetadata(
        query_start_loc=tensor([0, *itertools.accumulate(lengths)], torch.int32),
        seq_lens=tensor(lengths, torch.int32),
        block_tables=torch.zeros(len(lengths), -(-longest // block_size), dtype=torch.int32, device=device),
        max_query_len=longest,
        max_seq_len=longest,
    )
    zeros = [0] * num_tokens
    return ModelInput(tensor(zeros), tensor(zeros), tensor([-1] * num_tokens), attention, tensor([0]))


def _varieties(num_seqs: int, vocab_size: int, device: torch.device) -> list[SamplingBatch]:
    """Batches with and without filters, penalties, biases and log-probabilities, in every combination."""
    counts = torch.zeros(1, vocab_size, dtype=torch.int32, device=device)
    starts = torch.zeros(num_seqs + 1, dtype=torch.int32, device=device)
    ids, values = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, device=device)
    batches = []
    for has_filters, has_penalties, has_biases in itertools.product((False, True), repeat=3):
        for num_logprobs in (-1, 1):
            batch = empty_sampling_batch(num_seqs, num_logprobs).to(device)
            if has_biases:
                batch = replace(batch, bias_start=starts, bias_ids=ids, bias_values=values)
            batches.append(replace(batch, has_filters=has_filters, token_counts=counts if has_penalties else None))
    return batches
