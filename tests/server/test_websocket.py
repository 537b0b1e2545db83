"""Conversations over a WebSocket: requests one after another, and every way in which one can go wrong."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.sync.client import connect

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LIMIT_SECONDS = 60
REQUEST: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 9, "ignore_eos": True, "seed": 1}
CHAT_REQUEST = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 9,
    "ignore_eos": True,
    "seed": 1,
}


class Talk:
    """A client's side of a connection."""

    def __init__(self, server: Any, path: str = COMPLETIONS, **options: Any) -> None:
        self._opening = connect(f"{server.ws_url}{path}", proxy=None, **options)

    def __enter__(self) -> Talk:
        self.socket = self._opening.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._opening.__exit__(*exc_info)

    def send(self, message: Any) -> None:
        self.socket.send(message if isinstance(message, (str, bytes)) else json.dumps(message))

    def receive(self) -> Any:
        return json.loads(self.socket.recv(LIMIT_SECONDS))

    def answer(self, request: dict[str, Any]) -> list[Any]:
        """The messages that answer a request."""
        self.send(request)
        return self.rest()

    def rest(self) -> list[Any]:
        """The messages up to a finish_reason."""
        messages = [self.receive()]
        while messages[-1].get("choices", [{}])[0].get("finish_reason") is None:
            messages.append(self.receive())
        return messages

    def receive_for_ever(self) -> None:
        while True:
            self.receive()

    def close_code(self) -> int:
        """The code that the server closes with; fails if a message comes first."""
        with pytest.raises(ConnectionClosed) as closed:
            self.socket.recv(LIMIT_SECONDS)
        assert closed.value.rcvd is not None
        return int(closed.value.rcvd.code)


def text_of(messages: list[Any]) -> str:
    return "".join(message["choices"][0]["text"] for message in messages)


def test_chat_has_a_message_a_token_and_no_nulls(live_server: Any) -> None:
    with Talk(live_server(), CHAT) as talk:
        messages = talk.answer(CHAT_REQUEST)
    deltas = [message["choices"][0]["delta"] for message in messages]
    assert deltas[0] == {"role": "assistant"}
    assert deltas[-1] == {}
    assert [list(delta) for delta in deltas[1:-1]] == [["content"]] * 9
    assert "null" not in json.dumps(messages)
    assert all(message["choices"] for message in messages)


def test_answer_is_the_one_that_http_gives(live_server: Any) -> None:
    server = live_server()
    with Talk(server) as talk, server.client() as client:
        whole = client.post(COMPLETIONS, json=REQUEST).json()
        assert text_of(talk.answer({**REQUEST, "stream": True})) == whole["choices"][0]["text"]


def test_requests_follow_one_another_on_a_connection(live_server: Any) -> None:
    with Talk(live_server()) as talk:
        answers = [text_of(talk.answer({**REQUEST, "seed": seed % 2})) for seed in range(20)]
    assert answers == answers[:2] * 10
    assert answers[0] != answers[1]


def test_request_id_comes_back_in_every_message(live_server: Any) -> None:
    with Talk(live_server()) as talk:
        assert {message["request_id"] for message in talk.answer({**REQUEST, "request_id": "mine"})} == {"mine"}
        talk.send({**REQUEST, "request_id": "bad", "n": 0})
        error = talk.receive()
        assert (error["request_id"], error["error"]["param"]) == ("bad", "n")
        assert talk.close_code() == 1008


def test_second_request_in_mid_stream_is_an_error_that_ends_nothing(live_server: Any, halt: Any) -> None:
    server = live_server()
    halted = halt(server.engine._engine, 3)
    with Talk(server) as talk:
        talk.send(REQUEST)
        halted.reached()
        talk.send({**REQUEST, "request_id": "second"})
        talk.send({"type": "ping"})
        messages = [talk.receive() for _ in range(5)]
        (refusal,) = [message for message in messages if "error" in message]
        assert refusal["error"]["code"] == "request_in_progress"
        assert refusal["request_id"] == "second"
        assert {"type": "pong"} in messages
        halted.go()
        tokens = [message for message in messages if "choices" in message] + talk.rest()
        assert len(tokens) == 9
        assert text_of(talk.answer(REQUEST)) == text_of(tokens)


