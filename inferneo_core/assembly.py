"""From a model's name and an EngineConfig to the parts of an engine: files, tokenizer, network, cache, backend."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from inferneo_core.batch_builder import BatchBuilder
from inferneo_core.block_manager import BlockManager
from inferneo_core.config import EngineConfig, ModelConfig
from inferneo_core.cpu_graph import CpuGraph
from inferneo_core.cuda_graphs import DecodeGraphs
from inferneo_core.errors import ConfigError, shown
from inferneo_core.kv_cache import KVCache, activation_bytes, block_bytes, num_blocks_for
from inferneo_core.loader import load_llama
from inferneo_core.memory import default_cache_memory, free_memory
from inferneo_core.ops import select_device, select_ops
from inferneo_core.ops.base import GraphOps, Ops
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.runner import ModelRunner
from inferneo_core.scheduler import Scheduler
from inferneo_core.tokenizer import Tokenizer
from inferneo_core.weights import ModelFiles, open_checkpoint, resolve
from inferneo_core.weights.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineParts:
    """Everything an Engine drives."""

    model_config: ModelConfig
    max_model_len: int
    tokenizer: Tokenizer
    runner: ModelRunner
    scheduler: Scheduler
    block_manager: BlockManager


def assemble(model: str | Path, config: EngineConfig) -> EngineParts:
    """Load a model and make the parts of its engine. Each phase's time is logged.

    Raises:
        ModelError: the model's files cannot be used.
        ConfigError: max_model_len is beyond the model, or the cache is too small for it.
        BackendUnavailable: the device or the backend is missing.
    """
    if not isinstance(model, (str, Path)):
        raise ConfigError(f"model is {shown(model)}; it is the path or the name of a model, a str or a Path")
    device = select_device(config.device)
    with _phase("found the model's files"):
        files = resolve(model)
    with _phase("read the tokenizer and the config"):
        checkpoint = open_checkpoint(files)
        model_config = read_config(files, checkpoint)
        tokenizer = _read_tokenizer(files, checkpoint)
    dtype = choose_dtype(config.dtype, checkpoint.dtype, device)
    max_model_len = _max_model_len(config.max_model_len, model_config)
    ops = select_ops(config.ops, device, dtype, num_threads=config.num_threads, batch_invariant=config.batch_invariant)
    cache_dtype = choose_cache_dtype(config, checkpoint.dtype, ops)
    _num_cache_blocks(config, model_config, cache_dtype, max_model_len, device)  # refuse before the load, not after
    try:
        with _phase(f"loaded {checkpoint.num_bytes:,} bytes of weights for ops={ops.name} dtype={dtype}"):
            llama = load_llama(checkpoint, model_config, ops, max_model_len)
    finally:
        checkpoint.close()
    num_blocks = _num_cache_blocks(config, model_config, cache_dtype, max_model_len, device)
    with _phase(f"made a KV cache of {num_blocks} blocks of {config.block_size} tokens"):
        cache = KVCache(model_config, num_blocks, config.block_size, cache_dtype, device)
    logger.info("the KV cache takes up to %s bytes on %s", f"{cache.num_bytes:,}", device)
    builder = BatchBuilder(
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        block_size=config.block_size,
        vocab_size=model_config.vocab_size,
        device=device,
    )
    limits = {"max_num_seqs": config.max_num_seqs, "max_model_len": max_model_len}
    graphs = DecodeGraphs(llama, cache, ops, builder.token_counts, **limits) if isinstance(ops, GraphOps) else None
    tape = CpuGraph(llama, cache, ops) if isinstance(ops, CpuOps) else None
    runner = ModelRunner(llama, cache, ops, builder, graphs, tape)
    if device.type == "cuda":
        with _phase("warmed up"):
            _warm_up(runner, config, max_model_len)
    block_manager = BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)
    return EngineParts(
        model_config=model_config,
        max_model_len=max_model_len,
        tokenizer=tokenizer,
        runner=runner,
        scheduler=Scheduler(
            block_manager, max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
        ),
        block_manager=block_manager,
    )


@contextmanager
def _phase(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    logger.info("%s in %.3f s", what, time.perf_counter() - started)


def read_config(files: ModelFiles, checkpoint: Checkpoint) -> ModelConfig:
    """The ModelConfig of a model's files, from config.json or the GGUF metadata.

    Raises:
        ModelError: the config cannot be used.
    """
    if files.format == "gguf":
        return ModelConfig.from_gguf(checkpoint.metadata(), checkpoint.names())
    return ModelConfig.from_hf(files.config())


def _read_tokenizer(files: ModelFiles, checkpoint: Checkpoint) -> Tokenizer:
    if files.format == "gguf":
        return Tokenizer.from_gguf(checkpoint.metadata())
    return Tokenizer.from_directory(files.directory)


def choose_dtype(wanted: str, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The model dtype: as wanted, or the checkpoint's own; quantised ones run in fp32 on a CPU, bf16 on a GPU."""
    if wanted != "auto":
        dtype = getattr(torch, wanted)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if stored is not None:
        return stored
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _warm_up(runner: ModelRunner, config: EngineConfig, max_model_len: int) -> None:
    """Run the first steps, the largest among them, while there is still somebody to tell that they do not fit.

    Raises:
        ConfigError: the device ran out of memory.
    """
    device, held = runner.ops.device, torch.cuda.memory_allocated(runner.ops.device)
    try:
        runner.warm_up(
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
        )
    except torch.OutOfMemoryError as error:
        steps = torch.cuda.max_memory_allocated(device) - held
        raise ConfigError(
            f"no step fits into the memory of {device}: weights take {held - runner.cache.num_bytes:,} bytes, "
            f"the KV cache {runner.cache.num_bytes:,}, activations more than {steps:,}, and {free_memory(device):,} "
            "are free (lower kv_cache_memory, max_num_batched_tokens or max_num_seqs)"
        ) from error


