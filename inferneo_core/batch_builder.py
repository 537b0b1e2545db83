"""BatchBuilder: a ScheduledBatch as the tensors of one step.

What a sequence keeps from step to step (its block table, its parameter row, its penalty counts) lies in one row of
preallocated arrays and is only brought up to date, so a decode step costs little however long its sequences are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inferneo_core.batch import (
    ALWAYS,
    CHOICE,
    COUNT_ROW,
    NUM_FLOATS,
    NUM_INTS,
    POSITION,
    PROMPT_BIT,
    AttentionMetadata,
    ModelInput,
    SamplingBatch,
)
from inferneo_core.decode_arrays import DecodeArrays
from inferneo_core.scheduler import ScheduledBatch
from inferneo_core.sequence import Sequence

SPARE_BLOCKS = 16  # by which sequences that decode may grow before their batch's tensors are made anew


class _Row:
    """Where one sequence's state lies, and how far it is up to date."""

    __slots__ = ("bias", "block_table", "index", "num_blocks", "num_counted", "parameter_views", "table_view")

    def __init__(self, index: int) -> None:
        self.index = index
        self.block_table: list[int] | None = None  # the list that was copied; preemption gives a sequence a new one
        self.num_blocks = 0
        self.num_counted = 0  # tokens in the penalty counts, those that a step in flight will draw included
        self.bias: dict[int, float] | None = None
        # Tensors over this row of the arrays, made when the sequence is first alone in a batch.
        self.table_view: Tensor | None = None
        self.parameter_views: tuple[Tensor, Tensor] | None = None


class _Biases(NamedTuple):
    """SamplingBatch's fields of these names; all None where there are no biases."""

    bias_start: Tensor | None = None
    bias_ids: Tensor | None = None
    bias_values: Tensor | None = None
    bias_steps: Tensor | None = None


