"""WebSockets with broken, oversize, endless and unread frames; and readers that take nothing, over either transport."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from inferneo.server.connection import MAX_FRAGMENTS, Backlog

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REQUEST: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True, "seed": 1}
MAX_READ_BYTES = 2**18  # what one turn of the event loop takes from a socket
TEXT, PING = 1, 9


@pytest.fixture
def wire(beside: Callable[[str], Any]) -> Any:
    return beside("wire")


def unsent_bytes(server: Any) -> int:
    """What the server keeps for clients that do not read."""
    connections = list(server.server.server_state.connections)
    return sum(connection.transport.get_write_buffer_size() for connection in connections)


# Frames


@pytest.mark.parametrize(
    ("payload", "options", "code"),
    [
        (b"\xff\xfe", {}, 1007),
        (b"\xed\xa0\x80", {}, 1007),
        (b'{"prompt": "\\ud800"}', {}, 1008),
        (b"[" * 100_000, {}, 1008),
        (b"\x00" * 100, {"opcode": 2}, 1008),
        (b"x" * 3001, {}, 1009),
        (b"x" * 3001, {"opcode": 2}, 1009),
        (b"x", {"opcode": 0}, 1002),
        (b"x", {"opcode": 3}, 1002),
        (b"x", {"reserved": 4}, 1002),
        (b"x" * 126, {"opcode": PING}, 1002),
        (b"", {"opcode": PING, "fin": False}, 1002),
        (b"\x03", {"opcode": 8}, 1002),
    ],
)
def test_broken_frame_ends_the_connection(
    payload: bytes, options: dict[str, Any], code: int, hostile: Any, wire: Any
) -> None:
    limits = {"max_body_bytes": 3000} if len(payload) < 10_000 else {}
    with wire.open_websocket(hostile(**limits), CHAT) as connection:
        connection.sendall(wire.frame(payload, **options))
        assert wire.close_code(connection) == code


def test_unmasked_frame_ends_the_connection(hostile: Any, wire: Any) -> None:
    with wire.open_websocket(hostile(), CHAT) as connection:
        connection.sendall(b"\x81\x02{}")
        assert wire.close_code(connection) == 1002


def test_message_is_limited_over_all_its_frames(hostile: Any, wire: Any) -> None:
    with wire.open_websocket(hostile(max_body_bytes=3000), CHAT) as connection:
        connection.sendall(wire.frame(b"x" * 2000, fin=False) + wire.frame(b"x" * 1001, 0, fin=False))
        assert wire.close_code(connection) == 1009


def test_empty_frames_are_limited_too(hostile: Any, wire: Any) -> None:
    with wire.open_websocket(hostile(), CHAT) as connection:
        connection.sendall(wire.frame(b"", fin=False) + (MAX_FRAGMENTS - 1) * wire.frame(b"", 0, fin=False))
        assert wire.close_code(connection) == 1008


def test_request_may_come_in_frames_with_pings_between(hostile: Any, wire: Any) -> None:
    body = json.dumps(REQUEST).encode()
    with wire.open_websocket(hostile(), COMPLETIONS) as connection:
        connection.sendall(wire.frame(body[:9], fin=False) + wire.frame(b"?", PING) + wire.frame(body[9:], 0))
        opcodes = [wire.read_frame(connection)[0] for _ in range(5)]
    assert opcodes == [wire.PONG] + 4 * [wire.TEXT]


def test_broken_frame_in_mid_stream_aborts_the_request(hostile: Any, wire: Any, halt: Any) -> None:
    server = hostile()
    halted = halt(server.engine._engine, 3)
    with wire.open_websocket(server, COMPLETIONS) as connection:
        connection.sendall(wire.frame({**REQUEST, "max_tokens": 400}))
        halted.reached()
        connection.sendall(wire.frame(b"x", 3))
        assert wire.close_code(connection) == 1002
        server.wait_until(lambda: server.service.lifecycle.num_requests == 0)
        halted.go()
        server.wait_until_idle()
    assert server.engine.stats().aborts == 1


@pytest.mark.parametrize(
    "broken",
    ["Sec-WebSocket-Version: 12\r\n", "Sec-WebSocket-Key: AA==\r\n", "Sec-WebSocket-Key:\r\n"],
)
def test_broken_handshake_is_refused(broken: str, hostile: Any, wire: Any) -> None:
    name = broken.partition(":")[0].encode()
    kept = [line for line in wire.upgrade(CHAT).split(b"\r\n") if line and not line.startswith(name)]
    answer = hostile().exchange(b"\r\n".join([*kept, broken.encode(), b""]))
    assert answer.startswith(("HTTP/1.1 400", "HTTP/1.1 426"))


# Readers that take nothing


def test_pongs_that_nobody_reads_are_not_kept(hostile: Any, wire: Any) -> None:
    server = hostile(send_buffer=4096, slow_reader_seconds=0.5)
    with wire.open_websocket(server, COMPLETIONS, receive_buffer=4096) as connection:
        most = 0
        pings = wire.frame(b"p" * 125, PING) * 1000
        for _ in range(200):
            most = max(most, unsent_bytes(server))
            if not wire.send_until_refused(connection, pings, 1):
                break
        server.wait_until(lambda: not server.server.server_state.connections)  # cut off
    assert most <= 2 * MAX_READ_BYTES


def test_latest_ping_of_a_client_that_reads_late_is_answered(hostile: Any, wire: Any) -> None:
    server = hostile(send_buffer=4096)
    with wire.open_websocket(server, COMPLETIONS, receive_buffer=4096) as connection:
        connection.sendall(wire.frame({**REQUEST, "max_tokens": 200, "n": 8, "logprobs": 5}))
        server.wait_until(lambda: unsent_bytes(server) > 0)
        for number in range(9):
            connection.sendall(wire.frame(b"%d" % number, PING))
        while wire.read_frame(connection) != (wire.PONG, b"8"):
            pass


def test_whole_answer_that_nobody_takes_is_not_kept_for_ever(hostile: Any, beside: Any) -> None:
    """It was written, and its request was over, before anybody could see that nobody reads."""
    server = hostile(send_buffer=4096, slow_reader_seconds=0.5)
    request = {**REQUEST, "max_tokens": 200, "n": 4, "logprobs": 5}
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(beside("live").post(COMPLETIONS, json.dumps(request)))
        server.wait_until(lambda: server.engine.stats().generated_tokens == 800)
        server.wait_until(lambda: not server.server.server_state.connections)
        assert not beside("live").read_all(connection).endswith(b"}")


class FakeTransport:
    """A transport and its event loop, whose clock is the test's."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.is_aborted = False
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def set_write_buffer_limits(self, high: int) -> None:
        assert high == 0

    def get_write_buffer_size(self) -> int:
        return self.num_bytes

    def abort(self) -> None:
        self.is_aborted = True

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        assert delay == 30.0
        self.timers.append((delay, callback))
        return self

    def cancel(self) -> None:
        self.timers.clear()

    def pass_time(self) -> None:
        _, callback = self.timers.pop()
        callback()


def test_slow_reader_is_borne_as_long_as_it_takes_something() -> None:
    fake: Any = FakeTransport()
    backlog = Backlog(fake, fake, 30.0)
    fake.num_bytes = 10
    backlog.begin()
    while fake.num_bytes > 5:
        fake.num_bytes -= 1
        fake.pass_time()
    assert not fake.is_aborted
    backlog.end()
    assert not fake.timers
    backlog.begin()
    fake.pass_time()
    assert fake.is_aborted
