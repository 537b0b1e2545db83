"""A real web server on a free port of the loopback, in a thread of its own; the tests' way to one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from inferneo.server.serve import Server, bind
from inferneo.server.service import Service
from inferneo.server.settings import ServerSettings
from inferneo_core import AsyncEngine

LIMIT_SECONDS = 60  # for anything that must happen; a test that waits so long fails


class LiveServer:
    """A running server.

    Attributes:
        engine: behind it; closed with it.
        settings: as it was started with.
        service: its parts.
        port, url, ws_url: where it listens.
        waited_for: how many requests its end waited for; empty where there were none.
    """

    def __init__(self, engine: AsyncEngine, settings: ServerSettings, *, send_buffer: int | None = None) -> None:
        self.engine = engine
        self.settings = settings
        self._listener = bind(settings)
        if send_buffer is not None:  # what the kernel keeps for a client that does not read
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.ws_url = f"ws://127.0.0.1:{self.port}"
        self._connections: list[socket.socket] = []
        self._started = threading.Event()
        self.waited_for: list[int] = []
        self.server = Server(engine, settings, self._started.set, self.waited_for.append)
        self.service: Service = self.server.config.app.state.service  # type: ignore[union-attr]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self.thread.start()
        assert self._started.wait(LIMIT_SECONDS), "the server did not start"

    def signal(self) -> None:
        """What SIGTERM does."""
        self.server.handle_exit(15, None)

    def stop(self) -> None:
        """Stop in order, and wait for that."""
        if not self.server.should_exit:
            self.signal()
        self.join()

    def join(self) -> None:
        """Wait for the server's end."""
        self.thread.join(LIMIT_SECONDS)
        self._listener.close()
        self.forget_connections()
        assert not self.thread.is_alive(), "the server did not end"

    def client(self, **arguments: Any) -> httpx.Client:
        """An HTTP client of this server, which no environment variable leads elsewhere."""
        arguments = {"base_url": self.url, "timeout": LIMIT_SECONDS, "trust_env": False, **arguments}
        return httpx.Client(**arguments)

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        """A bare connection, for what no HTTP client would send. Closed with the server at the latest."""
        connection = socket.socket()
        self._connections.append(connection)
        connection.settimeout(LIMIT_SECONDS)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def forget_connections(self) -> None:
        """Close every bare connection that was made so far, and keep none of them."""
        while self._connections:
            self._connections.pop().close()

    def exchange(self, *pieces: bytes) -> str:
        """What the server answers to these bytes until it hangs up."""
        with self.connect() as connection:
            for piece in pieces:
                connection.sendall(piece)
            return read_all(connection).decode()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once the condition holds."""
        pause, rounds = threading.Event(), int(LIMIT_SECONDS / 0.002)
        for _ in range(rounds):
            if condition():
                return
            pause.wait(0.002)
        raise AssertionError(f"it did not come about within {LIMIT_SECONDS} s")

    def wait_until_idle(self) -> None:
        """Return once no request is left and every block is free."""
        self.wait_until(lambda: self.service.lifecycle.num_requests == 0)
        self.wait_until(lambda: self.engine.stats().running == self.engine.stats().waiting == 0)
        stats = self.engine.stats()
        assert stats.free_blocks + stats.cached_blocks == stats.total_blocks


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other side hangs up, in order or not."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def post(path: str, body: str, headers: str = "") -> bytes:
    """A request's bytes."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(body.encode())}\r\n\r\n{body}"
    ).encode()


@contextmanager
def serving(engine: AsyncEngine, *, send_buffer: int | None = None, **settings: Any) -> Iterator[LiveServer]:
    """A server for the length of a block; afterwards it is idle, every block free, and its threads have ended."""
    settings = {"served_model_names": ("tiny",), "port": 0, "shutdown_seconds": 0.1, **settings}
    server = LiveServer(engine, ServerSettings(**settings), send_buffer=send_buffer)
    try:
        yield server
        if not server.server.should_exit:
            server.wait_until_idle()
    finally:
        server.stop()
    assert engine.is_closed
