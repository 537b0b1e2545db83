"""Sequence: one request on its way from its prompt to its last token."""

from __future__ import annotations

from collections import abc
from enum import Enum, auto

from inferneo_core.outputs import FinishReason
from inferneo_core.sampling_params import SamplingParams


class SequenceStatus(Enum):
    """Where a sequence stands. It holds blocks while RUNNING, and while PAUSED until somebody needs them."""

    WAITING = auto()
    RUNNING = auto()
    PAUSED = auto()
    FINISHED = auto()


class Sequence:
    """One prompt, the tokens drawn after it, and the blocks that hold their keys and values.

    Attributes:
        seq_id: unique; ids increase in the order of arrival, and the scheduler serves and preempts by them.
        params: SamplingParams of the request.
        max_tokens: tokens to generate at most, resolved: never None.
        seed: key of the draw, resolved: never None.
        choice: tells apart the draws of several answers to one prompt and seed.
        stop_ids: ids that end the sequence: the end-of-text ids, unless they are ignored, and params.stop_token_ids.
        token_ids: the prompt, then every accepted output token.
        num_prompt_tokens: how many of them are the prompt.
        status: SequenceStatus; the scheduler sets it.
        block_table: the blocks that hold its keys and values, in order of position; empty while it holds none.
        block_hashes: content hash of each full block of token_ids, as far as the block manager has needed them.
        num_computed_tokens: tokens whose keys and values are in the cache, from position 0.
        num_cached_tokens: prompt tokens that the prefix cache held when the sequence was first admitted.
        was_admitted: whether it has ever run; a preempted sequence keeps it.
        finish_reason: why it ended; None until then.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "choice",
        "finish_reason",
        "max_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "params",
        "seed",
        "seq_id",
        "status",
        "stop_ids",
        "token_ids",
        "was_admitted",
    )

    def __init__(
        self,
        seq_id: int,
        prompt_token_ids: abc.Sequence[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        seed: int,
        choice: int = 0,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        assert prompt_token_ids, "the prompt is empty"
        assert max_tokens >= 1, f"max_tokens is {max_tokens}"
        self.seq_id = seq_id
        self.params = params
        self.max_tokens = max_tokens
        self.seed = seed
        self.choice = choice
        self.stop_ids = stop_ids
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.status = SequenceStatus.WAITING
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.was_admitted = False
        self.finish_reason: FinishReason | None = None

    def __repr__(self) -> str:
        return (
            f"Sequence(seq_id={self.seq_id}, status={self.status.name}, num_prompt_tokens={self.num_prompt_tokens}, "
            f"num_output_tokens={self.num_output_tokens}, num_computed_tokens={self.num_computed_tokens}, "
            f"finish_reason={self.finish_reason!r})"
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens drawn so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens drawn so far, as a new list."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """Whether it has ended; finish_reason then says why."""
        return self.status is SequenceStatus.FINISHED

    @property
    def uses_prefix_cache(self) -> bool:
        """Whether it may start from cached blocks: not where every position of the prompt must be computed."""
        return self.params.prompt_logprobs is None

    def append(self, token_id: int) -> FinishReason | None:
        """Accept one drawn token; returns why the sequence ends with it, or None if it goes on.

        The token is "stop" if it is one of stop_ids and min_tokens are there, "length" if it is the last that
        max_tokens allows; "stop" where it is both.
        """
        self.token_ids.append(token_id)
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        if token_id in self.stop_ids and num_output_tokens >= self.params.min_tokens:
            return "stop"
        return "length" if num_output_tokens >= self.max_tokens else None
