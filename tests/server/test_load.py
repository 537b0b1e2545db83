"""Sixty-four streams by SSE and sixty-four by WebSocket at once: none lost, none mixed up."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferneo_core import AsyncEngine, Engine, SamplingParams

COMPLETIONS = "/v1/completions"
NUM_STREAMS = 64  # of each kind
TEXT = "one river carries many small boats past the old stone bridge before night falls"


def prompts() -> list[str]:
    """All different, from one letter to a line."""
    generator = random.Random(5)
    return [f"{number} {TEXT[: generator.randrange(1, len(TEXT))]}" for number in range(2 * NUM_STREAMS)]


def sampling(number: int) -> dict[str, Any]:
    return {"max_tokens": 5 + number % 9, "temperature": 0.9, "seed": number, "ignore_eos": True}


def alone(engine: Engine) -> list[str]:
    """Each prompt's answer when the engine has nothing else to do."""
    return [
        engine.generate([prompt], SamplingParams(**sampling(number)))[0].text for number, prompt in enumerate(prompts())
    ]


def all_at_once(server: Any, live: Any, wire: Any) -> list[str]:
    """The answers of streams that are all asked for before any is read: even numbers by SSE, odd ones by WebSocket."""
    requests = [
        {"model": "tiny", "prompt": prompt, "stream": True, "request_id": str(number), **sampling(number)}
        for number, prompt in enumerate(prompts())
    ]
    connections, last_words = [], []
    for number, request in enumerate(requests):
        if number % 2:
            connections.append(wire.open_websocket(server, COMPLETIONS))
            last_words.append(wire.frame(request))
        else:
            whole = live.post(COMPLETIONS, json.dumps(request), "Connection: close\r\n")
            connections.append(server.connect())
            connections[-1].sendall(whole[:-1])
            last_words.append(whole[-1:])
    server.wait_until(lambda: server.service.lifecycle.num_requests == NUM_STREAMS)
    for connection, last in zip(connections, last_words, strict=True):
        connection.sendall(last)
    answers = []
    for number, connection in enumerate(connections):
        with connection:
            chunks = list(frames(connection, wire) if number % 2 else events(live.read_all(connection)))
        assert {chunk["request_id"] for chunk in chunks} == {str(number)}
        assert len(chunks) == sampling(number)["max_tokens"]
        answers.append("".join(chunk["choices"][0]["text"] for chunk in chunks))
    return answers


def events(received: bytes) -> Iterator[Any]:
    head, _, _ = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    *chunks, done = [line[6:] for line in received.splitlines() if line.startswith(b"data: ")]
    assert done == b"[DONE]"
    return map(json.loads, chunks)


def frames(connection: Any, wire: Any) -> Iterator[Any]:
    finish_reason = None
    while finish_reason is None:
        opcode, payload = wire.read_frame(connection)
        assert opcode == wire.TEXT, payload
        chunk = json.loads(payload)
        finish_reason = chunk["choices"][0].get("finish_reason")
        yield chunk


def test_streams_by_both_transports_are_the_engines_own(
    live_server: Any, chat_model: Path, beside: Callable[[str], Any]
) -> None:
    server = live_server()
    answers = all_at_once(server, beside("live"), beside("wire"))
    with Engine(chat_model, kv_cache_memory=8 * 2**20, num_threads=1) as engine:
        assert answers == alone(engine)


@pytest.mark.slow
def test_streams_of_the_default_model_are_the_engines_own(default_model: Path, beside: Callable[[str], Any]) -> None:
    arguments: dict[str, Any] = {"max_model_len": 512, "num_threads": 1}
    live = beside("live")
    with live.serving(AsyncEngine(default_model, **arguments)) as server:
        answers = all_at_once(server, live, beside("wire"))
    with Engine(default_model, **arguments) as engine:
        assert answers == alone(engine)
