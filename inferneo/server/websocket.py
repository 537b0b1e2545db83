"""WebSockets at /v1/chat/completions and /v1/completions: a JSON request in, a JSON message a token out.

Requests follow one another on a connection. `{"type": "ping"}` is answered at any time, `{"type": "auth", "api_key":
...}` brings the key where a browser cannot set a header. An error is a message of its own; then the connection is
closed with 1008 (the client's fault), 1011 (ours) or 1012 (the server goes down). Only a request that comes while
another is being answered leaves it open.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

from starlette.types import Receive, Scope, Send

from inferneo.server.body import ClientGone
from inferneo.server.errors import ApiError, from_exception
from inferneo.server.generation import Generation
from inferneo.server.lifecycle import SHUTTING_DOWN
from inferneo.server.metrics import RequestRecord
from inferneo.server.protocol import ChatCompletionRequest, CompletionRequest, read_json, validate
from inferneo.server.security import AUTHENTICATED, is_key, wrong_key
from inferneo.server.service import Service
from inferneo.server.sse import encode_json

POLICY_VIOLATION, INTERNAL_ERROR, SERVICE_RESTART = 1008, 1011, 1012  # RFC 6455, section 7.4.1; the IANA registry


class WebSocketRoute:
    """One of the two paths, as an ASGI application.

    Args: as CompletionRoute.
    """

    def __init__(self, service: Service, path: str, model: type[ChatCompletionRequest | CompletionRequest]) -> None:
        self._service = service
        self._path = path
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})
        await Conversation(self._service, self._path, self._model, scope, receive, send).run()


class Conversation:
    """One connection."""

    def __init__(
        self,
        service: Service,
        path: str,
        model: type[ChatCompletionRequest | CompletionRequest],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self._service = service
        self._path = path
        self._model = model
        self._receive, self._send = receive, send
        self._is_authenticated: bool = scope[AUTHENTICATED]
        self._is_answering = False
        self._is_closed = False
        self._answers: set[asyncio.Task[None]] = set()  # more than one for the moment in which one ends

    async def run(self) -> None:
        """Take messages until the connection ends; what is being answered then is aborted."""
        try:
            while (message := await self._next_message()) is not None:
                await self._take(message)
        except ClientGone:
            pass
        finally:
            for task in self._answers:
                task.cancel()
            await asyncio.gather(*self._answers, return_exceptions=True)

    async def _next_message(self) -> dict[str, Any] | None:
        """The next WebSocket message; None when the connection has ended. A key is not waited for for ever."""
        limit = None if self._is_authenticated else self._service.settings.receive_seconds
        try:
            message = await asyncio.wait_for(self._receive(), limit)
        except asyncio.TimeoutError:
            await self._close_with(wrong_key(missing=True))
            return None
        return dict(message) if message["type"] == "websocket.receive" else None

    async def _take(self, message: dict[str, Any]) -> None:
        try:
            data = _parse(message)
            kind = data.get("type")
            if kind == "ping":
                await self._write({"type": "pong"})
            elif kind == "auth":
                await self._authenticate(data)
            elif not self._is_authenticated:
                raise wrong_key(missing=True)
            elif self._is_answering:
                await self._write(_with_request_id(_busy().to_json(), data))
            else:
                self._start_answer(data)
        except ApiError as error:
            await self._close_with(error)

    async def _authenticate(self, data: dict[str, Any]) -> None:
        key, given = self._service.settings.api_key, data.get("api_key")
        if key is not None and not is_key(given if isinstance(given, str) else None, key.encode()):
            raise wrong_key(missing=given is None)
        self._is_authenticated = True
        await self._write({"type": "authenticated"})

    def _start_answer(self, data: dict[str, Any]) -> None:
        self._is_answering = True
        task = asyncio.create_task(self._answer(data))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, data: dict[str, Any]) -> None:
        """One request, from its validation to its last message, or to the error that ends the connection."""
        with self._service.metrics.request(self._path) as record:
            try:
                await self._service.lifecycle.run(self._stream(data, record))
            except ClientGone:
                pass
            except Exception as exception:
                error = from_exception(exception)
                record.status = error.status
                with suppress(ClientGone):
                    await self._close_with(error, data)

    async def _stream(self, data: dict[str, Any], record: RequestRecord) -> None:
        service = self._service
        request = validate(self._model, data)
        generation = await Generation.start(service.engine, request, service.settings, transport="websocket")
        record.generation = generation
        observe_gap, latest = service.metrics.observe_gap, None
        try:
            async for chunks in generation.batches():
                now = time.perf_counter()
                if latest is not None and chunks:
                    observe_gap(now - latest)
                latest = now
                for chunk in chunks:  # none is a heartbeat; the protocol's own pings serve as that
                    await self._write(chunk)
            self._is_answering = False  # the client may send its next request in this moment
            record.status = 200
        finally:
            await generation.aclose()

    async def _write(self, message: dict[str, Any]) -> None:
        """Send one message; waits while the client does not read."""
        if not self._is_closed:
            await self._send_event({"type": "websocket.send", "text": encode_json(message)})

    async def _send_event(self, event: dict[str, Any]) -> None:
        """Send an ASGI event.

        Raises:
            ClientGone: there is no connection any more.
        """
        try:
            await self._send(event)
        except OSError:
            raise ClientGone from None

    async def _close_with(self, error: ApiError, request: dict[str, Any] | None = None) -> None:
        """Send an error, then close. Without the close, a client that ignores the error would wait for ever."""
        if self._is_closed:
            return
        await self._write(_with_request_id(error.to_json(), request or {}))
        self._is_closed = True
        code = POLICY_VIOLATION if error.status < 500 else INTERNAL_ERROR
        if error.code == SHUTTING_DOWN:
            code = SERVICE_RESTART
        await self._send_event({"type": "websocket.close", "code": code, "reason": error.code or error.type})


def _parse(message: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in a message.

    Raises:
        ApiError: it is binary, no JSON, or no object.
    """
    text = message.get("text")
    if text is None:
        raise ApiError(400, "the message is binary; a request is a text message with a JSON object", code="not_text")
    data = read_json(text)
    if not isinstance(data, dict):
        raise ApiError(400, f"the message is a JSON {type(data).__name__}; a request is a JSON object")
    return data


def _with_request_id(message: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """The message with the request's own name for itself, if it has one."""
    request_id = request.get("request_id")
    return {**message, "request_id": request_id} if isinstance(request_id, str) else message


def _busy() -> ApiError:
    return ApiError(
        409,
        "a request is being answered on this connection; they follow one another (wait for its last message, or open "
        "another connection)",
        code="request_in_progress",
    )
