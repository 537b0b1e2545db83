"""Clients that send too much, too slowly, out of turn or nonsense: answered or cut off, while others are served."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
POST_PATHS = [CHAT, COMPLETIONS, "/tokenize", "/detokenize"]
REQUEST: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True, "seed": 1}
HEAD = "Host: localhost\r\n"
HEALTH = f"GET /health HTTP/1.1\r\n{HEAD}\r\n".encode()


@pytest.fixture
def live(beside: Callable[[str], Any]) -> Any:
    return beside("live")


def error_of(answer: str, status: int) -> dict[str, Any]:
    """The error of a response with that status, of the API's shape, and its connection's last word."""
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} "), answer[:500]
    assert "connection: close" in head.lower()
    assert "x-should-retry: false" in head.lower()
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def chunk(piece: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(piece), piece)


def chunked(path: str, *pieces: bytes, connection: str = "close") -> bytes:
    """A request's head and as many chunks; the end is the caller's."""
    head = f"POST {path} HTTP/1.1\r\n{HEAD}Connection: {connection}\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"".join(map(chunk, pieces))


# Too much


@pytest.mark.parametrize(
    "start",
    [f"GET /health HTTP/1.1\r\n{HEAD}A: ", "GET /", f"GET {CHAT} HTTP/1.1\r\n{HEAD}Upgrade: websocket\r\nA: "],
)
def test_headers_beyond_the_limit_are_refused(start: str, hostile: Any) -> None:
    answer = hostile(max_header_bytes=2000).exchange(start.encode().ljust(2001, b"x"))
    assert error_of(answer, 431)["code"] == "headers_too_large"


@pytest.mark.parametrize("start", [b"0\r\nA: ", b"1;a=", b"0" * 9])
def test_trailers_and_chunk_extensions_count_as_headers(start: bytes, hostile: Any, live: Any) -> None:
    server = hostile(max_header_bytes=2000)
    with server.connect() as connection:
        connection.sendall(chunked(CHAT))
        server.wait_until(lambda: server.service.lifecycle.num_requests == 1)
        connection.sendall(start.ljust(2001, b"0"))
        assert error_of(live.read_all(connection).decode(), 431)["code"] == "headers_too_large"


def test_endless_headers_are_not_kept(hostile: Any, beside: Callable[[str], Any]) -> None:
    connection = hostile().connect()
    connection.sendall(b"GET /health HTTP/1.1\r\nA: ")
    assert beside("wire").send_until_refused(connection, b"x" * 2**16, 1000) < 1000


@pytest.mark.parametrize("path", POST_PATHS)
def test_hundred_megabytes_are_refused_and_never_kept(
    path: str, hostile: Any, live: Any, beside: Callable[[str], Any]
) -> None:
    server = hostile()
    announced = f"POST {path} HTTP/1.1\r\n{HEAD}Connection: close\r\nContent-Length: {100 * 2**20}\r\n\r\n"
    assert error_of(server.exchange(announced.encode()), 413)["code"] == "body_too_large"
    tracemalloc.start()
    try:
        for connection_header in ("close", "keep-alive"):  # is cut off; is read to the end, and thrown away
            connection = server.connect()
            connection.sendall(chunked(path, connection=connection_header))
            beside("wire").send_until_refused(connection, chunk(b"x" * 2**18), 400)
            connection.close()
        assert tracemalloc.get_traced_memory()[1] < 6 * server.settings.max_body_bytes
    finally:
        tracemalloc.stop()


# Too slow


@pytest.mark.parametrize("request_line", ["POST /no/such/route", f"DELETE {CHAT}", "GET /health"])
def test_body_that_nobody_reads_is_not_waited_for(request_line: str, hostile: Any) -> None:
    server = hostile(receive_seconds=0.1)
    answer = server.exchange(f"{request_line} HTTP/1.1\r\n{HEAD}Content-Length: 100\r\n\r\n{{".encode())
    assert answer.count("HTTP/1.1") == 1  # the answer comes at once, and nothing after it


def test_blank_lines_do_not_hold_a_connection(hostile: Any, live: Any) -> None:
    with hostile(receive_seconds=1.0).connect() as connection:
        connection.sendall(HEALTH)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\r\n")
        assert error_of(live.read_all(connection).decode(), 408)["code"] == "headers_too_slow"


@pytest.mark.parametrize("path", POST_PATHS)
def test_body_in_pieces_has_one_deadline(path: str, hostile: Any) -> None:
    answer = hostile(receive_seconds=0.1).exchange(chunked(path, b"{", b'"model"'))
    assert error_of(answer, 408)["type"] == "timeout_error"


# Out of turn


def test_pipelined_requests_are_answered_in_their_order(hostile: Any, live: Any) -> None:
    requests = [live.post(COMPLETIONS, json.dumps({**REQUEST, "request_id": f"number {i}"})) for i in range(20)]
    last = f"GET /v1/models HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n".encode()
    answer = hostile().exchange(b"".join([*requests, HEALTH, last]))
    assert answer.count("HTTP/1.1 200 OK") == 22
    places = [answer.index(f'"number {i}"') for i in range(20)]
    assert places == sorted(places)
    assert places[-1] < answer.index('{"status":"ok"}') < answer.index('"object":"list"')


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_its_pipelined_requests_aborts_the_first(
    stream: bool, hostile: Any, halt: Any, live: Any
) -> None:
    server = hostile()
    halted = halt(server.engine._engine, 3)
    connection = server.connect()
    request = {**REQUEST, "max_tokens": 400, "stream": stream}
    connection.sendall(live.post(COMPLETIONS, json.dumps(request)) + HEALTH)
    halted.reached()
    connection.close()
    server.wait_until(lambda: server.service.lifecycle.num_requests == 0)
    halted.go()
    server.wait_until_idle()
    assert server.engine.stats().aborts == 1


def test_nonsense_behind_a_request_does_not_get_into_its_answer(hostile: Any, halt: Any, live: Any) -> None:
    server = hostile()
    halted = halt(server.engine._engine, 3)
    with server.connect() as connection:
        connection.sendall(live.post(COMPLETIONS, json.dumps({**REQUEST, "max_tokens": 400, "stream": True})))
        halted.reached()
        connection.sendall(b"\x00nonsense\r\n\r\n")
        answer = live.read_all(connection)
        halted.go()
    assert answer.count(b"HTTP/1.1") == 1
    assert b"[DONE]" not in answer and b"error" not in answer


# Nonsense


@pytest.mark.parametrize(
    "request_text",
    [
        "\x00\x01\x02",
        "FETCH / HTTP/1.1\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "GET  HTTP/1.1\r\n\r\n",
        "CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        f"GET /health HTTP/1.1\r\n{HEAD}A\x00B: c\r\n\r\n",
        f"GET /health HTTP/1.1\r\n{HEAD}no colon\r\n\r\n",
        f"POST {CHAT} HTTP/1.1\r\n{HEAD}Content-Length: -1\r\n\r\n",
        f"POST {CHAT} HTTP/1.1\r\n{HEAD}Content-Length: {10**30}\r\n\r\n",
        f"POST {CHAT} HTTP/1.1\r\n{HEAD}Content-Length: 1\r\nContent-Length: 2\r\n\r\n{{}}",
        f"POST {CHAT} HTTP/1.1\r\n{HEAD}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{{}}",
        f"POST {CHAT} HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_apis_shape(request_text: str, hostile: Any) -> None:
    assert error_of(hostile().exchange(request_text.encode()), 400)["code"] == "invalid_http"


@pytest.mark.parametrize("path", POST_PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"tokens": [1e400]}',
        b"1" * 100_000,
        b"\x00" * 1000,
    ],
    ids=lambda body: str(body[:12]),
)
def test_body_that_is_no_json_is_refused_everywhere(path: str, body: bytes, hostile: Any) -> None:
    error = error_of(hostile().exchange(chunked(path, body) + b"0\r\n\r\n"), 400)
    assert error["type"] == "invalid_request_error"


def test_body_may_come_a_byte_at_a_time(hostile: Any) -> None:
    body = json.dumps(REQUEST).encode()
    answer = hostile().exchange(chunked(COMPLETIONS, *(bytes([byte]) for byte in body)) + b"0\r\nTrailer: x\r\n\r\n")
    assert answer.startswith("HTTP/1.1 200") and '"completion_tokens":4' in answer
