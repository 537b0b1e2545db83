"""POST /v1/chat/completions and /v1/completions: whole answers as JSON, streams as Server-Sent Events.

Source: the HTML standard, section 9.2 (Server-sent events); the OpenAI API for the events' contents.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from starlette.types import Receive, Scope, Send

from inferneo.server.body import ClientGone, read_request
from inferneo.server.errors import ApiError, from_exception
from inferneo.server.generation import Generation, Transport
from inferneo.server.metrics import RequestRecord
from inferneo.server.protocol import ChatCompletionRequest, CompletionRequest
from inferneo.server.security import error_response
from inferneo.server.service import Service

# ASCII only: some clients split lines at U+0085 or U+2028, which JSON would let stand, or cut between bytes.
encode_json: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":")).encode

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
)


class CompletionRoute:
    """One of the two paths, as an ASGI application: it sees the client leave from the first byte to the last.

    Args:
        service: generates, limits and counts.
        path: of this route, for the metrics.
        model: of its requests.
    """

    def __init__(self, service: Service, path: str, model: type[ChatCompletionRequest | CompletionRequest]) -> None:
        self._service = service
        self._path = path
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        with service.metrics.request(self._path) as record:
            reply = Reply(scope, receive, send)
            try:
                await service.lifecycle.run(self._answer(scope, receive, reply, record), reply.disconnected())
            except ClientGone:
                pass
            except Exception as exception:
                error = from_exception(exception)
                record.status = error.status
                await reply.fail(error)

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply, record: RequestRecord) -> None:
        service = self._service
        request = await read_request(self._model, scope, receive, service.settings)
        reply.request_is_read.set()
        transport: Transport = "sse" if request.stream else "http"
        generation = await Generation.start(service.engine, request, service.settings, transport=transport)
        record.generation = generation
        try:
            if request.stream:
                await self._stream(generation, reply)
            else:
                await reply.whole(await generation.result())
            record.status = 200
        finally:
            await generation.aclose()

    async def _stream(self, generation: Generation, reply: Reply) -> None:
        """One event a chunk, one write for all that are ready."""
        await reply.open_stream()
        observe_gap = self._service.metrics.observe_gap
        latest = None
        async for chunks in generation.batches():
            if not chunks:
                await reply.write(PING)
                continue
            now = time.perf_counter()
            if latest is not None:
                observe_gap(now - latest)
            latest = now
            await reply.write("".join([f"data: {encode_json(chunk)}\n\n" for chunk in chunks]).encode())
        await reply.write(DONE, more=False)


class Reply:
    """The response to one request, as far as it has been sent."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.request_is_read = asyncio.Event()
        self._is_open = False  # a stream has begun and not ended
        self._has_begun = False

    async def whole(self, content: dict[str, Any]) -> None:
        """Send a JSON answer."""
        body = encode_json(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._begin(200, headers)
        await self.write(body, more=False)

    async def open_stream(self) -> None:
        """Send the headers of an event stream."""
        await self._begin(200, list(STREAM_HEADERS))
        self._is_open = True

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece of the body; waits while the client does not read."""
        self._is_open &= more
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def fail(self, error: ApiError) -> None:
        """Say what went wrong: by the status, or as the last event of a stream that is under way."""
        if not self._has_begun:
            self._has_begun = True
            await error_response(error)(self._scope, self._receive, self._send)
        elif self._is_open:
            await self.write(f"data: {encode_json(error.to_json())}\n\n".encode() + DONE, more=False)

    async def disconnected(self) -> None:
        """Return when the client has hung up, or was cut off because it takes nothing."""
        await self.request_is_read.wait()  # until then what arrives is the request
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._has_begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
