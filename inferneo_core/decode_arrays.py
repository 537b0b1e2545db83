"""DecodeArrays: the tensors of steps in which every sequence computes one token, written anew by each such step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inferneo_core.batch import NUM_INTS, POSITION, ModelInput, SamplingBatch
from inferneo_core.scheduler import ScheduledSequence
from inferneo_core.sequence import Sequence


class DecodeViews(NamedTuple):
    """The tensors of a step that decodes, over arrays that every such step writes."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    rows: Tensor


class DecodeArrays:
    """What differs between steps that decode, one entry a sequence.

    Where a step decodes the same sequences as the one before, nothing else differs but the blocks that they took since:
    `move_on` writes all that into the tensors that are there. Making a tensor costs 15 us in the cold cache that a step
    leaves behind, all tensors of a step 100 us.
    """

    def __init__(self, max_num_seqs: int, block_size: int) -> None:
        self._block_size = block_size
        self._token_ids, self._positions, self._slots = np.zeros((3, max_num_seqs), dtype=np.int64)
        self._seq_lens = np.zeros(max_num_seqs, dtype=np.int32)
        self._views = self._make_views(1)
        self._inputs: ModelInput | None = None  # of the step that `move_on` goes on from
        self._tables: list[tuple[Sequence, list[int]]] = []  # its sequences, each with its block table
        self._block_tables = np.zeros((0, 0), dtype=np.int32)  # as its tensor holds them
        self._num_blocks: list[int] = []  # of each, written there
        self._sampling_ints = np.zeros((0, NUM_INTS), dtype=np.int64)

    def views(self, num_seqs: int) -> DecodeViews:
        """The tensors of a step of `num_seqs` sequences; those of the last step where it had as many."""
        if num_seqs != len(self._views.rows):
            self._views = self._make_views(num_seqs)
        return self._views

    def _make_views(self, num_seqs: int) -> DecodeViews:
        return DecodeViews(
            token_ids=torch.from_numpy(self._token_ids[:num_seqs]),
            positions=torch.from_numpy(self._positions[:num_seqs]),
            slots=torch.from_numpy(self._slots[:num_seqs]),
            seq_lens=torch.from_numpy(self._seq_lens[:num_seqs]),
            query_start_loc=torch.arange(num_seqs + 1, dtype=torch.int32),
            rows=torch.arange(num_seqs),
        )

    def write(self, shares: tuple[ScheduledSequence, ...]) -> None:
        """Write each sequence's token, its position and slot, and its length."""
        size = self._block_size
        for i, (sequence, start, _, _) in enumerate(shares):
            self._token_ids[i] = sequence.token_ids[start]
            self._positions[i] = start
            self._slots[i] = sequence.block_table[start // size] * size + start % size
            self._seq_lens[i] = start + 1

    def keep(self, sequences: list[Sequence], inputs: ModelInput, sampling: SamplingBatch) -> None:
        """Remember a step that decodes; `move_on` may make the next one of its tensors."""
        self.forget()
        has_more = sampling.token_counts is not None or sampling.bias_start is not None or sampling.num_logprobs >= 0
        if not has_more:  # else more than the arrays' entries changes from draw to draw
            self._inputs = inputs
            self._tables = [(sequence, sequence.block_table) for sequence in sequences]
            self._block_tables = inputs.attention.block_tables.numpy()
            self._num_blocks = [len(sequence.block_table) for sequence in sequences]
            self._sampling_ints = sampling.ints.numpy()

    def forget(self) -> None:
        """The next step is to be made anew."""
        self._inputs = None
        self._tables = []

    def move_on(self, shares: tuple[ScheduledSequence, ...]) -> ModelInput | None:
        """The tensors of the last step, its sampler's too, if they can be those of this one: now they are.

        `inputs.attention.max_seq_len` stays what it was.
        """
        if self._inputs is None or len(shares) != len(self._tables):
            return None
        for i, ((sequence, _, num_tokens, samples), (last, table)) in enumerate(zip(shares, self._tables, strict=True)):
            if sequence is not last or num_tokens != 1 or not samples:
                return None
            # A table is another list once its sequence has lost its blocks; the same one may have grown.
            if last.block_table is not table or len(table) > self._block_tables.shape[1]:
                return None
            if len(table) != self._num_blocks[i]:
                self._block_tables[i, self._num_blocks[i] : len(table)] = table[self._num_blocks[i] :]
                self._num_blocks[i] = len(table)
        self.write(shares)
        for i, share in enumerate(shares):
            self._sampling_ints[i, POSITION] = share.start + 1
        return self._inputs
