"""The routes over a real connection: models, tokens, health, whole answers; and what is too large or too slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inferneo_core import Engine, SamplingParams

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
ENDLESS = {"model": "tiny", "messages": MESSAGES, "max_tokens": 400, "ignore_eos": True, "seed": 1}


def test_models_are_listed_under_every_name(live_server: Any) -> None:
    with live_server(served_model_names=("tiny", "meta-llama/Llama-2-7b-chat-hf")).client() as client:
        listed = client.get("/v1/models").json()
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == ["tiny", "meta-llama/Llama-2-7b-chat-hf"]
        for card in listed["data"]:
            assert client.get(f"/v1/models/{card['id']}").json() == card
            assert (card["object"], card["max_model_len"]) == ("model", 512)
        missing = client.get("/v1/models/other")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("DELETE", "/health", 405), ("GET", "/docs", 404)],
)
def test_unknown_routes_get_an_error_of_the_same_shape(method: str, path: str, status: int, live_server: Any) -> None:
    with live_server().client() as client:
        response = client.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert path in response.json()["error"]["message"]
        assert response.headers["x-should-retry"] == "false"


def test_page_is_served_under_its_policy_or_not_at_all(live_server: Any) -> None:
    with live_server().client() as client:
        page = client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
    with live_server(show_ui=False).client() as client:
        assert client.get("/").status_code == 404


def test_tokens_go_there_and_back(live_server: Any, chat_model: Path) -> None:
    with live_server().client() as client:
        answer = client.post("/tokenize", json={"prompt": "Grüße"}).json()
        assert answer["count"] == len(answer["tokens"]) == 7
        assert answer["max_model_len"] == 512
        assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Grüße"}
        chat = client.post("/tokenize", json={"model": "tiny", "messages": MESSAGES}).json()
        assert client.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"] == "user: Hi\nassistant:"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "one of the two"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "one of the two"),
        ("/tokenize", {"prompt": 5}, "prompt is 5"),
        ("/tokenize", {"messages": [5]}, "messages[0] is a int"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "not served"),
        ("/tokenize", {"prompt": "a" * 101}, "at most 100"),
        ("/detokenize", {"tokens": [1, 263]}, "tokens[1] is 263; ids are integers in [0, 262]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0] is True"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0] is -1"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1] * 101}, "at most 100"),
    ],
)
def test_bad_token_requests_are_refused(path: str, body: Any, words: str, live_server: Any) -> None:
    with live_server(max_prompt_chars=100).client() as client:
        response = client.post(path, json=body)
        assert response.status_code in (400, 404)
        assert words in response.json()["error"]["message"]


def test_whole_answer_is_the_engines_own(live_server: Any, chat_model: Path) -> None:
    with live_server().client() as client:
        answer = client.post(CHAT, json={**ENDLESS, "max_tokens": 9}).json()
    with Engine(chat_model, kv_cache_memory=8 * 2**20, num_threads=1) as engine:
        (expected,) = engine.generate([MESSAGES], SamplingParams(max_tokens=9, ignore_eos=True, seed=1))
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 9
    assert answer["object"] == "chat.completion"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'"\\ud800"', b"{}"])
def test_body_that_is_no_request_is_refused(body: bytes, live_server: Any) -> None:
    with live_server().client() as client:
        response = client.post(CHAT, content=body)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert client.get("/health").status_code == 200


def test_body_is_limited_by_what_it_says_and_by_what_comes(live_server: Any) -> None:
    server = live_server(max_body_bytes=1000)
    with server.client() as client:
        for content in (b"x" * 1001, iter([b"x" * 600, b"y" * 600])):  # with a Content-Length, and in chunks
            response = client.post(CHAT, content=content)
            assert response.status_code == 413
            assert "max_body_bytes is 1000" in response.json()["error"]["message"]
        padded = json.dumps({**ENDLESS, "max_tokens": 2}).ljust(1000)
        assert client.post(CHAT, content=padded.encode()).status_code == 200


def test_slow_body_is_not_waited_for(live_server: Any) -> None:
    request = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    answer = live_server(receive_seconds=1.0).exchange(request)
    assert answer.startswith("HTTP/1.1 408")
    assert "body_too_slow" in answer


@pytest.mark.parametrize("start", [b"", b"GET /health HTTP/1.1\r\nHost: loc"])
def test_slow_headers_are_not_waited_for(start: bytes, live_server: Any) -> None:
    answer = live_server(receive_seconds=1.0).exchange(start)
    assert answer.startswith("HTTP/1.1 408")
    assert "headers_too_slow" in answer


def test_idle_connection_outlives_the_headers_deadline(live_server: Any) -> None:
    server = live_server(receive_seconds=1.0)
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with server.connect() as connection:
        connection.sendall(request + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        with server.connect() as other:  # its deadline comes after that of the idle one would
            assert other.recv(65536).startswith(b"HTTP/1.1 408")
        connection.sendall(request + b"Connection: close\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_headers_are_limited(live_server: Any) -> None:
    server = live_server(max_header_bytes=2000)
    endless = [b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"X-Long: " + b"x" * 5000]
    assert server.exchange(*endless).startswith("HTTP/1.1 431")
    with server.client() as client:
        assert client.get("/health", headers={"X-Long": "x" * 1000}).status_code == 200
        big_body = json.dumps({**ENDLESS, "max_tokens": 2}).ljust(5000)
        assert client.post(CHAT, content=big_body.encode()).status_code == 200


def test_what_is_no_http_is_refused(live_server: Any) -> None:
    server = live_server()
    assert server.exchange(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").startswith("HTTP/1.1 400")
    with server.client() as client:
        assert client.get("/health").status_code == 200


def test_connections_are_limited(live_server: Any) -> None:
    server = live_server(max_connections=2)
    with server.connect(), server.connect():
        server.wait_until(lambda: len(server.server.server_state.connections) == 2)
        answer = server.exchange()
        assert answer.startswith("HTTP/1.1 503")
        assert "retry-after: 1" in answer.lower()
        assert "x-should-retry: true" in answer
        assert '"too_many_connections"' in answer
    server.wait_until(lambda: not server.server.server_state.connections)
    with server.client() as client:
        assert client.get("/health").status_code == 200


def test_queue_is_limited(live_server: Any, halt: Any, background: Any) -> None:
    server = live_server(engine={"max_num_seqs": 1}, max_queued=1)
    halted = halt(server.engine._engine, 2)
    with server.client() as client:
        posts = [background(lambda: client.post(CHAT, json={**ENDLESS, "max_tokens": 5})) for _ in range(2)]
        halted.reached()
        server.wait_until(lambda: server.service.lifecycle.num_requests == 2)
        refused = client.post(CHAT, json=ENDLESS)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-should-retry"] == "true"
        assert refused.json()["error"]["code"] == "queue_full"
        halted.go()
        assert [post.result().status_code for post in posts] == [200, 200]


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"stream": True}])
def test_client_that_leaves_before_its_answer_aborts_it(extra: Any, live_server: Any, halt: Any, beside: Any) -> None:
    server = live_server()
    halted = halt(server.engine._engine, 4)
    connection = server.connect()
    connection.sendall(beside("live").post(CHAT, json.dumps({**ENDLESS, **extra})))
    halted.reached()
    connection.close()
    server.wait_until(lambda: server.service.lifecycle.num_requests == 0)
    steps = server.engine.stats().steps
    halted.go()
    server.wait_until_idle()
    stats = server.engine.stats()
    assert stats.aborts == extra.get("n", 1)
    assert stats.steps <= steps + 1  # the one in which the engine stood


def test_failed_engine_shows_in_health(live_server: Any) -> None:
    server = live_server()
    server.engine._engine.close()
    server.engine._work.set()
    server.wait_until(lambda: server.engine.is_closed)
    with server.client() as client:
        assert client.get("/health").status_code == 503
        refused = client.post(CHAT, json=ENDLESS)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
    server.stop()
