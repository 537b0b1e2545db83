"""The tensors of one step: what the network reads (ModelInput) and what the sampler reads (SamplingBatch)."""

from __future__ import annotations

from dataclasses import dataclass

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


# Columns of SamplingBatch.floats and SamplingBatch.ints; csrc/sampler.h holds the same numbers.
INV_TEMPERATURE, TOP_P, MIN_P, TYPICAL_P, REPETITION, PRESENCE, FREQUENCY = range(7)
TOP_K, SEED, POSITION, CHOICE, COUNT_ROW = range(5)
NUM_FLOATS, NUM_INTS = 7, 5

PROMPT_BIT = 1 << 30  # in SamplingBatch.token_counts: the token stands in the prompt


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
    """

    floats: Tensor
    ints: Tensor
    token_counts: Tensor | None
    bias_start: Tensor | None
    bias_ids: Tensor | None
    bias_values: Tensor | None
    num_logprobs: int

    @property
    def num_seqs(self) -> int:
        return self.floats.shape[0]


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


def empty_sampling_batch(num_seqs: int, num_logprobs: int = -1) -> SamplingBatch:
    """A batch of `num_seqs` greedy rows without filters, penalties or biases."""
    floats = torch.zeros(num_seqs, NUM_FLOATS)
    floats[:, [TOP_P, TYPICAL_P, REPETITION]] = 1.0
    ints = torch.zeros(num_seqs, NUM_INTS, dtype=torch.int64)
    ints[:, COUNT_ROW] = -1
    return SamplingBatch(floats, ints, None, None, None, None, num_logprobs)