class BatchBuilder:
    """Builds ModelInput and SamplingBatch.

    Args:
        max_num_seqs: sequences a batch at most.
        max_model_len, block_size: tokens a sequence, and tokens a block.
        vocab_size: columns of the penalty counts.
        device: where the penalty counts lie. All other tensors are made on the host: `to(device)` moves them, or
            DecodeGraphs copies them where its graphs read.
    """

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._device = device
        self._rows: OrderedDict[int, _Row] = OrderedDict()  # by seq_id, least recently batched first
        self._max_rows = max_num_seqs
        self._positions = np.arange(max_model_len)
        self._block_of, self._place_of = np.divmod(self._positions, block_size)  # in the block table, and in the block
        self._block_tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)
        self._floats = np.zeros((max_num_seqs, NUM_FLOATS), dtype=np.float32)
        self._ints = np.zeros((max_num_seqs, NUM_INTS), dtype=np.int64)
        self._counts: Tensor | None = None  # [max_num_seqs, vocab_size] int32, made when a penalty is first asked for
        self._decode = DecodeArrays(max_num_seqs, block_size)
        self._decode_inputs: ModelInput | None = None  # of the step being built, if it decodes

    @property
    def token_counts(self) -> Tensor:
        """[max_num_seqs, vocab_size] int32 on the device: SamplingBatch.token_counts of every batch that has any."""
        if self._counts is None:
            self._counts = torch.zeros(self._max_rows, self._vocab_size, dtype=torch.int32, device=self._device)
        return self._counts

    def next_decode(self, batch: ScheduledBatch) -> ModelInput | None:
        """The ModelInput that `model_input` gave last, moved on to this step with its SamplingBatch; None where this
        step needs others. Its `attention.max_seq_len` stays what it was."""
        return self._decode.move_on(batch.sequences)

    def model_input(self, batch: ScheduledBatch) -> ModelInput:
        """The step's tokens, their slots, and which rows of the output are sampled. Valid until the next is built."""
        self._decode.forget()
        self._decode_inputs = None
        if batch.num_tokens == len(batch.sequences) and all(share.samples for share in batch.sequences):
            self._decode_inputs = self._decode_input(batch)
            return self._decode_inputs
        # Few functions: the first call of each costs 20 to 100 us in the cold cache that a step leaves behind.
        num_tokens, num_seqs = batch.num_tokens, len(batch.sequences)
        token_ids, positions, slots = (np.empty(num_tokens, dtype=np.int64) for _ in range(3))
        starts, seq_lens = np.zeros(num_seqs + 1, dtype=np.int32), np.empty(num_seqs, dtype=np.int32)
        sampled = np.empty(num_seqs, dtype=np.int64)
        rows: list[_Row] = []
        begin, num_sampled, max_query_len, max_seq_len = 0, 0, 0, 0
        for i, (sequence, start, count, samples) in enumerate(batch.sequences):
            row = self._row(sequence)
            end, behind = start + count, begin + count
            token_ids[begin:behind] = sequence.token_ids[start:end]
            positions[begin:behind] = self._positions[start:end]
            slots[begin:behind] = self._block_tables[row.index, self._block_of[start:end]]
            slots[begin:behind] *= self._block_size
            slots[begin:behind] += self._place_of[start:end]
            rows.append(row)
            starts[i + 1], seq_lens[i] = behind, end
            begin = behind
            if samples:
                sampled[num_sampled] = behind - 1
                num_sampled += 1
            max_query_len, max_seq_len = max(max_query_len, count), max(max_seq_len, end)
        # With the block of the token to be drawn, where there is one already: `advance` looks its slot up. A copy
        # that begins on a multiple of 16: Triton compiles anew for a pointer that does not.
        tables = self._block_tables[[row.index for row in rows], : max_seq_len // self._block_size + 1]
        return ModelInput(
            token_ids=torch.from_numpy(token_ids),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(slots),
            attention=AttentionMetadata(
                query_start_loc=torch.from_numpy(starts),
                seq_lens=torch.from_numpy(seq_lens),
                block_tables=torch.from_numpy(tables),
                max_query_len=max_query_len,
                max_seq_len=max_seq_len,
            ),
            rows=torch.from_numpy(sampled[:num_sampled]),
        )

    def _decode_input(self, batch: ScheduledBatch) -> ModelInput:
        """The same where every sequence computes one token and draws one: most steps, and the shortest."""
        rows = [self._row(share.sequence) for share in batch.sequences]
        self._decode.write(batch.sequences)
        views = self._decode.views(len(rows))
        max_seq_len = max(share.start for share in batch.sequences) + batch.num_steps
        # With the block of the token to be drawn, as in model_input, and room for those that the next steps take.
        tables = self._tables(rows, max_seq_len // self._block_size + 1 + SPARE_BLOCKS)
        attention = AttentionMetadata(views.query_start_loc, views.seq_lens, tables, 1, max_seq_len)
        return ModelInput(views.token_ids, views.positions, views.slots, attention, views.rows)

    def _tables(self, rows: list[_Row], num_blocks: int) -> Tensor:
        """[len(rows), num_blocks] int32: the block tables of these rows; of a single one, a view. No more columns than
        a sequence has blocks at most."""
        num_blocks = min(num_blocks, self._block_tables.shape[1])
        if len(rows) > 1:
            return torch.from_numpy(self._block_tables[[row.index for row in rows], :num_blocks])
        (row,) = rows
        if row.table_view is None or row.table_view.shape[1] != num_blocks:
            row.table_view = torch.from_numpy(self._block_tables[row.index : row.index + 1, :num_blocks])
        return row.table_view

    def sampling_batch(self, sequences: list[Sequence]) -> SamplingBatch:
        """One parameter row a sequence that draws a token in this step; call after `model_input`."""
        rows = [self._row(sequence) for sequence in sequences]
        for row, sequence in zip(rows, sequences, strict=True):
            self._ints[row.index, POSITION] = sequence.num_tokens
        floats, ints = self._parameters(rows)
        penalised = [(row, seq) for row, seq in zip(rows, sequences, strict=True) if seq.params.needs_penalties]
        self._count(penalised)
        wanted = [sequence.params.logprobs for sequence in sequences if sequence.params.logprobs is not None]
        sampling = SamplingBatch(
            floats=floats,
            ints=ints,
            token_counts=self.token_counts if penalised else None,
            num_logprobs=max(wanted, default=-1),
            has_filters=any(sequence.params.has_filters for sequence in sequences),
            **self._biases(rows, sequences)._asdict(),
        )
        if self._decode_inputs is not None:
            self._decode.keep(sequences, self._decode_inputs, sampling)
        return sampling

    def device_counts(self, sequences: Iterable[Sequence]) -> None:
        """Note that the device counts the token that each sequence is about to draw. To be called before its step is
        launched: a step that then does not come to its end leaves too much noted, and the sequence is counted anew."""
        for sequence in sequences:
            if sequence.params.needs_penalties:
                self._rows[sequence.seq_id].num_counted += 1

    def _parameters(self, rows: list[_Row]) -> tuple[Tensor, Tensor]:
        """SamplingBatch.floats and .ints of these rows; of a single one, views."""
        if len(rows) > 1:
            indices = [row.index for row in rows]
            return torch.from_numpy(self._floats[indices]), torch.from_numpy(self._ints[indices])
        (row,) = rows
        if row.parameter_views is None:
            this = slice(row.index, row.index + 1)
            row.parameter_views = torch.from_numpy(self._floats[this]), torch.from_numpy(self._ints[this])
        return row.parameter_views

    def _row(self, sequence: Sequence) -> _Row:
        """The sequence's row, its block table up to date."""
        row = self._rows.get(sequence.seq_id)
        if row is None:
            row = self._new_row(sequence)
        self._rows.move_to_end(sequence.seq_id)
        table = sequence.block_table
        if row.block_table is not table:
            row.block_table, row.num_blocks = table, 0
        if row.num_blocks < len(table):
            self._block_tables[row.index, row.num_blocks : len(table)] = table[row.num_blocks :]
            row.num_blocks = len(table)
        return row

    def _new_row(self, sequence: Sequence) -> _Row:
        if len(self._rows) < self._max_rows:
            row = _Row(len(self._rows))
        else:  # the least recently batched sequence is in no batch of this step; if it comes back it starts over
            row = _Row(self._rows.popitem(last=False)[1].index)
        self._rows[sequence.seq_id] = row
        params = sequence.params
        row.bias = dict(params.logit_bias) if params.logit_bias else None
        self._floats[row.index] = (
            1.0 / params.temperature if params.temperature > 0.0 else 0.0,
            params.top_p,
            params.min_p,
            params.typical_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        seed = sequence.seed & (2**64 - 1)
        signed_seed = seed - 2**64 if seed >= 2**63 else seed  # the 64 bits of the key, as torch stores them
        self._ints[row.index] = (min(params.top_k, self._vocab_size), signed_seed, 0, 0, -1)
        self._ints[row.index, CHOICE] = sequence.choice
        self._ints[row.index, COUNT_ROW] = row.index if params.needs_penalties else -1
        return row

    def _count(self, penalised: list[tuple[_Row, Sequence]]) -> None:
        """Bring sequences' penalty counts up to their accepted tokens. Those that the device has counted are; one whose
        counts hold a token that was drawn and not accepted is counted anew."""
        behind = [(row, seq) for row, seq in penalised if row.num_counted != seq.num_tokens]
        if not behind:
            return
        counts = self.token_counts
        places: list[int] = []
        for row, seq in behind:
            # An interrupt before the last line leaves nothing counted.
            num_counted, row.num_counted = row.num_counted, 0
            if not 0 < num_counted < seq.num_tokens:
                counts[row.index].zero_()
                num_counted = seq.num_prompt_tokens
                counts[row.index, torch.tensor(seq.token_ids[:num_counted], device=self._device)] = PROMPT_BIT
            places += [row.index * self._vocab_size + token_id for token_id in seq.token_ids[num_counted:]]
        if places:
            index = torch.tensor(places, device=self._device)
            counts.view(-1).index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        for row, seq in behind:
            row.num_counted = seq.num_tokens

    def _biases(self, rows: list[_Row], sequences: list[Sequence]) -> _Biases:
        """logit_bias, and -inf on the ends of text while min_tokens withholds them."""
        starts, ids, values, steps = [0], list[int](), list[float](), list[int]()
        for row, sequence in zip(rows, sequences, strict=True):
            if row.bias:
                ids += row.bias.keys()
                values += row.bias.values()
                steps += [ALWAYS] * len(row.bias)
            num_withheld = sequence.params.min_tokens - sequence.num_output_tokens
            if num_withheld > 0:
                ids += sequence.stop_ids
                values += [float("-inf")] * len(sequence.stop_ids)
                steps += [num_withheld] * len(sequence.stop_ids)
            starts.append(len(ids))
        if not ids:
            return _Biases()
        return _Biases(
            torch.from_numpy(np.array(starts, dtype=np.int32)),
            torch.from_numpy(np.array(ids, dtype=np.int32)),
            torch.from_numpy(np.array(values, dtype=np.float32)),
            torch.from_numpy(np.array(steps, dtype=np.int32)),
        )
