"""`websocket_chat`: a streamed chat completion over a WebSocket, with the chunks and the errors of the SDK."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from openai.types.chat import ChatCompletionChunk

from inferneo.client.sdk import openai

try:
    import websockets.asyncio.client
    import websockets.sync.client
    from websockets.exceptions import ConnectionClosed, WebSocketException
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("websockets"):  # or one that is too old for websockets.asyncio
        raise
    raise ModuleNotFoundError(
        "websocket_chat needs the package websockets (pip install 'inferneo[client]')", name="websockets"
    ) from None

from inferneo.client.exchange import Exchange  # which needs it as well


class WebSocketStream:
    """The chunks of one answer as they come. Leaving it aborts the request, as with InferneoStream.

    Raises, while it is read:
        openai.APIError: the server reported an error; one in the arguments is an openai.BadRequestError.
        openai.APIConnectionError: the connection ended before the answer.
    """

    _connection: websockets.sync.client.ClientConnection | None = None

    def __init__(self, client: openai.OpenAI, arguments: Mapping[str, Any]) -> None:
        client._refresh_api_key()
        self._exchange = Exchange(client, arguments)
        try:
            # Entered by hand: from 17.1 on, a connection that no `with` holds warns.
            connecting = websockets.sync.client.connect(self._exchange.url, **self._exchange.connect_options())
            self._connection = connecting.__enter__()
            self._connection.send(self._exchange.message)
        except (OSError, WebSocketException) as error:
            self.close()
            raise self._exchange.refused(error) from error

    def __iter__(self) -> Iterator[ChatCompletionChunk]:
        try:
            while (chunk := self._next()) is not None:
                yield chunk
        finally:
            self.close()

    def __next__(self) -> ChatCompletionChunk:
        chunk = self._next()
        if chunk is None:
            raise StopIteration
        return chunk

    def _next(self) -> ChatCompletionChunk | None:
        """The next chunk; None after the last one, or once closed."""
        exchange, connection = self._exchange, self._connection
        try:
            while connection is not None and not exchange.is_over:
                chunk = exchange.read(connection.recv(timeout=exchange.read_timeout))
                if chunk is not None:
                    return chunk
        except (TimeoutError, ConnectionClosed) as error:
            if exchange.progress.closed:  # by another thread, while this one read
                return None
            self.close()
            raise exchange.broken(error) from error
        except Exception:
            self.close()
            raise
        self.close()
        return None

    def close(self) -> None:
        """Abort what is left of the answer and close the connection. Idempotent; any thread may call it."""
        self._exchange.progress.closed = True
        if self._connection is not None:
            self._connection.close()

    def __enter__(self) -> WebSocketStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Whoever drops the last reference must not wait for a close frame; the server notices the end all the same.
        if self._connection is not None:
            with suppress(Exception):
                self._connection.socket.shutdown(socket.SHUT_RDWR)


class AsyncWebSocketStream:
    """The chunks of one answer as they come: WebSocketStream for asyncio. It connects when it is first read."""

    _connection: websockets.asyncio.client.ClientConnection | None = None
    _loop: asyncio.AbstractEventLoop

    def __init__(self, client: openai.AsyncOpenAI, arguments: Mapping[str, Any]) -> None:
        self._client = client
        self._exchange = Exchange(client, arguments)

    async def _open(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._client._refresh_api_key()
        options = self._exchange.connect_options()
        try:
            self._connection = await websockets.asyncio.client.connect(self._exchange.url, **options)
            await self._connection.send(self._exchange.message)
        except (OSError, asyncio.TimeoutError, WebSocketException) as error:
            await self.close()
            raise self._exchange.refused(error) from error

    async def __aiter__(self) -> AsyncIterator[ChatCompletionChunk]:
        try:
            while (chunk := await self._next()) is not None:
                yield chunk
        finally:
            await self.close()

    async def __anext__(self) -> ChatCompletionChunk:
        chunk = await self._next()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def _next(self) -> ChatCompletionChunk | None:
        """The next chunk; None after the last one, or once closed."""
        if self._connection is None and not self._exchange.progress.closed:
            await self._open()
        exchange, connection = self._exchange, self._connection
        try:
            while connection is not None and not exchange.is_over:
                chunk = exchange.read(await asyncio.wait_for(connection.recv(), exchange.read_timeout))
                if chunk is not None:
                    return chunk
        except (TimeoutError, asyncio.TimeoutError, ConnectionClosed) as error:
            if exchange.progress.closed:  # by another task, while this one read
                return None
            await self.close()
            raise exchange.broken(error) from error
        except Exception:
            await self.close()
            raise
        await self.close()
        return None

    async def close(self) -> None:
        """Abort what is left of the answer and close the connection. Idempotent."""
        self._exchange.progress.closed = True
        if self._connection is not None:
            await self._connection.close()

    async def __aenter__(self) -> AsyncWebSocketStream:
        if self._connection is None:
            await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if self._connection is not None:
            with suppress(RuntimeError):  # the loop is closed, and the connection with it
                self._loop.call_soon_threadsafe(self._connection.transport.abort)
