"""One chat completion over a WebSocket, up to the transport: what is sent, and what the answers mean."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn
from urllib.parse import urlencode

from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel
from websockets.exceptions import InvalidStatus

from inferneo.client.address import is_loopback, websocket_url_of
from inferneo.client.sdk import httpx, openai
from inferneo.client.streams import Progress

PATH = "chat/completions"
HANDSHAKE_SECONDS = 30.0  # from the first packet to the upgraded connection
CLOSE_SECONDS = 2.0  # how long close() waits for the server's own close frame


def _status_of(error: Mapping[str, Any]) -> int | None:
    """The HTTP status that the server would have sent along with an error, to raise the same exception."""
    if error.get("code") == "model_not_found":
        return 404
    statuses = (
        ("invalid_request_error", 400),
        ("authentication_error", 401),
        ("rate_limit_error", 429),
        ("server_error", 500),
    )
    return dict(statuses).get(str(error.get("type")))


def _plain(value: object) -> object:
    """What json cannot write itself: the SDK's own messages, and iterables."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{value!r} has no JSON form")


class Exchange:
    """A request and what comes back.

    Args:
        client: whose address, key, headers and timeouts are used.
        arguments: those of `chat.completions.create`.

    Attributes:
        url, message: where to connect, and the only message that is sent.
        read_timeout: seconds to wait for the next message; None for ever.
        progress: which answers began and ended.
    """

    def __init__(self, client: openai.OpenAI | openai.AsyncOpenAI, arguments: Mapping[str, Any]) -> None:
        given = {name: value for name, value in arguments.items() if not isinstance(value, openai.Omit)}
        missing = [name for name in ("messages", "model") if name not in given]
        if missing:
            raise TypeError(f"websocket_chat() lacks {' and '.join(missing)}")
        self.read_timeout = httpx.Timeout(given.pop("timeout", client.timeout)).read
        self._client = client
        self._extra_headers = given.pop("extra_headers", None) or {}
        query = {**client._custom_query, **(given.pop("extra_query", None) or {})}
        extra_body = given.pop("extra_body", None) or {}
        body = {**given, "stream": True, **extra_body}
        self._base_url = str(client.websocket_base_url or client.base_url)
        num_choices, stream_options = body.get("n"), body.get("stream_options")  # as given; the server judges them
        self._num_choices = max(1, num_choices) if isinstance(num_choices, int) else 1
        self._wants_usage = isinstance(stream_options, Mapping) and bool(stream_options.get("include_usage"))
        self.url = websocket_url_of(self._base_url, PATH, urlencode(query, doseq=True))
        self.message = json.dumps(body, default=_plain)
        self.progress = Progress()
        # Nobody sends this one; the SDK's exceptions name the request that they are about.
        self._request = httpx.Request("GET", self.url)

    def connect_options(self) -> dict[str, Any]:
        """The keyword arguments of `connect`, the same for both kinds of connections; the key as it is now."""
        headers = httpx.Headers({"Authorization": f"Bearer {self._client.api_key}"})
        for more in (self._client._custom_headers, self._extra_headers):
            headers.update({name: value for name, value in more.items() if isinstance(value, str)})
        return {
            "additional_headers": headers.multi_items(),
            "open_timeout": min(HANDSHAKE_SECONDS, self.read_timeout or HANDSHAKE_SECONDS),
            "close_timeout": CLOSE_SECONDS,
            "compression": None,  # a token has nothing to compress
            "max_size": None,  # prompt_logprobs come in one message; over HTTP they have no limit either
            "proxy": None if is_loopback(self._base_url) else True,
        }

    @property
    def is_over(self) -> bool:
        """Whether every answer has ended, and the usage has come where it was asked for; or the stream was closed."""
        progress = self.progress
        finished = progress.num_finished >= self._num_choices
        return progress.closed or (finished and (progress.has_usage or not self._wants_usage))

    def read(self, data: str | bytes) -> ChatCompletionChunk | None:
        """The chunk in a message; None for a sign of life.

        Raises:
            openai.APIError: the message is an error, of the class that its HTTP status would have had.
        """
        message = json.loads(data)
        if "error" in message:
            self._raise(message["error"])
        if "choices" not in message and "usage" not in message:
            return None
        chunk = ChatCompletionChunk.construct(**{"choices": [], **message})
        self.progress.see(chunk)
        return chunk

    def _raise(self, error: object) -> NoReturn:
        details = error if isinstance(error, dict) else {"message": error}
        text = str(details.get("message"))
        status = _status_of(details)
        if status is None:
            raise openai.APIError(text, self._request, body=details)
        body = {"error": details}
        response = httpx.Response(status, json=body, request=self._request)
        raise self._client._make_status_error(text, body=body, response=response)

    def refused(self, error: Exception) -> Exception:
        """What to raise when no connection came about."""
        if isinstance(error, InvalidStatus):
            answer = error.response
            response = httpx.Response(
                answer.status_code,
                headers=list(answer.headers.raw_items()),
                content=bytes(answer.body or b""),
                request=self._request,
            )
            return self._client._make_status_error_from_response(response)
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            return openai.APITimeoutError(request=self._request)
        return openai.APIConnectionError(message=f"no WebSocket to {self.url}: {error}", request=self._request)

    def broken(self, error: Exception) -> Exception:
        """What to raise when the connection ended before the answer."""
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            return openai.APITimeoutError(request=self._request)
        return openai.APIConnectionError(
            message=f"the WebSocket closed {self.progress.position}: {error} (send the request again)",
            request=self._request,
        )
