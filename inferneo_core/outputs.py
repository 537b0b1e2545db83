"""What an engine gives back: TokenOutput while a stream runs, Completion when it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one stream's time went, so far. Milliseconds are wall-clock.

    Attributes:
        queued_ms: from stream() to the first step that works on the prompt.
        prefill_ms: from there to the first token.
        ttft_ms: time to first token: queued_ms + prefill_ms.
        decode_ms: from the first token to the latest.
        tokens_per_s: decode speed over the tokens after the first; 0.0 before there are two.
        cached_tokens: prompt tokens whose keys and values came from the prefix cache.
    """

    queued_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    tokens_per_s: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural-log probability under the raw logits.

    Attributes:
        token_id: the token.
        logprob: its log-probability.
        rank: 1 for the most likely token of its position; equal logits rank by lowest id.
        top: the most likely (token_id, logprob) pairs of that position, most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One generated token. A stream yields exactly one a token.

    Attributes:
        text: the text that this token completed; "" while text is held back for a stop string or an unfinished
            UTF-8 character, and for special tokens.
        token_id: the token.
        index: its place in the output, from 0.
        logprob: its log-probability under the raw logits; None unless SamplingParams.logprobs is set.
        top_logprobs: the most likely (token_id, logprob) pairs, as many as SamplingParams.logprobs asks.
        finish_reason: "stop" or "length" on the last output of a stream, otherwise None.
        timings: the stream's Timings up to this token.
    """

    text: str
    token_id: int
    index: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...] | None
    finish_reason: FinishReason | None
    timings: Timings


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    Attributes:
        text: the joined texts of the outputs.
        token_ids: the generated ids, an end-of-text token included.
        finish_reason: "stop" at an end-of-text token, stop id or stop string; "length" at max_tokens or
            max_model_len; "abort" when the stream was closed before its end.
        logprobs: one Logprob a generated token; None unless SamplingParams.logprobs is set.
        prompt_token_ids: the prompt as the model saw it.
        prompt_logprobs: None for the first token of the prompt, then one Logprob a token; None altogether unless
            SamplingParams.prompt_logprobs is set.
        timings: where the time went; None when the stream was closed before its first token.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[Logprob, ...] | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[Logprob | None, ...] | None
    timings: Timings | None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of an engine: gauges as they are now, counters since it was made.

    `free_blocks` excludes `cached_blocks` (unreferenced blocks that still hold a reusable prefix); their sum
    returns to `total_blocks` when no request is alive.
    """

    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    total_blocks: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    aborts: int
    tokens_per_s: float

    @property
    def prefix_hit_rate(self) -> float:
        """Prompt tokens found in the prefix cache over prompt tokens looked up; 0.0 before the first lookup."""
        return self.prefix_hit_tokens / self.prefix_query_tokens if self.prefix_query_tokens else 0.0
