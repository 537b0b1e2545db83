"""Attention in C++: against the reference on ragged batches, and the same bits however a sequence is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inferneo_core.batch import AttentionMetadata
from inferneo_core.cache_rows import to_rows
from inferneo_core.errors import ShapeError
from inferneo_core.ops.base import CacheLayer
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.torch_ops import TorchOps

# (query_len, seq_len) of each sequence: decodes, chunked prefills and whole prompts, about chunks of 256 keys.
RAGGED = ((1, 1), (300, 300), (1, 700), (3, 5), (1, 256), (1, 257), (17, 520), (40, 600), (2, 259))


class Sequences:
    """Random sequences in shuffled blocks of one cache, from which steps of any cut can be made."""

    def __init__(
        self, lens: tuple[tuple[int, int], ...], num_heads: int, num_kv_heads: int, head_dim: int, block_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(len(lens) * head_dim)
        max_blocks = max(-(-seq_len // block_size) for _, seq_len in lens)
        order = torch.randperm(max_blocks * len(lens), generator=generator)
        self.lens = lens
        self.tables = order.view(len(lens), max_blocks).int()
        shape = (max_blocks * len(lens), num_kv_heads, block_size, head_dim)
        k, v = (torch.randn(shape, generator=generator) for _ in range(2))
        self.cache = CacheLayer(to_rows(k, dtype), to_rows(v, dtype))
        self.q = [torch.randn(query_len, num_heads, head_dim, generator=generator) * 2 for query_len, _ in lens]

    def step(self, *parts: tuple[int, int, int]) -> tuple[Tensor, AttentionMetadata]:
        """Queries and metadata of a step that computes tokens [begin, end) of each (sequence, begin, end)."""
        q = torch.cat([self.q[seq][begin:end] for seq, begin, end in parts])
        starts = torch.tensor([0, *(end - begin for _, begin, end in parts)]).cumsum(0).int()
        seq_lens = torch.tensor([self.lens[seq][1] - self.lens[seq][0] + end for seq, _, end in parts]).int()
        tables = self.tables[[seq for seq, _, _ in parts]]
        return q, AttentionMetadata(starts, seq_lens, tables, int(starts.diff().max()), int(seq_lens.max()))

    def whole(self) -> tuple[Tensor, AttentionMetadata]:
        return self.step(*((seq, 0, query_len) for seq, (query_len, _) in enumerate(self.lens)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])  # bf16: test_bf16_cache.py
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(9, 3, 64, 16), (6, 2, 14, 4), (4, 4, 80, 5), (7, 1, 16, 16), (8, 2, 128, 32), (50, 1, 8, 1)],
)
def test_attention_matches_the_reference(
    cpu: CpuOps, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    lens = RAGGED if head_dim > 8 else ((1, 3), (2, 300))  # 50 heads a KV head: one token fills more than a tile
    sequences = Sequences(lens, num_heads, num_kv_heads, head_dim, block_size, dtype)
    q, metadata = sequences.whole()
    expected = TorchOps().attention(q.double(), sequences.cache, metadata)
    torch.testing.assert_close(cpu.attention(q, sequences.cache, metadata).double(), expected, rtol=1e-4, atol=5e-6)


def unwritten(dtype: torch.dtype) -> float:
    """What would make itself felt if it were read; an int8 row of it has a scale that is NaN."""
    return -1 if dtype == torch.int8 else float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_attention_reads_no_slot_that_was_never_written(cpu: CpuOps, dtype: torch.dtype) -> None:
    sequences = Sequences(((1, 19), (5, 5)), 6, 2, 64, 16, dtype)
    q, metadata = sequences.whole()
    expected = cpu.attention(q, sequences.cache, metadata)
    for seq, (_, seq_len) in enumerate(sequences.lens):
        last = sequences.tables[seq, (seq_len - 1) // 16]
        for side in (sequences.cache.k, sequences.cache.v):
            side[last, :, seq_len % 16 :] = unwritten(dtype)
            side[sequences.tables[seq, (seq_len - 1) // 16 + 1 :]] = unwritten(dtype)
    assert torch.equal(cpu.attention(q, sequences.cache, metadata), expected)


def pieces(query_len: int, size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, query_len)) for begin in range(0, query_len, size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [1, 7, 16, 64])
def test_attention_gives_the_same_bits_for_any_chunks(cpu: CpuOps, size: int, dtype: torch.dtype) -> None:
    sequences = Sequences(((70, 600), (1, 520)), 9, 3, 64, 16, dtype)
    q, metadata = sequences.whole()
    expected = cpu.attention(q, sequences.cache, metadata)[:70]
    chunks = [cpu.attention(*_with_cache(sequences, (0, *piece))) for piece in pieces(70, size)]
    assert torch.equal(torch.cat(chunks), expected)


def _with_cache(sequences: Sequences, *parts: tuple[int, int, int]) -> tuple[Tensor, CacheLayer, AttentionMetadata]:
    q, metadata = sequences.step(*parts)
    return q, sequences.cache, metadata


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_attention_gives_the_same_bits_for_any_batch(cpu: CpuOps, dtype: torch.dtype) -> None:
    sequences = Sequences(RAGGED, 9, 3, 64, 16, dtype)
    q, metadata = sequences.whole()
    together = cpu.attention(q, sequences.cache, metadata).split([query_len for query_len, _ in RAGGED])
    for seq, (query_len, _) in enumerate(RAGGED):
        assert torch.equal(cpu.attention(*_with_cache(sequences, (seq, 0, query_len))), together[seq])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("block_size", [1, 5, 24, 64])
def test_attention_gives_the_same_bits_for_any_block_size(cpu: CpuOps, block_size: int, dtype: torch.dtype) -> None:
    """Blocks of whole granules of 16 tokens are read in place, others are put together first."""
    sequences = Sequences(((1, 300), (70, 300)), 6, 2, 64, 16, dtype)
    q, metadata = sequences.whole()
    expected = cpu.attention(q, sequences.cache, metadata)
    max_blocks = -(-304 // block_size)
    sides = []
    for side in (sequences.cache.k, sequences.cache.v):
        rows = side[sequences.tables].transpose(2, 3).flatten(1, 2)[:, :300]  # [num_seqs, seq_len, num_kv_heads, dim]
        room = rows.new_full((2, max_blocks * block_size, *rows.shape[2:]), unwritten(dtype))
        room[:, :300] = rows
        sides.append(
            room.view(2 * max_blocks, block_size, *rows.shape[2:])
            .transpose(1, 2)
            .clone(memory_format=torch.contiguous_format)
        )
    tables = torch.arange(2 * max_blocks).view(2, max_blocks).int()
    assert torch.equal(cpu.attention(q, CacheLayer(*sides), replace(metadata, block_tables=tables)), expected)


@pytest.mark.parametrize("num_threads", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_attention_gives_the_same_bits_for_any_number_of_threads(
    cpu: CpuOps, num_threads: int, dtype: torch.dtype
) -> None:
    sequences = Sequences(RAGGED, 6, 2, 14, 4, dtype)
    q, metadata = sequences.whole()
    expected = cpu.attention(q, sequences.cache, metadata)
    assert torch.equal(CpuOps(num_threads).attention(q, sequences.cache, metadata), expected)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.block_tables.fill_(99), r"block_tables\[0\]\[0\] is 99; it is in \[0, 4\)"),
        (lambda m: m.block_tables.fill_(-1), r"block_tables\[0\]\[0\] is -1"),
        (lambda m: m.seq_lens.fill_(33), r"sequence 0 has 33 tokens; its block table has room for 32"),
        (lambda m: m.seq_lens.fill_(1), r"sequence 0 has 3 query tokens of 1"),
        (lambda m: m.query_start_loc.fill_(3), r"query_start_loc must rise from 0 to num_tokens \(6\)"),
    ],
)
def test_attention_refuses_metadata_that_leads_astray(
    spoil: Callable[[AttentionMetadata], object], message: str
) -> None:
    sequences = Sequences(((3, 20), (3, 32)), 2, 1, 8, 16)
    q, metadata = sequences.whole()
    spoil(metadata)
    with pytest.raises(ShapeError, match=message):
        CpuOps(1).attention(q, sequences.cache, metadata)
