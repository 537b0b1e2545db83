"""Five hundred clients that leave at random moments: nothing of them stays behind."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferneo_core import Engine, SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
AT_ONCE = 12  # clients; the engine's batch holds a third of them
MAX_GROWTH_BYTES = 2**18  # of Python's own memory over 500 clients: half a KiB each would be seen; it is 14 KB
MAX_RSS_GROWTH_BYTES = 64 * 2**20  # the allocators' slack; 500 clients that each kept a request's buffers would pass it
PROMPT = "x" * 300  # five steps of prefill, at 64 tokens a step
REQUEST: dict[str, Any] = {"model": "tiny", "max_tokens": 80, "ignore_eos": True, "seed": 1}


class Storm:
    """Clients with seeded lives.

    Args:
        server: a LiveServer.
        live, wire: this folder's helpers.
        seed: of every choice.
    """

    def __init__(self, server: Any, live: Any, wire: Any, seed: int) -> None:
        self._server, self._live, self._wire = server, live, wire
        self._generator = random.Random(seed)
        self._open: list[socket.socket] = []

    def rage(self, num_clients: int) -> None:
        """So many clients come, a dozen of them there at once, and leave in an order of their own."""
        for _ in range(num_clients):
            if len(self._open) == AT_ONCE:
                self._leave(self._open.pop(self._generator.randrange(AT_ONCE)))
            self._open.append(self._come())
        while self._open:
            self._leave(self._open.pop())

    def _come(self) -> socket.socket:
        """A client that gets as far as it gets: into its request, to the prefill, or to some byte of its answer."""
        generator = self._generator
        path = generator.choice((CHAT, COMPLETIONS))
        prompt = PROMPT[: generator.choice((1, 40, 300))]
        given = {"prompt": prompt} if path == COMPLETIONS else {"messages": [{"role": "user", "content": prompt}]}
        request = {**REQUEST, **given, "n": generator.choice((1, 1, 3)), "stream": generator.random() < 0.8}
        if generator.random() < 0.5:
            connection = self._server.connect()
            data = self._live.post(path, json.dumps(request))
        else:
            connection = self._wire.open_websocket(self._server, path)
            data = self._wire.frame(request)
        if generator.random() < 0.2:
            connection.sendall(data[: generator.randrange(len(data))])
            return connection
        connection.sendall(data)
        for _ in range(generator.choice((0, 0, 1, 3 if request["stream"] else 1))):  # no answer is shorter than that
            assert connection.recv(generator.randrange(1, 600))
        return connection

    def _leave(self, connection: socket.socket) -> None:
        way = self._generator.randrange(4)
        if way == 0:
            self._wire.reset(connection)
        elif way == 1:
            connection.shutdown(socket.SHUT_WR)
            connection.close()
        else:  # with unread data, which makes it a reset, or without
            connection.close()


def held() -> tuple[int, int]:
    """Threads and file descriptors of this process."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def unlogged() -> Iterator[None]:
    """No log: pytest keeps every record until the test's end."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def test_five_hundred_clients_that_leave_change_nothing(
    live_server: Any, beside: Callable[[str], Any], chat_model: Path, unlogged: None
) -> None:
    server = live_server(engine={"max_num_seqs": 4, "max_num_batched_tokens": 64})
    storm = Storm(server, beside("live"), beside("wire"), seed=7)

    def calm() -> tuple[tuple[int, int], int, int]:
        server.wait_until_idle()
        server.wait_until(lambda: not server.server.server_state.connections)
        server.forget_connections()
        gc.collect()
        return held(), tracemalloc.get_traced_memory()[0], resident_bytes()

    tracemalloc.start()
    try:
        storm.rage(60)  # what is made once is made now
        (threads, descriptors), memory, resident = calm()
        storm.rage(500)
        (threads_after, descriptors_after), memory_after, resident_after = calm()
    finally:
        tracemalloc.stop()
    assert threads_after <= threads
    assert descriptors_after <= descriptors
    assert memory_after - memory < MAX_GROWTH_BYTES
    assert resident_after - resident < MAX_RSS_GROWTH_BYTES
    assert server.engine.stats().aborts >= 100  # it was a storm

    request = {**REQUEST, "prompt": "Hello", "max_tokens": 8}
    with server.client() as client:
        answer = client.post(COMPLETIONS, json=request).json()["choices"][0]["text"]
    with Engine(chat_model, kv_cache_memory=8 * 2**20, num_threads=1) as engine:
        (alone,) = engine.generate(["Hello"], SamplingParams(max_tokens=8, ignore_eos=True, seed=1))
    assert answer == alone.text
