"""Streams by Server-Sent Events over a real connection: their form, their errors, slow readers and lost ones."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REQUEST: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "stream": True, "ignore_eos": True, "seed": 1}


def events(text: str) -> Iterator[Any]:
    """The data of each event, "[DONE]" as it stands; comments are left out."""
    for block in text.split("\n\n")[:-1]:
        if not block.startswith(":"):
            assert block.startswith("data: ")
            yield block[6:] if block == "data: [DONE]" else json.loads(block[6:])


def test_stream_has_an_event_a_token_and_an_end(live_server: Any) -> None:
    with live_server().client() as client:
        response = client.post(COMPLETIONS, json={**REQUEST, "max_tokens": 20})
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        *chunks, done = events(response.text)
        assert done == "[DONE]"
        assert len(chunks) == 20
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 19 + ["length"]
        whole = client.post(COMPLETIONS, json={**REQUEST, "max_tokens": 20, "stream": False}).json()
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]


def test_stream_is_ascii_so_that_no_client_splits_it_wrongly(live_server: Any) -> None:
    with live_server().client() as client:
        for seed in range(4):  # random weights draw from all 256 bytes
            request = {**REQUEST, "max_tokens": 60, "seed": seed, "prompt": "a\u2028\x85\U0001f30d", "echo": True}
            response = client.post(COMPLETIONS, json=request)
            assert response.content.isascii()
            assert len(response.text.splitlines()) == 2 * len(list(events(response.text)))
            assert next(events(response.text))["choices"][0]["text"].startswith("a\u2028\x85\U0001f30d")


def test_chat_begins_with_the_role_and_ends_with_the_reason(live_server: Any) -> None:
    request = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "ignore_eos": True}
    request |= {"max_tokens": 7, "stream_options": {"include_usage": True}}
    with live_server().client() as client:
        first, *tokens, last, usage, done = events(client.post(CHAT, json=request).text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert all(isinstance(chunk["choices"][0]["delta"]["content"], str) for chunk in tokens)
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert usage["usage"]["completion_tokens"] == len(tokens) == 7
    assert done == "[DONE]"


def test_many_streams_are_neither_lost_nor_mixed_up(live_server: Any, background: Any) -> None:
    server = live_server(engine={"max_num_seqs": 8})
    with server.client() as client:

        def texts(seed: int) -> str:
            response = client.post(COMPLETIONS, json={**REQUEST, "max_tokens": 12, "seed": seed})
            return "".join(chunk["choices"][0]["text"] for chunk in list(events(response.text))[:-1])

        alone = [texts(seed) for seed in range(24)]
        tasks = [background(texts, seed) for seed in range(24)]
        assert [task.result() for task in tasks] == alone


def test_refusal_comes_before_the_stream(live_server: Any) -> None:
    with live_server().client() as client:
        response = client.post(COMPLETIONS, json={**REQUEST, "temperature": -1})
        assert response.status_code == 400
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-should-retry"] == "false"


def test_failed_step_is_an_event_and_then_the_end(live_server: Any, at_call: Any) -> None:
    server = live_server()

    def act(step: int) -> None:
        if step == 5:
            raise ValueError("mine")

    at_call(server.engine._engine, act)
    with server.client() as client:
        *chunks, error, done = events(client.post(COMPLETIONS, json={**REQUEST, "max_tokens": 50}).text)
        assert len(chunks) == 5
        assert error["error"]["type"] == "server_error"
        assert done == "[DONE]"
        assert client.post(COMPLETIONS, json={**REQUEST, "max_tokens": 50}).status_code == 200


def test_unforeseen_error_is_told_without_its_text(live_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = live_server()

    async def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("inner workings")

    monkeypatch.setattr("inferneo.server.sse.Generation.start", fail)
    with server.client() as client:
        response = client.post(COMPLETIONS, json=REQUEST)
        assert response.status_code == 500
        assert "inner workings" not in response.text
        assert "KeyError" in response.json()["error"]["message"]


def test_openai_sdk_raises_the_error_of_a_broken_stream(live_server: Any, at_call: Any) -> None:
    server = live_server()
    at_call(server.engine._engine, lambda step: 1 / 0 if step == 5 else None)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as client:
        stream = client.completions.create(model="tiny", prompt="Hi", max_tokens=50, stream=True)
        with pytest.raises(openai.APIError, match="ZeroDivisionError"):
            list(stream)


def test_queued_stream_gets_heartbeats(live_server: Any, halt: Any, beside: Any, background: Any) -> None:
    server = live_server(engine={"max_num_seqs": 1}, heartbeat_seconds=0.01)
    halted = halt(server.engine._engine, 2)
    with server.client() as client, server.connect() as queued:
        running = background(lambda: client.post(COMPLETIONS, json={**REQUEST, "max_tokens": 5}))
        halted.reached()
        body = json.dumps({**REQUEST, "max_tokens": 3})
        queued.sendall(beside("live").post(COMPLETIONS, body, "Connection: close\r\n"))
        received = b""
        while received.count(b": ping\n\n") < 3:
            received += queued.recv(65536)
        assert b"data:" not in received
        halted.go()
        rest = beside("live").read_all(queued)
        assert rest.count(b"data: ") == 4
        assert running.result().status_code == 200


@pytest.mark.parametrize("seed", range(3))
def test_storm_of_clients_that_leave_frees_everything(seed: int, live_server: Any, beside: Any) -> None:
    server = live_server(engine={"max_num_seqs": 4})
    generator = random.Random(seed)
    with server.client() as client:
        client.get("/health")
    server.wait_until(lambda: not server.server.server_state.connections)
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    body = beside("live").post(COMPLETIONS, json.dumps({**REQUEST, "max_tokens": 300}))
    for _ in range(40):
        with server.connect() as connection:
            if generator.random() < 0.3:
                connection.sendall(body[: generator.randrange(len(body))])
                continue
            connection.sendall(body)
            for _ in range(generator.randrange(3)):
                assert connection.recv(generator.randrange(1, 400))
    server.wait_until_idle()
    server.wait_until(lambda: not server.server.server_state.connections)
    server.wait_until(lambda: (threading.active_count(), len(os.listdir("/proc/self/fd"))) <= before)
    with server.client() as client:
        assert len(list(events(client.post(COMPLETIONS, json={**REQUEST, "max_tokens": 5}).text))) == 6


def open_and_read_nothing(server: Any, beside: Any, request: dict[str, Any]) -> Any:
    """A stream whose client takes nothing, once the engine has paused all its sequences."""
    connection = server.connect(receive_buffer=4096)
    connection.sendall(beside("live").post(COMPLETIONS, json.dumps(request), "Connection: close\r\n"))

    def is_paused() -> bool:
        stats = server.engine.stats()
        return stats.waiting == request["n"] and stats.running == 0

    server.wait_until(is_paused)
    return connection


def test_slow_reader_pauses_its_sequences_and_loses_nothing(live_server: Any, beside: Any) -> None:
    server = live_server(send_buffer=4096, max_unread_tokens=4)
    request = {**REQUEST, "max_tokens": 200, "n": 8, "logprobs": 5}
    with open_and_read_nothing(server, beside, request) as connection, server.client() as client:
        assert client.post(COMPLETIONS, json={**REQUEST, "max_tokens": 5}).status_code == 200  # others go on
        text = beside("live").read_all(connection)
        assert text.count(b'"finish_reason":"length"') == 8
        assert text.count(b"data: ") == 8 * 200 + 1


def test_reader_that_takes_nothing_is_cut_off(live_server: Any, beside: Any) -> None:
    server = live_server(send_buffer=4096, max_unread_tokens=4, slow_reader_seconds=0.5)
    request = {**REQUEST, "max_tokens": 200, "n": 8, "logprobs": 5}
    with open_and_read_nothing(server, beside, request) as connection:
        server.wait_until_idle()
        server.wait_until(lambda: not server.server.server_state.connections)
        assert server.engine.stats().aborts == 8
        assert b"[DONE]" not in beside("live").read_all(connection)