def test_key_that_nobody_asked_for_does_no_harm(live_server: Any) -> None:
    with Talk(live_server()) as talk:
        talk.send({"type": "auth", "api_key": "whatever"})
        assert talk.receive() == {"type": "authenticated"}
        assert len(talk.answer(REQUEST)) == 9


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"\x00\x01", "binary"),
        ("", "JSON"),
        ("{", "JSON"),
        ("[1]", "object"),
        ("null", "object"),
        ("[" * 100_000, "JSON"),
        ('{"model": "tiny"}', "prompt is missing"),
        ({**REQUEST, "model": "other"}, "not served"),
        ({**REQUEST, "n": 10**6}, "128"),
        ({**REQUEST, "temperature": "hot"}, "temperature"),
        ({**REQUEST, "tempreture": 1}, "did you mean temperature"),
        ({"type": "dance"}, "type"),
    ],
)
def test_bad_request_is_an_error_and_then_the_end(message: Any, words: str, live_server: Any) -> None:
    server = live_server()
    with Talk(server) as talk:
        talk.send(message)
        error = talk.receive()["error"]
        assert words in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert talk.close_code() == 1008
    with Talk(server) as talk:
        assert len(talk.answer(REQUEST)) == 9


def test_oversize_message_is_refused(live_server: Any) -> None:
    with Talk(live_server(max_body_bytes=1000)) as talk:
        talk.send(json.dumps(REQUEST).ljust(1001))
        assert talk.close_code() == 1009


def test_failed_step_closes_with_our_fault(live_server: Any, at_call: Any) -> None:
    server = live_server()
    at_call(server.engine._engine, lambda step: 1 / 0 if step == 5 else None)
    with Talk(server) as talk:
        talk.send(REQUEST)
        messages = [talk.receive() for _ in range(6)]
        assert messages[-1]["error"]["type"] == "server_error"
        assert talk.close_code() == 1011


def test_full_house_closes_with_the_reason(live_server: Any, halt: Any) -> None:
    server = live_server(engine={"max_num_seqs": 1}, max_queued=1)
    halted = halt(server.engine._engine, 2)
    with Talk(server) as first, Talk(server) as second, Talk(server) as third:
        first.send(REQUEST)
        halted.reached()
        second.send(REQUEST)
        server.wait_until(lambda: server.service.lifecycle.num_requests == 2)
        third.send(REQUEST)
        assert third.receive()["error"]["code"] == "queue_full"
        assert third.close_code() == 1008
        halted.go()
        assert len(first.rest()) == len(second.rest()) == 9


@pytest.mark.parametrize("way", ["close", "reset"])
def test_client_that_leaves_in_mid_stream_aborts_its_request(way: str, live_server: Any, halt: Any) -> None:
    server = live_server()
    halted = halt(server.engine._engine, 4)
    with Talk(server) as talk:
        talk.send({**REQUEST, "max_tokens": 400})
        halted.reached()
        if way == "close":
            talk.socket.close()
        else:
            talk.socket.socket.shutdown(socket.SHUT_RDWR)
        server.wait_until(lambda: server.service.lifecycle.num_requests == 0)
        steps = server.engine.stats().steps
        halted.go()
        server.wait_until_idle()
    assert server.engine.stats().aborts == 1
    assert server.engine.stats().steps <= steps + 1


def test_many_conversations_are_not_mixed_up(live_server: Any, background: Any) -> None:
    server = live_server(engine={"max_num_seqs": 8})

    def texts(seed: int) -> list[str]:
        with Talk(server) as talk:
            return [text_of(talk.answer({**REQUEST, "seed": 2 * seed + second})) for second in (0, 1)]

    alone = [texts(seed) for seed in range(16)]
    tasks = [background(texts, seed) for seed in range(16)]
    assert [task.result() for task in tasks] == alone


def test_client_that_reads_nothing_is_cut_off(live_server: Any) -> None:
    server = live_server(send_buffer=4096, max_unread_tokens=4, slow_reader_seconds=0.5)
    connection = server.connect(receive_buffer=4096)
    with Talk(server, sock=connection, max_queue=1) as talk:  # the client stops reading once its own queue is full
        talk.send({**REQUEST, "max_tokens": 200, "n": 8, "logprobs": 5})
        server.wait_until(lambda: server.engine.stats().aborts == 8)
        with pytest.raises(ConnectionClosedError):
            talk.receive_for_ever()


def test_upgrade_elsewhere_is_refused(live_server: Any) -> None:
    server = live_server()
    with pytest.raises(Exception, match="HTTP 403"):
        Talk(server, "/v1/models")
