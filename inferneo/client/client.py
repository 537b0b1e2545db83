"""InferneoClient and AsyncInferneoClient: openai.OpenAI and openai.AsyncOpenAI for an Inferneo server."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from inferneo.client.address import DEFAULT_BASE_URL, base_url_of, is_loopback
from inferneo.client.resources import AsyncChat, AsyncTextCompletions, Chat, TextCompletions
from inferneo.client.sdk import httpx, openai
from inferneo.client.streams import AsyncInferneoStream, InferneoStream, checked

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from inferneo.client.parameters import ChatParameters
    from inferneo.client.websocket import AsyncWebSocketStream, WebSocketStream

# What the SDK reads from OPENAI_* variables when it is not given.
FROM_ENVIRONMENT = ("organization", "project", "admin_api_key", "webhook_secret")

H = TypeVar("H", bound="httpx.Client | httpx.AsyncClient")


class OwnHttpClient(openai.DefaultHttpxClient):
    """The HTTP client of an InferneoClient that was given none. Closed when it is dropped, as the SDK's own."""

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


class OwnAsyncHttpClient(openai.DefaultAsyncHttpxClient):
    """The HTTP client of an AsyncInferneoClient that was given none. Closed when it is dropped, as the SDK's own."""

    def __del__(self) -> None:
        with suppress(Exception):  # no loop runs any more, and the connections went with it
            if not self.is_closed:
                asyncio.get_running_loop().create_task(self.aclose())


def _http_client(own: type[H], given: Any, base_url: str) -> Any:
    """The caller's, or one of ours: to a loopback server it goes straight, else as HTTP_PROXY and the like say."""
    direct = is_loopback(base_url)
    if given is None or (isinstance(given, own) and given.trust_env == direct):  # with_options(base_url=...)
        return own(trust_env=not direct)
    return given


def _options(sdk: type, base_url: object, api_key: Any, own: type[H], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the SDK's constructor, with nothing left for it to look up in OPENAI_* variables."""
    url = base_url_of(base_url)
    known = inspect.signature(sdk).parameters
    return {
        **given,
        **{name: given.get(name) or "" for name in FROM_ENVIRONMENT if name in known},
        "base_url": url,
        "api_key": api_key or os.environ.get("INFERNEO_API_KEY") or "none",
        "http_client": _http_client(own, given.get("http_client"), url),
    }


def _forget_environment(client: Any, given: dict[str, Any]) -> None:
    """Undo what the SDK's constructor took from the environment and offers no argument against."""
    for name in FROM_ENVIRONMENT:
        setattr(client, name, given.get(name) or None)  # "" would be sent as an empty header
    client._custom_headers = given.get("default_headers") or {}  # OPENAI_CUSTOM_HEADERS
    client._ambient_authorizations = frozenset()


class InferneoClient(openai.OpenAI):
    """An `openai.OpenAI` for an Inferneo server.

    It differs from its parent in this: the address comes first and needs no "/v1"; no key is needed; nothing of the
    OPENAI_* variables is read or sent; a server on this machine is never reached through a proxy; a stream that is left
    is closed, one that was cut short raises; `create()` takes the engine's sampling parameters; `websocket_chat`.

    Args:
        base_url: of the server. "/v1" is appended where there is no path.
        api_key: the server's, or a function that returns it; INFERNEO_API_KEY where it is not given.
        options: all else that openai.OpenAI takes: timeout, max_retries, default_headers, http_client, ...

    Raises:
        ValueError: base_url is no http or https URL.
    """

    def __init__(
        self,
        base_url: str | httpx.URL = DEFAULT_BASE_URL,
        *,
        api_key: str | Callable[[], str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**_options(openai.OpenAI, base_url, api_key, OwnHttpClient, options))
        _forget_environment(self, options)

    @cached_property
    def chat(self) -> Chat:
        """Chat completions."""
        return Chat(self)

    @cached_property
    def completions(self) -> TextCompletions:
        """Text completions."""
        return TextCompletions(self)

    def websocket_chat(self, **arguments: Unpack[ChatParameters]) -> WebSocketStream:
        """A streamed chat completion over a WebSocket: the arguments and the chunks of `chat.completions.create`.

        Raises:
            openai.APIConnectionError: no connection.
            openai.APIStatusError: the server refused the connection; bad arguments raise it when the stream is read.
        """
        from inferneo.client.websocket import WebSocketStream

        return WebSocketStream(self, arguments)

    def post(self, path: str, **arguments: Any) -> Any:
        """The SDK's `post`, whose streams close when they are left and raise when they were cut short."""
        return super().post(path, **{**arguments, "stream_cls": checked(arguments.get("stream_cls"), InferneoStream)})


class AsyncInferneoClient(openai.AsyncOpenAI):
    """An `openai.AsyncOpenAI` for an Inferneo server; see InferneoClient for how it differs from its parent."""

    def __init__(
        self,
        base_url: str | httpx.URL = DEFAULT_BASE_URL,
        *,
        api_key: str | Callable[[], Awaitable[str]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**_options(openai.AsyncOpenAI, base_url, api_key, OwnAsyncHttpClient, options))
        _forget_environment(self, options)

    @cached_property
    def chat(self) -> AsyncChat:
        """Chat completions."""
        return AsyncChat(self)

    @cached_property
    def completions(self) -> AsyncTextCompletions:
        """Text completions."""
        return AsyncTextCompletions(self)

    def websocket_chat(self, **arguments: Unpack[ChatParameters]) -> AsyncWebSocketStream:
        """A streamed chat completion over a WebSocket: the arguments and the chunks of `chat.completions.create`.

        It is not awaited: the connection opens with the first chunk or at `async with`, which raise what
        InferneoClient.websocket_chat raises.
        """
        from inferneo.client.websocket import AsyncWebSocketStream

        return AsyncWebSocketStream(self, arguments)

    async def post(self, path: str, **arguments: Any) -> Any:
        """The SDK's `post`, whose streams close when they are left and raise when they were cut short."""
        replaced = checked(arguments.get("stream_cls"), AsyncInferneoStream)
        return await super().post(path, **{**arguments, "stream_cls": replaced})
