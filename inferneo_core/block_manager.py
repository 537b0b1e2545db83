"""BlockManager: which block of the paged cache belongs to whom, and which holds a prefix worth keeping.

A block holds the keys and values of `block_size` tokens. At any moment it is one of three things:

    referenced   in the block table of one sequence, or of several that share a prefix
    cached       in no table, but full and hashed: the next prompt that starts alike revives it
    free         in no table, its content forgotten

Nothing is ever copied. A shared block is full, hence never written again; a sequence writes only blocks of its own.

Sources: PagedAttention, arXiv 2309.06180; hash-chained prefix caching as in vLLM's "Automatic Prefix Caching".
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict

from inferneo_core.sequence import Sequence


class BlockManager:
    """Hands out blocks, counts their references and remembers the content of full ones.

    A full block is known by SHA-256 of the hash of the block before it and of its own tokens. Equal hashes therefore
    mean equal tokens from position 0 on, also against a prompt made to collide, and one comparison of 32 bytes stands
    for the whole prefix. Nothing but the tokens enters the hash: a key and a value depend on nothing else.

    A block is hashed only once `commit` says that its tokens are accepted and stored. Where two sequences compute the
    same block at the same time, the first to commit is remembered and the other's is freed like an unhashed one.

    When no block is free, the cached block released longest ago is forgotten and reused. A sequence releases its tail
    first, so a prefix loses its end before its beginning: without the beginning, the end could not be found.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens a block.
        enable_prefix_caching: False forgets every block with its last reference.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        assert num_blocks >= 1, f"num_blocks is {num_blocks}"
        assert block_size >= 1, f"block_size is {block_size}"
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._tokens = struct.Struct(f"<{block_size}I")
        self._num_references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks  # of each referenced or cached block that has one
        self._blocks: dict[bytes, int] = {}  # the inverse of _hashes
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is the warmest
        self._cached: OrderedDict[int, None] = OrderedDict()  # released longest ago first

    @property
    def total_blocks(self) -> int:
        """Blocks in the cache."""
        return len(self._num_references)

    @property
    def free_blocks(self) -> int:
        """Blocks that hold nothing; cached blocks not counted."""
        return len(self._free)

    @property
    def cached_blocks(self) -> int:
        """Blocks that no sequence holds, kept for their content until they are needed."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that num_tokens tokens of one sequence fill or begin."""
        return -(-num_tokens // self.block_size)

    def slot(self, seq: Sequence, position: int) -> int:
        """Where in the cache the key and value of the sequence's token at `position` lie."""
        return seq.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def match_prefix(self, seq: Sequence) -> list[int]:
        """The referenced or cached blocks that hold the longest known prefix of the sequence, in order.

        Takes no reference. At least one token always remains to compute: the next one is drawn from its logits.
        """
        if not (self.enable_prefix_caching and seq.uses_prefix_cache):
            return []
        prefix: list[int] = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self._blocks.get(self._hash_of(seq, index))
            if block is None:
                break
            prefix.append(block)
        return prefix

    def allocate(self, seq: Sequence, num_tokens: int, *, headroom: int = 0) -> bool:
        """Grow the sequence's block table until it holds num_tokens tokens.

        An empty table begins with the sequence's known prefix, and num_computed_tokens says how long that was.

        Returns:
            False, with nothing changed, if fewer than `headroom` free and cached blocks would be left over.
        """
        prefix = [] if seq.block_table else self.match_prefix(seq)
        num_new = self.blocks_for(num_tokens) - len(seq.block_table) - len(prefix)
        num_revived = sum(self._num_references[block] == 0 for block in prefix)
        if num_new + num_revived + headroom > len(self._free) + len(self._cached):
            return False
        for block in prefix:  # before a new block is taken: that may evict, and must not evict these
            if self._num_references[block] == 0:
                del self._cached[block]
            self._num_references[block] += 1
        if prefix:
            seq.block_table.extend(prefix)
            seq.num_computed_tokens = len(prefix) * self.block_size
        for _ in range(num_new):
            seq.block_table.append(self._take_block())
        return True

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """Note that the keys and values of the sequence's first num_tokens tokens are accepted and in the cache.

        The blocks that this fills can be shared from now on.
        """
        first, end = seq.num_computed_tokens // self.block_size, num_tokens // self.block_size
        seq.num_computed_tokens = num_tokens
        if not self.enable_prefix_caching:
            return
        for index in range(first, end):
            block, block_hash = seq.block_table[index], self._hash_of(seq, index)
            if self._blocks.setdefault(block_hash, block) == block:
                self._hashes[block] = block_hash

    def free(self, seq: Sequence) -> None:
        """Release all blocks of the sequence, tail first; nothing of it counts as computed any more."""
        for block in reversed(seq.block_table):
            self._num_references[block] -= 1
            if self._num_references[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        seq.block_table = []  # a new list: whoever mirrors the table sees by it that this one is over
        seq.num_computed_tokens = 0

    def _take_block(self) -> int:
        """A block to write, referenced once: a free one, else the cached one released longest ago."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            block_hash = self._hashes[block]
            assert block_hash is not None
            del self._blocks[block_hash]
            self._hashes[block] = None
        self._num_references[block] = 1
        return block

    def _hash_of(self, seq: Sequence, index: int) -> bytes:
        """The chained hash of the sequence's full block `index`, computed once: accepted tokens never change."""
        hashes = seq.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            tokens = self._tokens.pack(*seq.token_ids[start : start + self.block_size])
            hashes.append(hashlib.sha256((hashes[-1] if hashes else b"") + tokens).digest())
        return hashes[index]
