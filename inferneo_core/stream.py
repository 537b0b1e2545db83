"""TokenStream: what Engine.stream returns."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from inferneo_core.outputs import Completion, FinishReason, TokenOutput
from inferneo_core.request import Request


class StreamDriver(Protocol):
    """What a stream needs of its engine."""

    def advance(self, request: Request) -> None:
        """Return once the request is settled, stepping the engine if nobody else does."""

    def abort(self, request: Request) -> None:
        """Ask for the request to be ended; never waits for a step."""

    def set_paused(self, request: Request, paused: bool) -> None:
        """Ask for the request to be paused or resumed; never waits for a step."""


class TokenStream:
    """An iterator over the TokenOutputs of one request, as they are generated.

    The consumer that lacks a token drives the engine for everybody, so streams may be read from as many threads as
    there are streams. Closing, leaving the `with` block, or dropping the stream aborts the request and frees its
    blocks:

        with engine.stream("Once upon a time") as stream:
            for token in stream:
                print(token.text, end="")
        print(stream.completion().finish_reason)

    Raises (from iteration):
        StepFailed: the step that this request was part of raised.
        EngineClosed: the engine was closed before the stream's end.
    """

    def __init__(self, driver: StreamDriver, request: Request) -> None:
        self._driver = driver
        self._request = request
        self._closed = False
        self._paused = False

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt as the model sees it."""
        sequence = self._request.sequence
        return tuple(sequence.token_ids[: sequence.num_prompt_tokens])

    @property
    def request_id(self) -> int:
        """The engine's number for this request, as in its log."""
        return self._request.sequence.seq_id

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the stream ended; None while it runs, or while there are outputs to read."""
        if self._closed:
            return self._request.finish_reason or "abort"  # a step in flight has yet to hear of it
        return None if self._request.outputs else self._request.finish_reason

    @property
    def is_settled(self) -> bool:
        """Whether the next read returns at once: there is an output, an error, or the end."""
        return self._closed or self._request.is_settled

    @property
    def num_unread(self) -> int:
        """Outputs that a read would return without waiting."""
        return 0 if self._closed else len(self._request.outputs)

    @property
    def has_ended(self) -> bool:
        """Whether no further output will be made; some may be left to read."""
        return self._closed or self._request.finish_reason is not None

    @property
    def is_paused(self) -> bool:
        """Whether `pause` was called and neither `resume` nor a read that found nothing since."""
        return self._paused

    def completion(self) -> Completion:
        """The whole answer so far; "abort" as finish_reason if the stream has not ended by itself.

        Of a stream that was closed, what was read before.
        """
        return self._request.completion(as_read=self._closed)

    def pause(self) -> None:
        """Stop generating until `resume` or the next read that finds nothing.

        The blocks may be taken for others; then they are computed again.
        """
        self._driver.set_paused(self._request, True)
        self._paused = True  # only now: a reader in another thread that sees it resumes, and must be the last word

    def resume(self) -> None:
        """Undo `pause`."""
        self._paused = False
        self._driver.set_paused(self._request, False)

    def close(self) -> None:
        """Abort the request unless it has ended. Thread-safe, idempotent, never waits for a step."""
        self._closed = True
        if self._request.finish_reason is None:
            self._driver.abort(self._request)

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenOutput:
        request = self._request
        while not self._closed:
            has_ended = request.finish_reason is not None  # asked first: a last output may arrive while we look for one
            if request.outputs:
                try:
                    return request.outputs.popleft()
                except IndexError:  # a second reader was faster
                    continue
            if has_ended:
                if request.error is not None:
                    raise request.error
                break
            if self._paused:
                self.resume()
            self._driver.advance(request)
        raise StopIteration

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
