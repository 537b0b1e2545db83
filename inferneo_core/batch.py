"""The tensors of one step: what the network reads (ModelInput) and what the sampler reads (SamplingBatch)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Which tokens of a step belong to which sequence, and where each sequence's cache lies.

    Attributes:
        query_start_loc: [num_seqs + 1] int32; sequence i owns tokens query_start_loc[i] to query_start_loc[i + 1].
        seq_lens: [num_seqs] int32; tokens in the cache once this step has stored its own.
        block_tables: [num_seqs, max_blocks] int32; a sequence's blocks in order; unused entries are 0.
        max_query_len: the longest query of the step, in tokens.
        max_seq_len: the longest sequence of the step, in tokens.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_seq_len: int

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    def to(self, device: torch.device) -> AttentionMetadata:
        """The same on another device."""
        return replace(
            self,
            query_start_loc=self.query_start_loc.to(device),
            seq_lens=self.seq_lens.to(device),
            block_tables=self.block_tables.to(device),
        )


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One step's tokens, those of all its sequences behind one another.

    Attributes:
        token_ids: [num_tokens] int64.
        positions: [num_tokens] int64; a token's place in its own sequence.
        slot_mapping: [num_tokens] int64; block * block_size + offset, where the token's key and value go.
        attention: AttentionMetadata.
        rows: [num_sampled] int64; the tokens after which the next one is drawn.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    attention: AttentionMetadata
    rows: Tensor

    def to(self, device: torch.device) -> ModelInput:
        """The same on another device."""
        return ModelInput(
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            slot_mapping=self.slot_mapping.to(device),
            attention=self.attention.to(device),
            rows=self.rows.to(device),
        )


# Columns of SamplingBatch.floats and SamplingBatch.ints; csrc/sampler.h holds the same numbers.
INV_TEMPERATURE, TOP_P, MIN_P, TYPICAL_P, REPETITION, PRESENCE, FREQUENCY = range(7)
TOP_K, SEED, POSITION, CHOICE, COUNT_ROW = range(5)
NUM_FLOATS, NUM_INTS = 7, 5

PROMPT_BIT = 1 << 30  # in SamplingBatch.token_counts: the token stands in the prompt
ALWAYS = 2**31 - 1  # in SamplingBatch.bias_steps: the bias never runs out


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """One row of sampling parameters a sequence, packed so that a step builds and copies two tensors, not twelve.

    Attributes:
        floats: [num_seqs, 7] fp32; columns INV_TEMPERATURE (1 / temperature; 0 is greedy), TOP_P, MIN_P, TYPICAL_P,
            REPETITION, PRESENCE, FREQUENCY.
        ints: [num_seqs, 5] int64; columns TOP_K (0 keeps all), SEED (64 bits), POSITION (the place in the sequence of
            the token to be drawn), CHOICE, COUNT_ROW (the row of token_counts; -1: no penalties).
        token_counts: [num_rows, vocab_size] int32; how often the sequence generated each token, plus PROMPT_BIT where
            its prompt holds it; None when no row has penalties.
        bias_start: [num_seqs + 1] int32; row i's biases are entries bias_start[i] to bias_start[i + 1]; None when no
            row has any.
        bias_ids: [num_biases] int32 token ids. An id may stand twice in a row; its biases add.
        bias_values: [num_biases] fp32; -inf forbids the token (how min_tokens withholds the ends of text).
        num_logprobs: how many of the most likely tokens to report a row; -1 reports no log-probability at all.
        has_filters: whether a row may have one (top-k, typical, top-p, min-p). A backend that knows on the host that
            none has can skip the search for cut-offs; True is always right.
        bias_steps: [num_biases] int32; how many draws, from this one on, each bias is there for. A draw itself does not
            look at them: `advance` does, between two draws that the host has no part in. None: there are no biases.
    """

    floats: Tensor
    ints: Tensor
    token_counts: Tensor | None
    bias_start: Tensor | None
    bias_ids: Tensor | None
    bias_values: Tensor | None
    num_logprobs: int
    has_filters: bool = True
    bias_steps: Tensor | None = None

    @property
    def num_seqs(self) -> int:
        return self.floats.shape[0]

    def to(self, device: torch.device) -> SamplingBatch:
        """The same on another device; token_counts stay where they are: they live beside the logits."""
        moved = {
            field: tensor.to(device)
            for field in ("floats", "ints", "bias_start", "bias_ids", "bias_values")
            if (tensor := getattr(self, field)) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """The chosen tokens of a step.

    Attributes:
        token_ids: [num_seqs] int64; -1 where no token can be drawn: a NaN among the logits, or every token forbidden.
        logprobs: [num_seqs] fp32 log-probabilities under the raw logits; None when the batch asked for none.
        ranks: [num_seqs] int64; 1 for the most likely token, ties by lowest id; None likewise.
        top_ids: [num_seqs, num_logprobs] int64, most likely first, ties by lowest id; None likewise.
        top_logprobs: [num_seqs, num_logprobs] fp32; None likewise.
    """

    token_ids: Tensor
    logprobs: Tensor | None = None
    ranks: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None

    def to_host(self) -> SampleOutput:
        """A copy in main memory; from a GPU into pinned memory, and complete only once the stream has come to it."""
        fields = (self.token_ids, self.logprobs, self.ranks, self.top_ids, self.top_logprobs)
        token_ids, *rest = (None if field is None else field.to("cpu", non_blocking=True) for field in fields)
        assert token_ids is not None
        return SampleOutput(token_ids, *rest)


@dataclass(frozen=True, slots=True)
class DecodeState:
    """What a decode step reads and `advance` moves on by one token: one row a sequence, at addresses that never change.

    A row to spare has seq_len 0 and slot -1: its token is computed, stored nowhere and read by nobody. Drawn tokens
    stay in the ring until it comes round, so that they can be copied to the host while the next step runs.

    Attributes:
        token_ids: [num_rows] int64; the token that each row computes.
        positions: [num_rows] int64; its place in the sequence.
        slot_mapping: [num_rows] int64; where its key and value go.
        seq_lens: [num_rows] int32; tokens in the cache once it is stored.
        block_tables: [num_rows, max_blocks] int32.
        sampling_ints: [num_rows, 5] int64; SamplingBatch.ints, of which POSITION moves on.
        token_counts: [max_num_seqs, vocab_size] int32; SamplingBatch.token_counts, where the drawn tokens are counted.
        bias_start: [num_rows + 1] int32; SamplingBatch.bias_start, all zeros where there are no biases.
        bias_values: [max_biases] fp32; SamplingBatch.bias_values, 0 once a bias has run out.
        bias_steps: [max_biases] int32; SamplingBatch.bias_steps as of step 0.
        ring: [ring_size, num_rows] int64; step i leaves its tokens in row i % ring_size.
        step: [1] int64; how many steps have been taken since the host wrote the state.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    sampling_ints: Tensor
    token_counts: Tensor
    bias_start: Tensor
    bias_values: Tensor
    bias_steps: Tensor
    ring: Tensor
    step: Tensor


def empty_sampling_batch(num_seqs: int, num_logprobs: int = -1) -> SamplingBatch:
    """A batch of `num_seqs` greedy rows without filters, penalties or biases."""
    floats = torch.zeros(num_seqs, NUM_FLOATS)
    floats[:, [TOP_P, TYPICAL_P, REPETITION]] = 1.0
    ints = torch.zeros(num_seqs, NUM_INTS, dtype=torch.int64)
    ints[:, COUNT_ROW] = -1
    return SamplingBatch(floats, ints, None, None, None, None, num_logprobs)
