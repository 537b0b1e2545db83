"""uvicorn's connections with limits on what comes before a request reaches the application, and a way to cut them."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

from starlette.types import Scope
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.http11 import Request

from inferneo.server.errors import SERVER, TIMEOUT, ApiError
from inferneo.server.settings import ServerSettings

WRITE_BUFFER_BYTES = 2**14  # unsent bytes at which a writer waits; the kernel buffers more
ABORT = "inferneo.abort"  # the scope's entry for `cut`


class GuardedHttp(HttpToolsProtocol):
    """One HTTP connection: one of a limited number, its headers limited in size and in time.

    uvicorn's own accepts endless headers, waits for them for ever, and turns surplus connections away without a word
    on when to come back.
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
        self._header_bytes = 0
        self._in_headers = True
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        limit = self._settings.max_connections
        if len(self.connections) > limit:
            self._refuse(_too_many_connections(limit))
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        limit = self._settings.max_header_bytes
        if self._in_headers and self._header_bytes > limit and not self.transport.is_closing():
            message = f"the headers have more than {limit} bytes (send fewer)"
            self._refuse(ApiError(431, message, code="headers_too_large"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast("dict[str, Any]", self.scope)[ABORT] = self.transport.abort
        self._expect_headers()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._header_bytes = 0
        self._forget_deadline()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._in_headers = True
        self._forget_deadline()
        self._deadline = self.loop.call_later(self._settings.receive_seconds, self._headers_too_slow)

    def _headers_too_slow(self) -> None:
        if not self.transport.is_closing():
            message = f"the headers took more than {self._settings.receive_seconds:g} s to arrive (send them at once)"
            self._refuse(ApiError(408, message, type=TIMEOUT, code="headers_too_slow"))

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, error: ApiError) -> None:
        """Answer below the application, and hang up."""
        self.logger.warning("%s: %s", self.client, error.message)
        body = json.dumps(error.to_json()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error.headers(),
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[error.status] + lines.encode("latin-1") + b"\r\n" + body)
        self.transport.close()


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """One WebSocket, whose application can cut it."""

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):  # else the handshake failed; the application's task has yet to start
            cast("dict[str, Any]", self.scope)[ABORT] = self.transport.abort


def cut(scope: Scope) -> None:
    """Cut a connection now: what a stalled reader did not take would otherwise be kept for it.

    Under another web server than `inferneo serve`, whose connections these are not, it is left to that server.
    """
    if ABORT in scope:
        scope[ABORT]()


def _too_many_connections(limit: int) -> ApiError:
    return ApiError(
        503,
        f"there are more than {limit} connections (try again later, or raise --max-connections)",
        type=SERVER,
        code="too_many_connections",
        should_retry=True,
        retry_after=1,
    )
