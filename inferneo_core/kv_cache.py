"""KVCache: the paged tensors, and how many blocks fit."""

from __future__ import annotations

import torch

from inferneo_core.config import ModelConfig
from inferneo_core.errors import CacheTooSmall
from inferneo_core.ops.base import CacheLayer


class KVCache:
    """Keys and values of every layer, in blocks of `block_size` tokens that any sequence may own.

    Args:
        config: the model's.
        num_blocks: blocks a layer.
        block_size: tokens a block.
        dtype, device: of the tensors. On the CPU the pages of a block are touched when it is first written.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._data = torch.empty(shape, dtype=dtype, device=device)
        self.layers = tuple(CacheLayer(k=pair[0], v=pair[1]) for pair in self._data)

    @property
    def num_bytes(self) -> int:
        return self._data.nbytes


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size * dtype.itemsize


def num_blocks_for(
    memory: int, config: ModelConfig, *, block_size: int, dtype: torch.dtype, max_model_len: int, max_num_seqs: int
) -> int:
    """How many blocks the cache gets: what `memory` bytes hold, and no more than max_num_seqs whole sequences use.

    Raises:
        CacheTooSmall: one sequence of max_model_len tokens does not fit.
    """
    bytes_each = block_bytes(config, block_size, dtype)
    num_blocks = memory // bytes_each
    blocks_per_seq = -(-max_model_len // block_size)
    if num_blocks < blocks_per_seq:
        raise CacheTooSmall(
            f"the KV cache has {memory:,} bytes = {num_blocks} blocks of {block_size} tokens ({bytes_each:,} bytes "
            f"each), and one sequence of max_model_len {max_model_len} needs {blocks_per_seq} blocks = "
            f"{blocks_per_seq * bytes_each:,} bytes (raise Engine(kv_cache_memory=...), or lower max_model_len to "
            f"{num_blocks * block_size} at most)"
        )
    return min(num_blocks, max_num_seqs * blocks_per_seq)