def choose_cache_dtype(config: EngineConfig, stored: torch.dtype | None, ops: Ops) -> torch.dtype:
    """The cache's dtype: as wanted, or as the checkpoint's, or the backend's own.

    CpuOps computes in fp32 whatever the weights are; a cache of fp32 would only double what a long context reads.

    Raises:
        ConfigError: the backend has no such cache.
    """
    if config.kv_cache_dtype == "int8" and ops.name == "triton":
        raise ConfigError(
            "kv_cache_dtype is 'int8'; ops='triton' keeps keys and values in float32, bfloat16 or float16 "
            "(use one of them, or ops='cpu' or 'torch')"
        )
    wanted = config.kv_cache_dtype if config.kv_cache_dtype != "auto" else config.dtype
    if wanted != "auto":
        dtype = getattr(torch, wanted)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if not isinstance(ops, CpuOps):
        return ops.dtype
    return torch.bfloat16 if stored is None else stored


def _num_cache_blocks(
    config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, max_model_len: int, device: torch.device
) -> int:
    free = free_memory(device)
    memory = config.kv_cache_memory
    if memory is None:
        steps = activation_bytes(model_config, config.max_num_batched_tokens, config.max_num_seqs)
        memory = max(default_cache_memory(device) - (steps if device.type == "cuda" else 0), 0)
    num_blocks = num_blocks_for(
        memory,
        model_config,
        block_size=config.block_size,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
    )
    needed = num_blocks * block_bytes(model_config, config.block_size, dtype)
    if needed > free:
        raise ConfigError(
            f"the KV cache would take {needed:,} bytes; {free:,} are free on {device} (lower kv_cache_memory, "
            f"max_model_len or max_num_seqs)"
        )
    return num_blocks


def _max_model_len(wanted: int | None, config: ModelConfig) -> int:
    limit = config.max_context_len
    if wanted is None:
        return limit
    if wanted > limit:
        raise ConfigError(f"max_model_len is {wanted}; the model's context length is {limit} (lower max_model_len)")
    return wanted
