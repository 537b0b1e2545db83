"""uvicorn's connections with limits on what the application never sees: headers, pace, and silence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Literal, cast

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import Frame

from inferneo.server.errors import SERVER, TIMEOUT, ApiError
from inferneo.server.settings import ServerSettings

MAX_PIPELINED = 8  # requests of one connection that wait while it is still read, so that its end is seen
MAX_FRAGMENTS = 1024  # frames of one WebSocket message; empty ones would not count as bytes


class GuardedHttp(HttpToolsProtocol):
    """One HTTP connection: one of a limited number, each part of it limited in size and in time.

    uvicorn's own accepts endless headers and trailers, waits for the rest of a request for ever, keeps what a client
    does not read for ever, and turns surplus connections away without a word on when to come back.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        settings: ServerSettings,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._settings = settings
        self._receiving: Literal["nothing", "headers", "body"] = "nothing"
        self._bytes_outside_bodies = 0  # since the last piece of a body or end of headers
        self._answering: RequestResponseCycle | None = None  # self.cycle is the request that came last
        self._deadline: asyncio.TimerHandle | None = None
        self._backlog: Backlog

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        super().connection_made(transport)
        self._backlog = Backlog(transport, self.loop, self._settings.slow_reader_seconds)
        limit = self._settings.max_connections
        if len(self.connections) > limit:
            self._refuse(_too_many_connections(limit))
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._receiving == "nothing" and self._is_idle:
            self._expect_headers()
        self._bytes_outside_bodies += len(data)
        super().data_received(data)
        limit = self._settings.max_header_bytes
        if self._bytes_outside_bodies > limit:
            message = f"the request has more than {limit} bytes outside its body (send fewer headers)"
            self._refuse(ApiError(431, message, code="headers_too_large"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._receiving = "body"
        self._bytes_outside_bodies = 0
        self._forget_deadline()
        if not self.pipeline:
            self._answering = self.cycle
        elif len(self.pipeline) <= MAX_PIPELINED:
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._bytes_outside_bodies = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._receiving = "nothing"
        self._bytes_outside_bodies = 0
        self._forget_deadline()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._answering, _ = self.pipeline[-1]
        elif self._receiving == "body":  # which nobody reads any more
            self._set_deadline(self.transport.close)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._backlog.begin()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._backlog.end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        self._backlog.end()
        if self._answering is not None and self._answering is not self.cycle:  # uvicorn tells the last request only
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn's timer would keep a connection that was reset

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "the request is not valid HTTP/1.1", code="invalid_http"))

    @property
    def _is_idle(self) -> bool:
        return self._answering is None or self._answering.response_complete

    def _expect_headers(self) -> None:
        self._receiving = "headers"
        self._set_deadline(self._headers_too_slow)

    def _headers_too_slow(self) -> None:
        message = f"the headers took more than {self._settings.receive_seconds:g} s to arrive (send them at once)"
        self._refuse(ApiError(408, message, type=TIMEOUT, code="headers_too_slow"))

    def _set_deadline(self, action: Callable[[], None]) -> None:
        self._forget_deadline()
        self._deadline = self.loop.call_later(self._settings.receive_seconds, action)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, error: ApiError) -> None:
        """Answer below the application, unless that would run into another answer, and hang up."""
        if self.transport.is_closing():
            return
        self.logger.warning("%s: %s", self.client, error.message)
        in_headers = self._receiving != "body" and self._is_idle
        if in_headers or (self._answering is self.cycle and not self.cycle.response_started):
            self.transport.write(_whole_response(error))
        self.transport.close()


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """One WebSocket, which keeps no more than it must for a client that does not read, or never ends a message."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        settings: ServerSettings,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._slow_reader_seconds = settings.slow_reader_seconds
        self._late_pong = b""
        self._backlog: Backlog

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._backlog = Backlog(cast(asyncio.Transport, transport), self.loop, self._slow_reader_seconds)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._backlog.begin()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._backlog.end()
        pong, self._late_pong = self._late_pong, b""
        if pong and not self.transport.is_closing():
            self.transport.write(pong)

    def connection_lost(self, exc: Exception | None) -> None:
        self._backlog.end()
        super().connection_lost(exc)

    def handle_ping(self) -> None:
        pong = b"".join(self.conn.data_to_send())
        if self.writable.is_set():
            self.transport.write(pong)
        elif pong:  # RFC 6455, section 5.5.3: only the latest ping needs an answer
            self._late_pong = pong

    def handle_cont(self, event: Frame) -> None:
        super().handle_cont(event)
        if len(self.frames) >= MAX_FRAGMENTS:
            self.conn.fail(1008, f"a message has more than {MAX_FRAGMENTS} frames")
            self.handle_parser_exception()


class Backlog:
    """What a client has not taken yet. It may be slow, but takes something within `seconds`, or is cut off.

    What is kept is one write's: the writer waits from the first byte that stays behind. The kernel buffers enough.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._transport = transport
        self._loop = loop
        self._seconds = seconds
        self._num_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        transport.set_write_buffer_limits(high=0)

    def begin(self) -> None:
        """There is something now."""
        self._num_bytes = self._transport.get_write_buffer_size()
        self._timer = self._loop.call_later(self._seconds, self._check)

    def end(self) -> None:
        """All was taken, or nobody is left to take it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        if self._transport.get_write_buffer_size() < self._num_bytes:
            self.begin()
        else:
            self._transport.abort()


def _whole_response(error: ApiError) -> bytes:
    body = json.dumps(error.to_json()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers(),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[error.status] + lines.encode("latin-1") + b"\r\n" + body


def _too_many_connections(limit: int) -> ApiError:
    return ApiError(
        503,
        f"there are more than {limit} connections (try again later, or raise --max-connections)",
        type=SERVER,
        code="too_many_connections",
        should_retry=True,
        retry_after=1,
    )
