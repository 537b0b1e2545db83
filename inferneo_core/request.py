"""Request: one stream's state inside the engine, from its prompt to its last output."""

from __future__ import annotations

import logging
import time
from collections import deque

from inferneo_core.outputs import Completion, FinishReason, Logprob, Timings, TokenOutput
from inferneo_core.sequence import Sequence
from inferneo_core.stream_decoder import StreamDecoder

logger = logging.getLogger(__name__)


class Request:
    """What the engine knows of one stream. The consumer's handle is TokenStream; dropping that ends this.

    Args:
        sequence: its tokens and cache blocks.
        decoder: turns its tokens into text.
    """

    def __init__(self, sequence: Sequence, decoder: StreamDecoder) -> None:
        self.sequence = sequence
        self.decoder = decoder
        self.outputs: deque[TokenOutput] = deque()  # made, not yet consumed; bounded by max_tokens
        self.error: BaseException | None = None
        self.finish_reason: FinishReason | None = None
        self.arrived = time.perf_counter()
        self._prefill_started: float | None = None
        self._first_token: float | None = None
        self._last_token: float | None = None
        self._texts: list[str] = []
        self._logprobs: list[Logprob] = []
        self._prompt_logprobs: dict[int, Logprob] = {}

    @property
    def is_settled(self) -> bool:
        """Whether a consumer that asks now need not wait: there is an output, an error or the end."""
        return bool(self.outputs) or self.error is not None or self.finish_reason is not None

    def start_prefill(self) -> None:
        """The first step that works on the prompt begins."""
        if self._prefill_started is None:
            self._prefill_started = time.perf_counter()

    def accept(self, token_id: int, logprob: Logprob | None) -> None:
        """Turn the sequence's newest token, already appended, into an output."""
        now = time.perf_counter()
        self._last_token = now
        if self._first_token is None:
            self._first_token = now
        sequence, decoder = self.sequence, self.decoder
        text = decoder.push(token_id)
        reason = sequence.finish_reason
        if decoder.stopped:
            reason = "stop"
        elif reason is not None:
            text += decoder.flush()
        self._texts.append(text)
        wanted = sequence.params.logprobs
        if logprob is not None and wanted is not None:  # a batch reports as many as its greediest sequence asked for
            logprob = Logprob(logprob.token_id, logprob.logprob, logprob.rank, logprob.top[:wanted])
            self._logprobs.append(logprob)
        else:
            logprob = None
        output = TokenOutput(
            text=text,
            token_id=token_id,
            index=len(self._texts) - 1,
            logprob=None if logprob is None else logprob.logprob,
            top_logprobs=None if logprob is None else logprob.top,
            finish_reason=reason,
            timings=self._timings(),
        )
        self.outputs.append(output)
        self.finish_reason = reason

    def accept_prompt_logprobs(self, start: int, logprobs: list[Logprob]) -> None:
        """Store scores of prompt tokens from place `start` on; a recomputed prompt stores the same again."""
        self._prompt_logprobs.update(enumerate(logprobs, start))

    def end(self, error: BaseException | None) -> None:
        """End without another output: aborted, or failed with `error`."""
        self.error = error
        self.finish_reason = "abort"

    def log(self) -> None:
        """One line for the finished request; never its text."""
        timings = None if self._first_token is None else self._timings()
        logger.info(
            "request %d: prompt_tokens=%d cached_tokens=%d completion_tokens=%d ttft_ms=%s tokens_per_s=%s "
            "finish_reason=%s",
            self.sequence.seq_id,
            self.sequence.num_prompt_tokens,
            self.sequence.num_cached_tokens,
            len(self._texts),
            None if timings is None else f"{timings.ttft_ms:.1f}",
            None if timings is None else f"{timings.tokens_per_s:.1f}",
            self.finish_reason,
        )

    def _timings(self) -> Timings:
        assert self._prefill_started is not None and self._first_token is not None and self._last_token is not None
        queued_ms = (self._prefill_started - self.arrived) * 1e3
        prefill_ms = (self._first_token - self._prefill_started) * 1e3
        decode_s = self._last_token - self._first_token
        decoded = len(self._texts) - 1
        return Timings(
            queued_ms=queued_ms,
            prefill_ms=prefill_ms,
            ttft_ms=queued_ms + prefill_ms,
            decode_ms=decode_s * 1e3,
            tokens_per_s=decoded / decode_s if decode_s > 0.0 else 0.0,
            cached_tokens=self.sequence.num_cached_tokens,
        )

    def completion(self, *, as_read: bool) -> Completion:
        """Everything so far, as a Completion; unfinished streams count as aborted.

        Args:
            as_read: leave out what its consumer was not handed: how many outputs were made ahead of one that stopped
                is not its doing.
        """
        params, sequence = self.sequence.params, self.sequence
        num_unread = len(self.outputs) if as_read else 0
        num_tokens = len(self._texts) - num_unread
        prompt = tuple(sequence.token_ids[: sequence.num_prompt_tokens])
        prompt_logprobs: tuple[Logprob | None, ...] | None = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = (None, *(self._prompt_logprobs[i] for i in sorted(self._prompt_logprobs)))
        return Completion(
            text="".join(self._texts[:num_tokens]),
            token_ids=tuple(sequence.output_token_ids[:num_tokens]),
            finish_reason=self.finish_reason if self.finish_reason is not None and not num_unread else "abort",
            logprobs=None if params.logprobs is None else tuple(self._logprobs[:num_tokens]),
            prompt_token_ids=prompt,
            prompt_logprobs=prompt_logprobs,
            timings=None if self._first_token is None else self._timings(),
        )
