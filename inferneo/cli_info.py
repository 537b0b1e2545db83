"""What a model is and the memory it needs, read from its headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferneo_core import ModelConfig
    from inferneo_core.weights import Checkpoint


def describe(model: str, context: int | None) -> Iterator[tuple[str, str]]:
    """(name, value) of each line that `inferneo info` prints. Headers are read; weights are not.

    Args:
        model: a name, as Engine takes it.
        context: tokens to count memory for; None takes the model's own limit.
    Raises:
        ModelError: the model's files cannot be used.
        ConfigError: context is beyond the model's limit.
        BackendUnavailable: what the model would run on is missing.
    """
    from inferneo_core import EngineConfig
    from inferneo_core.assembly import choose_cache_dtype, choose_dtype, read_config
    from inferneo_core.errors import ConfigError
    from inferneo_core.kv_cache import block_bytes
    from inferneo_core.ops import select_device, select_ops
    from inferneo_core.weights import open_checkpoint, resolve

    files = resolve(model)
    checkpoint = open_checkpoint(files)
    config = read_config(files, checkpoint)
    limit = config.max_context_len
    num_tokens = limit if context is None else context
    if num_tokens > limit:
        raise ConfigError(f"--context is {num_tokens}; the model's limit is {limit} tokens (lower --context)")
    device = select_device("auto")
    ops = select_ops("auto", device, choose_dtype("auto", checkpoint.dtype, device), num_threads=1)
    cache_dtype = choose_cache_dtype(EngineConfig(), checkpoint.dtype, ops)
    num_parameters = sum(prod(stored.shape) for stored in checkpoint.tensors.values())
    cache_bytes = num_tokens * block_bytes(config, block_size=1, dtype=cache_dtype)
    yield "model", str(checkpoint.source)
    yield "architecture", architecture(config)
    yield "context", f"{limit:,} tokens"
    yield "parameters", f"{num_parameters:,}"
    yield "stored", f"{in_units(checkpoint.num_bytes)} ({storage(checkpoint)})"
    yield "memory", f"{in_units(checkpoint.num_bytes + cache_bytes)} on {device}"
    yield "  weights", f"{in_units(checkpoint.num_bytes)}, as they are stored"  # both fast backends keep the types
    yield "  KV cache", f"{in_units(cache_bytes)} for {num_tokens:,} tokens, {str(cache_dtype).removeprefix('torch.')}"


def architecture(config: ModelConfig) -> str:
    """The sizes of a Llama in one line."""
    return (
        f"Llama, {config.num_layers} layers, hidden size {config.hidden_size:,}, {config.num_heads} heads of "
        f"{config.head_dim} ({config.num_kv_heads} for keys and values), MLP {config.intermediate_size:,}, "
        f"vocabulary {config.vocab_size:,}, RoPE {config.rope.kind}"
    )


def storage(checkpoint: Checkpoint) -> str:
    """The types that a checkpoint's bytes are stored as, the most used first: "Q4_1 88 %, Q8_0 12 %"."""
    bytes_by_type: Counter[str] = Counter()
    for stored in checkpoint.tensors.values():
        bytes_by_type[stored.type] += stored.num_bytes
    total = max(checkpoint.num_bytes, 1)
    return ", ".join(f"{name} {100 * size / total:.1f} %" for name, size in bytes_by_type.most_common())


def in_units(num_bytes: int) -> str:
    """Bytes in the largest binary unit that leaves at least one: "87.6 MiB"."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min((max(num_bytes, 1).bit_length() - 1) // 10, len(units) - 1)
    return f"{num_bytes / 1024**power:,.1f} {units[power]}" if power else f"{num_bytes} bytes"
