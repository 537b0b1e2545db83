"""KVCache: the paged tensors, and how many blocks fit."""

from __future__ import annotations

import mmap
import sys

import torch
from torch import Tensor

from inferneo_core.cache_rows import row_elements
from inferneo_core.config import ModelConfig
from inferneo_core.errors import CacheTooSmall
from inferneo_core.ops.base import CacheLayer

HUGE_PAGE = 2**21
SCORE_ROWS = 256  # prompt rows whose logits exist at once: 131 MB at a vocabulary of 128k
VENDOR_SCRATCH_BYTES = 2**28  # a slab of dequantised weights, and cuBLAS's own


class KVCache:
    """Keys and values of every layer, in blocks of `block_size` tokens that any sequence may own.

    Args:
        config: the model's.
        num_blocks: blocks a layer.
        block_size: tokens a block.
        dtype, device: of the tensors; an int8 row holds its scale, too (cache_rows). On the CPU a block's pages are
            touched when it is first written. It holds its tokens' keys and values of all layers, so that a short
            context touches few pages and those can be huge.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_kv_heads, block_size, row_elements(config.head_dim, dtype))
        self.num_blocks = num_blocks
        self.block_size = block_size
        if device.type == "cpu":
            pages = _huge_pages(num_blocks * block_bytes(config, block_size, dtype))
            blocks = pages.view(dtype).view(num_blocks, config.num_layers, 2, *shape)
            self._data = blocks.permute(1, 2, 0, 3, 4, 5)  # [num_layers, 2, num_blocks, *shape]
        else:
            self._data = torch.empty(config.num_layers, 2, num_blocks, *shape, dtype=dtype, device=device)
        self.layers = tuple(CacheLayer(k=pair[0], v=pair[1]) for pair in self._data)

    @property
    def num_bytes(self) -> int:
        return self._data.nbytes


def _huge_pages(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] that begins on a huge page, of huge pages where the system gives them; touched on use."""
    if sys.platform != "linux":
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    start = -pages.data_ptr() % HUGE_PAGE
    return pages[start : start + num_bytes]


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    row_bytes = row_elements(config.head_dim, dtype) * dtype.itemsize
    return 2 * config.num_layers * config.num_kv_heads * block_size * row_bytes


def activation_bytes(config: ModelConfig, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Bytes that a GPU step's tensors take beside weights and cache, from above: what the cache must leave free."""
    qkv, gate_up = config.q_size + 2 * config.kv_size, 2 * config.intermediate_size
    a_token = 4 * (3 * config.hidden_size + qkv + config.q_size + gate_up + config.intermediate_size)
    a_row = 3 * 8 * config.vocab_size  # logits, and what the sampler keeps of them
    return max_num_batched_tokens * a_token + max(max_num_seqs, SCORE_ROWS) * a_row + VENDOR_SCRATCH_BYTES


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
        shorter = f", or lower max_model_len to {num_blocks * block_size} at most" if num_blocks else ""
        raise CacheTooSmall(
            f"the KV cache has {memory:,} bytes = {num_blocks} blocks of {block_size} tokens ({bytes_each:,} bytes "
            f"each), and one sequence of max_model_len {max_model_len} needs {blocks_per_seq} blocks = "
            f"{blocks_per_seq * bytes_each:,} bytes (raise Engine(kv_cache_memory=...){shorter})"
        )
    return min(num_blocks, max_num_seqs * blocks_per_seq)
