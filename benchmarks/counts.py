"""What each verb must move and compute at the least, counted from its shapes: the numerator of every share.

Bytes: each operand read once and each result written once, as it is stored. Operations: a multiplication and an
addition count one each. A kernel that reads something twice moves more; the count does not, so its share falls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inferneo_benchmarks.models import Storage, weight_bytes

from inferneo_core.config import ModelConfig

ROPE_BYTES = 4  # cosines and sines are fp32
ID_BYTES = 8  # token ids, positions and slots are int64
LOGIT_BYTES = LOGPROB_BYTES = 4


@dataclass(frozen=True, slots=True)
class Count:
    """Attributes: num_bytes moved between memory and processor; num_operations of arithmetic."""

    num_bytes: int
    num_operations: int

    def __add__(self, other: Count) -> Count:
        return Count(self.num_bytes + other.num_bytes, self.num_operations + other.num_operations)

    def __mul__(self, times: int) -> Count:
        return Count(self.num_bytes * times, self.num_operations * times)


@dataclass(frozen=True, slots=True)
class SequenceWork:
    """One sequence's part of a step: query_len new tokens, and seq_len in the cache once they are stored."""

    query_len: int
    seq_len: int

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs that the causal mask leaves: the last query sees seq_len keys, the one before one less."""
        return self.query_len * self.seq_len - self.query_len * (self.query_len - 1) // 2


def product(num_tokens: int, num_rows: int, num_columns: int, type_: str) -> Count:
    """A weight read once and multiplied with num_tokens rows; the activations are their verbs' to count."""
    return Count(weight_bytes(num_rows, num_columns, type_), 2 * num_tokens * num_rows * num_columns)


def embed(config: ModelConfig, storage: Storage, num_tokens: int) -> Count:
    """Rows of the embedding, dequantised."""
    row = weight_bytes(1, config.hidden_size, storage.head or storage.weights)
    return Count(num_tokens * (ID_BYTES + row + config.hidden_size * storage.activation_bytes), 0)


def qkv_rope_store(config: ModelConfig, storage: Storage, num_tokens: int) -> Count:
    """Hidden states in; queries out; keys and values into the cache."""
    num_rows = config.q_size + 2 * config.kv_size
    norm = config.hidden_size * storage.activation_bytes
    a_token = (
        (config.hidden_size + config.q_size) * storage.activation_bytes
        + 2 * config.kv_size * storage.cache_bytes
        + config.head_dim * ROPE_BYTES
        + 2 * ID_BYTES  # position and slot
    )
    rotated = config.q_size + config.kv_size
    work = Count(norm + num_tokens * a_token, num_tokens * (3 * rotated + 4 * config.hidden_size))
    return work + product(num_tokens, num_rows, config.hidden_size, storage.weights)


def attention(config: ModelConfig, storage: Storage, sequences: Sequence[SequenceWork]) -> Count:
    """Queries and every key and value once in; attended values out. Two products a pair of tokens and head."""
    num_tokens = sum(sequence.query_len for sequence in sequences)
    num_cached = sum(sequence.seq_len for sequence in sequences)
    num_pairs = sum(sequence.num_pairs for sequence in sequences)
    num_bytes = 2 * num_cached * config.kv_size * storage.cache_bytes
    num_bytes += 2 * num_tokens * config.q_size * storage.activation_bytes
    return Count(num_bytes, 4 * num_pairs * config.q_size)


def linear_add(storage: Storage, num_tokens: int, num_rows: int, num_columns: int) -> Count:
    """x [num_tokens, num_columns] and the residual in, the sum out."""
    num_bytes = num_tokens * (num_columns + 2 * num_rows) * storage.activation_bytes
    return Count(num_bytes, num_tokens * num_rows) + product(num_tokens, num_rows, num_columns, storage.weights)


def gate_up_silu(config: ModelConfig, storage: Storage, num_tokens: int) -> Count:
    """Hidden states in, SiLU(gate) * up out."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    num_bytes = (hidden + num_tokens * (hidden + intermediate)) * storage.activation_bytes
    arithmetic = num_tokens * (4 * hidden + 5 * intermediate)  # norm; exp, add, divide and two products
    return Count(num_bytes, arithmetic) + product(num_tokens, 2 * intermediate, hidden, storage.weights)


def lm_head(config: ModelConfig, storage: Storage, num_rows: int) -> Count:
    """Hidden states of the rows that are sampled in, their fp32 logits out."""
    hidden, vocab_size = config.hidden_size, config.vocab_size
    num_bytes = (1 + num_rows) * hidden * storage.activation_bytes + num_rows * vocab_size * LOGIT_BYTES
    head = product(num_rows, vocab_size, hidden, storage.head or storage.weights)
    return Count(num_bytes, 4 * num_rows * hidden) + head


def sample(vocab_size: int, num_rows: int) -> Count:
    """Logits in, one id a row out; one comparison a logit."""
    return Count(num_rows * (vocab_size * LOGIT_BYTES + ID_BYTES), num_rows * vocab_size)


def score(vocab_size: int, num_rows: int, num_logprobs: int) -> Count:
    """Logits and targets in; a log-probability and a rank a row out, and so many listed tokens. A comparison, an
    exponential and an addition a logit."""
    listed = num_logprobs * (ID_BYTES + LOGPROB_BYTES)
    a_row = vocab_size * LOGIT_BYTES + ID_BYTES + LOGPROB_BYTES + ID_BYTES + listed
    return Count(num_rows * a_row, 3 * num_rows * vocab_size)


def step(config: ModelConfig, storage: Storage, sequences: Sequence[SequenceWork]) -> Mapping[str, Count]:
    """A whole step by verb, in the order of `model.py`; every sequence draws one token. Of the last layer, what comes
    behind its keys and values is counted for those it is drawn after alone."""
    num_tokens, num_rows = sum(sequence.query_len for sequence in sequences), len(sequences)
    hidden, before = config.hidden_size, config.num_layers - 1
    drawn_after = [SequenceWork(1, sequence.seq_len) for sequence in sequences]

    def added(count: int) -> Count:
        attended = linear_add(storage, count, hidden, config.q_size)
        return attended + linear_add(storage, count, hidden, config.intermediate_size)

    return {
        "embed": embed(config, storage, num_tokens),
        "qkv_rope_store": qkv_rope_store(config, storage, num_tokens) * config.num_layers,
        "attention": attention(config, storage, sequences) * before + attention(config, storage, drawn_after),
        "linear_add": added(num_tokens) * before + added(num_rows),
        "gate_up_silu": gate_up_silu(config, storage, num_tokens) * before + gate_up_silu(config, storage, num_rows),
        "lm_head": lm_head(config, storage, num_rows),
        "sample": sample(config.vocab_size, num_rows),
    }
