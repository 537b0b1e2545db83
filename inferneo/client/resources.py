"""`client.chat.completions` and `client.completions`, whose `create()` takes the engine's own parameters too."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

from inferneo.client.parameters import to_extra_body
from inferneo.client.sdk import openai

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion, ChatCompletionChunk
    from typing_extensions import Unpack

    from inferneo.client.parameters import ChatParameters, TextParameters

# The SDK's create() also takes its marker `Omit`, which means "not given". Here that is said by giving nothing, hence
# `type: ignore[override]`.


class ChatCompletions(openai.resources.chat.Completions):
    """Chat completions; see `EngineParameters` for what `create()` takes in addition."""

    @overload  # type: ignore[override]
    def create(
        self, *, stream: Literal[True], **arguments: Unpack[ChatParameters]
    ) -> openai.Stream[ChatCompletionChunk]: ...
    @overload
    def create(
        self, *, stream: Literal[False] | None = None, **arguments: Unpack[ChatParameters]
    ) -> ChatCompletion: ...
    @overload
    def create(
        self, *, stream: bool, **arguments: Unpack[ChatParameters]
    ) -> ChatCompletion | openai.Stream[ChatCompletionChunk]: ...
    def create(self, **arguments: Any) -> Any:
        return super().create(**to_extra_body(arguments))


class AsyncChatCompletions(openai.resources.chat.AsyncCompletions):
    """Chat completions; see `EngineParameters` for what `create()` takes in addition."""

    @overload  # type: ignore[override]
    async def create(
        self, *, stream: Literal[True], **arguments: Unpack[ChatParameters]
    ) -> openai.AsyncStream[ChatCompletionChunk]: ...
    @overload
    async def create(
        self, *, stream: Literal[False] | None = None, **arguments: Unpack[ChatParameters]
    ) -> ChatCompletion: ...
    @overload
    async def create(
        self, *, stream: bool, **arguments: Unpack[ChatParameters]
    ) -> ChatCompletion | openai.AsyncStream[ChatCompletionChunk]: ...
    async def create(self, **arguments: Any) -> Any:
        return await super().create(**to_extra_body(arguments))


class TextCompletions(openai.resources.Completions):
    """Text completions; see `EngineParameters` for what `create()` takes in addition."""

    @overload  # type: ignore[override]
    def create(self, *, stream: Literal[True], **arguments: Unpack[TextParameters]) -> openai.Stream[Completion]: ...
    @overload
    def create(self, *, stream: Literal[False] | None = None, **arguments: Unpack[TextParameters]) -> Completion: ...
    @overload
    def create(
        self, *, stream: bool, **arguments: Unpack[TextParameters]
    ) -> Completion | openai.Stream[Completion]: ...
    def create(self, **arguments: Any) -> Any:
        return super().create(**to_extra_body(arguments))


class AsyncTextCompletions(openai.resources.AsyncCompletions):
    """Text completions; see `EngineParameters` for what `create()` takes in addition."""

    @overload  # type: ignore[override]
    async def create(
        self, *, stream: Literal[True], **arguments: Unpack[TextParameters]
    ) -> openai.AsyncStream[Completion]: ...
    @overload
    async def create(
        self, *, stream: Literal[False] | None = None, **arguments: Unpack[TextParameters]
    ) -> Completion: ...
    @overload
    async def create(
        self, *, stream: bool, **arguments: Unpack[TextParameters]
    ) -> Completion | openai.AsyncStream[Completion]: ...
    async def create(self, **arguments: Any) -> Any:
        return await super().create(**to_extra_body(arguments))


class Chat(openai.resources.Chat):
    """`client.chat`."""

    @cached_property
    def completions(self) -> ChatCompletions:
        """Chat completions."""
        return ChatCompletions(self._client)


class AsyncChat(openai.resources.AsyncChat):
    """`client.chat`."""

    @cached_property
    def completions(self) -> AsyncChatCompletions:
        """Chat completions."""
        return AsyncChatCompletions(self._client)
