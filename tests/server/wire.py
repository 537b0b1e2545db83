"""Bytes of WebSockets and ends of connections, for what no client library would do."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from typing import Any

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
MASK = b"\x01\x02\x03\x04"


def upgrade(path: str, headers: str = "") -> bytes:
    """A WebSocket's opening request."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    ).encode()


def frame(payload: bytes | str | dict[str, Any], opcode: int = TEXT, *, fin: bool = True, reserved: int = 0) -> bytes:
    """One frame as a client sends it, masked. Source: RFC 6455, section 5.2."""
    if isinstance(payload, dict):
        payload = json.dumps(payload)
    data = payload.encode() if isinstance(payload, str) else payload
    if len(data) < 126:
        length = struct.pack("!B", 128 | len(data))
    elif len(data) < 65536:
        length = struct.pack("!BH", 128 | 126, len(data))
    else:
        length = struct.pack("!BQ", 128 | 127, len(data))
    masked = bytes(byte ^ MASK[i % 4] for i, byte in enumerate(data))
    return bytes([fin << 7 | reserved << 4 | opcode]) + length + MASK + masked


def open_websocket(server: Any, path: str, **options: Any) -> socket.socket:
    """A connection after its handshake."""
    connection: socket.socket = server.connect(**options)
    connection.sendall(upgrade(path))
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(1)
    assert answer.startswith(b"HTTP/1.1 101"), answer
    return connection


def read_frame(connection: socket.socket) -> tuple[int, bytes]:
    """The next frame's opcode and payload."""
    first, length = read_exactly(connection, 2)
    if length == 126:
        (length,) = struct.unpack("!H", read_exactly(connection, 2))
    elif length == 127:
        (length,) = struct.unpack("!Q", read_exactly(connection, 8))
    return first & 15, read_exactly(connection, length)


def read_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        piece = connection.recv(num_bytes - len(data))
        assert piece, f"the connection ended after {data!r}"
        data += piece
    return data


def close_code(connection: socket.socket) -> int:
    """The code that the server closes with; what it says before is skipped."""
    while True:
        opcode, payload = read_frame(connection)
        if opcode == CLOSE:
            return int.from_bytes(payload[:2], "big")


def reset(connection: socket.socket) -> None:
    """End a connection with RST: the other side learns of it with no word and no order."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def send_until_refused(connection: socket.socket, data: bytes, times: int) -> int:
    """Send the same again and again until the other side hangs up or the times are over; returns how often it went."""
    for number in range(times):
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(data)
            continue
        return number
    return times
