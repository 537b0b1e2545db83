"""Streams over HTTP: one that is left is closed, which aborts its request; one that was cut short raises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from inferneo.client.sdk import httpx, openai

if TYPE_CHECKING:
    Chunk = ChatCompletionChunk | Completion

T = TypeVar("T")


class Progress:
    """Which answers of a stream began and which of them ended.

    Attributes:
        num_chunks: seen so far.
        num_finished: answers that ended.
        has_usage: a chunk told the number of tokens.
        closed: the consumer left the stream; whatever happens to its connection is no error any more.
    """

    def __init__(self) -> None:
        self.num_chunks = 0
        self.num_finished = 0
        self.has_usage = False
        self.closed = False
        self._open: set[int] = set()

    def see(self, chunk: Chunk) -> None:
        self.num_chunks += 1
        self.has_usage = self.has_usage or chunk.usage is not None
        for choice in chunk.choices:
            self._open.add(choice.index)
            if choice.finish_reason is not None:
                self._open.discard(choice.index)
                self.num_finished += 1

    @property
    def position(self) -> str:
        """How far it came, for messages about a stream that broke off."""
        return f"after {self.num_chunks} chunks and before the finish_reason"

    def check_finished(self, request: httpx.Request) -> None:
        """Raises openai.APIConnectionError where an answer lacks its end. To the SDK such a stream looks complete."""
        if not self.closed and (self._open or not self.num_finished):
            raise openai.APIConnectionError(
                message=f"the stream ended {self.position}: the server went away (send the request again)",
                request=request,
            )


def _translated(error: httpx.RequestError, request: httpx.Request) -> openai.APIConnectionError:
    """What httpx says about a broken stream, in the SDK's terms. From 3.0 on, the SDK does this itself."""
    if isinstance(error, httpx.TimeoutException):
        return openai.APITimeoutError(request=request)
    return openai.APIConnectionError(message=f"the stream broke: {error}", request=request)


def _chunks(stream: openai.Stream[Any], progress: Progress) -> Iterator[Any]:
    request = stream.response.request
    try:
        for chunk in stream:
            progress.see(chunk)
            yield chunk
            if progress.closed:
                return
        progress.check_finished(request)
    except httpx.RequestError as error:
        if not progress.closed:  # else another thread closed it while this one read
            raise _translated(error, request) from error
    except (httpx.StreamError, openai.APIConnectionError):
        if not progress.closed:
            raise
    finally:
        stream.close()


async def _async_chunks(stream: openai.AsyncStream[Any], progress: Progress) -> AsyncIterator[Any]:
    request = stream.response.request
    try:
        async for chunk in stream:
            progress.see(chunk)
            yield chunk
            if progress.closed:
                return
        progress.check_finished(request)
    except httpx.RequestError as error:
        if not progress.closed:
            raise _translated(error, request) from error
    except (httpx.StreamError, openai.APIConnectionError):
        if not progress.closed:
            raise
    finally:
        await stream.close()


class InferneoStream(openai.Stream[T], Generic[T]):
    """The chunks of an answer as they come.

    Leaving it closes it, and a closed stream aborts its request on the server: by `break`, `close()`, the end of a
    `with`, an exception in the loop, or by dropping it. After that it yields nothing more.

    Raises, while it is read:
        openai.APIError: the server reported an error in mid-stream.
        openai.APIConnectionError: the stream ended before its finish_reason.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._progress = Progress()
        # The SDK's generator holds the stream that it reads, and so would keep this one alive until the garbage
        # collector comes by: it reads a stream of its own, and dropping this one is noticed at once.
        self._iterator = _chunks(openai.Stream(**parts), self._progress)

    def __iter__(self) -> Iterator[T]:
        try:
            yield from self._iterator
        finally:
            self.close()

    def close(self) -> None:
        """Abort what is left of the answer and give the connection back. Idempotent; any thread may call it."""
        self._progress.closed = True
        super().close()

    def __del__(self) -> None:
        with suppress(Exception):  # half made, or at the interpreter's end
            self.close()


class AsyncInferneoStream(openai.AsyncStream[T], Generic[T]):
    """The chunks of an answer as they come: InferneoStream for asyncio.

    After a `break`, or when it is dropped, the event loop closes it with its next turn.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._progress = Progress()
        self._iterator = _async_chunks(openai.AsyncStream(**parts), self._progress)  # as in InferneoStream

    async def __aiter__(self) -> AsyncIterator[T]:
        try:
            async for chunk in self._iterator:
                yield chunk
        finally:
            await self.close()

    async def close(self) -> None:
        """Abort what is left of the answer and give the connection back. Idempotent."""
        self._progress.closed = True
        await super().close()

    def __del__(self) -> None:
        if hasattr(self, "_progress") and not self.response.is_closed:
            with suppress(RuntimeError):  # no loop runs any more, and the connections went with it
                asyncio.get_running_loop().create_task(self.response.aclose())


def checked(stream_cls: Any, replacement: type) -> Any:
    """`replacement[T]` for the SDK's `Stream[T]` of completions; what the engine does not serve stays as it is."""
    item = next(iter(get_args(stream_cls)), None)
    return replacement[item] if item in (ChatCompletionChunk, Completion) else stream_cls  # type: ignore[index]
