"""serve: the application on a socket, from the first request to an orderly end."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn

from inferneo.server.app import create_app
from inferneo.server.connection import GuardedHttp, GuardedWebSocket
from inferneo.server.lifecycle import Lifecycle
from inferneo.server.security import is_loopback
from inferneo.server.settings import ServerSettings
from inferneo_core import AsyncEngine
from inferneo_core.errors import ConfigError

IDLE_SECONDS = 75  # for a connection between requests: longer than clients and proxies keep theirs
LAST_CONNECTIONS_SECONDS = 5  # for connections to close, once no request is left


def bind(settings: ServerSettings) -> socket.socket:
    """The server's socket, bound but not yet listening: who connects before the model is loaded is turned away.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise _refused_address(settings, error) from error
    return listener


def _refused_address(settings: ServerSettings, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {settings.host}, port {settings.port}: {error.strerror or error} (choose others with "
        "--host and --port)"
    )


def serve(
    engine: AsyncEngine, settings: ServerSettings, listener: socket.socket, announce: Callable[[str], None]
) -> None:
    """Serve until SIGTERM or SIGINT; closes the engine and the socket.

    The first signal lets streams go on for `shutdown_seconds` and ends the rest with an error of their own; a second
    ends everything at once.

    Args:
        listener: from `bind`.
        announce: takes the lines that say where the server listens, who can reach it, and what its end waits for.
    """

    def on_started() -> None:
        for line in describe_address(settings, port=listener.getsockname()[1]):
            announce(line)

    def on_draining(num_requests: int) -> None:
        announce(describe_end(settings, num_requests))

    Server(engine, settings, on_started, on_draining).run(sockets=[listener])


class Server(uvicorn.Server):
    """uvicorn's server around an engine, with limits on its connections and an end that cuts no stream without a word.

    Args:
        engine: closed when the server ends.
        on_started: called once the server listens.
        on_draining: called with the number of requests that its end waits for, where there are any.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        settings: ServerSettings,
        on_started: Callable[[], None],
        on_draining: Callable[[int], None],
    ) -> None:
        app = create_app(engine, settings)
        config = uvicorn.Config(
            app,
            http=cast(Any, partial(GuardedHttp, settings=settings)),
            ws=cast(Any, partial(GuardedWebSocket, settings=settings)),
            ws_max_size=settings.max_body_bytes,
            ws_per_message_deflate=False,  # a message is one token: compressing it costs more than sending it
            lifespan="off",
            log_config=None,  # whoever starts the server says what is logged
            log_level="info",  # below it, every header is, and the key with them
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=LAST_CONNECTIONS_SECONDS,
        )
        super().__init__(config)
        self._engine = engine
        self._settings = settings
        self._lifecycle: Lifecycle = app.state.service.lifecycle
        self._on_started = on_started
        self._on_draining = on_draining

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        async with self._engine:
            await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or ():
            try:
                listener.listen(self.config.backlog)
            except OSError as error:  # a server that was bound to the same port meanwhile was faster
                raise _refused_address(self._settings, error) from error
        await super().startup(sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()  # takes no new connection while the old ones end
        if self._lifecycle.num_requests:
            self._on_draining(self._lifecycle.num_requests)
        await self._lifecycle.drain(self._settings.shutdown_seconds, hurry=lambda: self.force_exit)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks for the end, a second insists. Not raised again: an end that was asked for is none."""
        self.force_exit = self.should_exit
        self.should_exit = True


def describe_end(settings: ServerSettings, num_requests: int) -> str:
    """One line that says what the server's end waits for."""
    requests = "1 request" if num_requests == 1 else f"{num_requests} requests"
    return f"Waiting up to {settings.shutdown_seconds:g} s for {requests} to end (Ctrl-C again ends at once)"


def describe_address(settings: ServerSettings, port: int) -> Iterator[str]:
    """One line that says where the server listens; a second that warns if other machines can reach it."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}"
    page = f", the chat page at {url}/" if settings.show_ui else ""
    yield f"Serving {settings.model_name} at {url}/v1{page} (Ctrl-C stops)"
    if not is_loopback(settings.host):
        key = "with the API key" if settings.api_key is not None else "WITHOUT an API key (set one with --api-key)"
        yield f"warning: every machine that reaches {settings.host} can use this server, {key}"
