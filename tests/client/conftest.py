"""A server that answers as it was told to, byte for byte, and keeps what it was asked."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

WAIT_SECONDS = 60
OPENAI_VARIABLES = (
    "OPENAI_API_KEY",
    "OPENAI_ADMIN_KEY",
    "OPENAI_ORG_ID",
    "OPENAI_PROJECT_ID",
    "OPENAI_WEBHOOK_SECRET",
    "OPENAI_BASE_URL",
    "OPENAI_CUSTOM_HEADERS",
)
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@dataclass
class Answer:
    """What the server sends, piece by piece, and how it ends.

    `end` is "close" (a proper end), "cut" (the connection breaks) or "hang" (nothing more comes until the client goes).
    """

    pieces: list[Any]
    end: str = "close"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    close_code: int = 1000


@dataclass
class Request:
    """What the client sent."""

    path: str
    query: str
    headers: dict[str, str]
    body: Any


class ScriptedServer:
    """An ASGI application that takes its answers from a queue.

    Attributes:
        answers: still to be given, one a request.
        requests: those that came.
        left: set when a client went away from an answer that hangs.
        close_code: with which a WebSocket was left.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.reset()

    def reset(self) -> None:
        self.answers: deque[Answer] = deque()
        self.requests: list[Request] = []
        self.left = threading.Event()
        self.close_code: int | None = None

    def will(self, *answers: Answer) -> None:
        self.answers.extend(answers)

    def client_left(self) -> bool:
        return self.left.wait(WAIT_SECONDS)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        request = Request(
            path=scope["path"],
            query=scope["query_string"].decode(),
            headers={name.decode(): value.decode() for name, value in scope["headers"]},
            body=None,
        )
        self.requests.append(request)
        await (self._websocket if scope["type"] == "websocket" else self._http)(request, receive, send)

    async def _http(self, request: Request, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        request.body = json.loads(body) if body else None
        answer = self.answers.popleft()
        content_type = "text/event-stream" if answer.status == 200 else "application/json"
        headers = {"content-type": content_type, **answer.headers}
        await send({"type": "http.response.start", "status": answer.status, "headers": _encoded(headers)})
        for piece in answer.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if answer.end == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()
        elif answer.end == "close":
            await send({"type": "http.response.body", "body": b""})
        # "cut": uvicorn closes the connection of an application that returns without an end.

    async def _websocket(self, request: Request, receive: Any, send: Any) -> None:
        await receive()
        answer = self.answers.popleft()
        if answer.status != 200:
            headers = _encoded({"content-type": "application/json", **answer.headers})
            await send({"type": "websocket.http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "websocket.http.response.body", "body": b"".join(answer.pieces)})
            return
        await send({"type": "websocket.accept"})
        message = await receive()
        request.body = json.loads(message["text"])
        with suppress(OSError):  # the client has left already
            for piece in answer.pieces:
                await send({"type": "websocket.send", "text": json.dumps(piece)})
            if answer.end == "close":
                await send({"type": "websocket.close", "code": answer.close_code})
        while (message := await receive())["type"] != "websocket.disconnect":
            pass
        self.close_code = message["code"]
        self.left.set()


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


@pytest.fixture(scope="session")
def running_server():
    listener = socket.create_server(("127.0.0.1", 0))
    app = ScriptedServer(f"http://127.0.0.1:{listener.getsockname()[1]}")
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # answers that break off are meant to
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="websockets-sansio")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()  # the listener takes connections already
    yield app
    server.should_exit = server.force_exit = True
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive()


@pytest.fixture
def server(running_server, monkeypatch):
    for name in (*OPENAI_VARIABLES, *PROXY_VARIABLES, "INFERNEO_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    running_server.reset()
    return running_server


def chunk(content: str | None = None, finish_reason: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    """A chunk of a chat completion."""
    choice = {"index": index, "delta": {"content": content} if content is not None else {}}
    choice["finish_reason"] = finish_reason
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
        **more,
    }


def text_chunk(text: str, finish_reason: str | None = None, index: int = 0) -> dict[str, Any]:
    """A chunk of a text completion."""
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}


def sse(*events: Any) -> list[bytes]:
    """Server-sent events; a string stands for itself."""
    return [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode() for event in events]


@pytest.fixture
def say():
    """The vocabulary of the scripts."""

    class Vocabulary:
        pass

    words = Vocabulary()
    words.Answer, words.chunk, words.text_chunk, words.sse = Answer, chunk, text_chunk, sse
    words.error = {"error": {"message": "it broke", "type": "server_error", "param": None, "code": "engine_error"}}
    words.good = Answer(sse(chunk(), chunk("Hello"), chunk(" world"), chunk(finish_reason="stop"), "[DONE]"))
    words.hanging = Answer(sse(chunk(), chunk("Hello"), chunk(" world")), end="hang")
    words.ask = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    return words
