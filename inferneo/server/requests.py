"""Plan: what a validated request asks of the engine, and of the answer.

Every limit and every contradiction between fields is checked here, before anything runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from inferneo.server.errors import ApiError, from_exception, too_many
from inferneo.server.protocol import ChatCompletionRequest, CompletionRequest, StreamOptions, validate
from inferneo.server.sampling import to_sampling_params
from inferneo.server.settings import ServerSettings
from inferneo_core import SamplingParams, Tokenizer
from inferneo_core.errors import RequestError, shown
from inferneo_core.prompt import Prompt, encode_prompt

MAX_REQUEST_ID_CHARS = 256
INLINE_ITEMS = 4096  # characters or ids; tokenizing more is handed to a thread, for the event loop's sake

# Fields that this server cannot honour, with the values that ask for nothing.
_REFUSED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("response_format", (None, {"type": "text"})),
    ("tools", (None, [])),
    ("tool_choice", (None, "none", "auto")),
    ("functions", (None, [])),
    ("function_call", (None, "none", "auto")),
    ("modalities", (None, ["text"])),
    ("audio", (None,)),
    ("reasoning_effort", (None, "none")),
    ("verbosity", (None, "medium")),
    ("web_search_options", (None,)),
    ("best_of", (None, 1)),
    ("suffix", (None, "")),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one request comes to.

    Attributes:
        is_chat: a chat, or completions of plain prompts.
        model: the name that the request called the model by.
        request_id: the request's own label, echoed in every chunk; None without one.
        prompts: texts, token ids or chat messages; one unless `is_chat` is false.
        params: of every choice, prompt_logprobs included.
        num_choices: answers to each prompt.
        echo: put the prompt before each answer.
        num_prompt_logprobs: tokens to report with each of the prompt's in a field of its own, as vLLM does; or None.
        include_usage: end a stream with the request's usage.
        continuous_usage: have the usage so far in each chunk.
    """

    is_chat: bool
    model: str
    request_id: str | None
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    num_choices: int
    echo: bool
    num_prompt_logprobs: int | None
    include_usage: bool
    continuous_usage: bool

    @property
    def sibling_params(self) -> SamplingParams:
        """Of the choices after a prompt's first: what depends on the prompt alone is not computed again."""
        return replace(self.params, prompt_logprobs=None)


def make_plan(request: ChatCompletionRequest | CompletionRequest, settings: ServerSettings, *, is_stream: bool) -> Plan:
    """The plan of a request.

    Args:
        request: from `validate`.
        settings: its limits and names.
        is_stream: whether the answer goes out in chunks.
    Raises:
        ApiError: 404 for a model that is not served, 400 for everything else that is wrong.
    """
    check_model(request.model, settings)
    _refuse_unsupported(request)
    if request.request_id is not None and len(request.request_id) > MAX_REQUEST_ID_CHARS:
        raise too_many("request_id", len(request.request_id), "characters", MAX_REQUEST_ID_CHARS, None)
    is_chat = isinstance(request, ChatCompletionRequest)
    prompts: tuple[Prompt, ...]
    if isinstance(request, ChatCompletionRequest):
        prompts = (_checked_messages(request.messages, settings),)
    else:
        prompts = _split_prompts(request.prompt)
    num_choices = _num_choices(request.n, len(prompts), settings)
    check_size(prompts, settings)
    options = _stream_options(request, is_stream)
    return Plan(
        is_chat=is_chat,
        model=request.model,
        request_id=request.request_id,
        prompts=prompts,
        params=to_sampling_params(request, settings, is_stream=is_stream),
        num_choices=num_choices,
        echo=isinstance(request, CompletionRequest) and bool(request.echo),
        num_prompt_logprobs=request.prompt_logprobs,
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
    )


async def encode_prompts(prompts: Sequence[Prompt], tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """Each prompt's token ids; those of large prompts are computed in a thread.

    Raises:
        ApiError: 400, a prompt is empty, of the wrong type, or refused by the chat template.
    """

    def encode() -> list[list[int]]:
        return [encode_prompt(prompt, tokenizer, vocab_size) for prompt in prompts]

    try:
        is_large = sum(map(_num_items, prompts)) > INLINE_ITEMS
        return await asyncio.to_thread(encode) if is_large else encode()
    except RequestError as error:
        raise from_exception(error) from error


async def prompt_texts(prompts: Sequence[Prompt], token_ids: list[list[int]], tokenizer: Tokenizer) -> list[str]:
    """Each prompt as `echo` shows it; the texts of many ids are computed in a thread."""

    def decode() -> list[str]:
        return [
            prompt if isinstance(prompt, str) else tokenizer.decode(ids)
            for prompt, ids in zip(prompts, token_ids, strict=True)
        ]

    is_large = sum(map(len, token_ids)) > INLINE_ITEMS
    return await asyncio.to_thread(decode) if is_large else decode()


def check_model(model: str, settings: ServerSettings) -> None:
    """Raise ApiError 404, which lists the names that are served, unless `model` is one of them."""
    if model not in settings.served_model_names:
        known = ", ".join(settings.served_model_names)
        raise ApiError(
            404, f"the model {shown(model)} is not served here; it is {known}", param="model", code="model_not_found"
        )


def _refuse_unsupported(request: ChatCompletionRequest | CompletionRequest) -> None:
    for name, harmless in _REFUSED:
        value = getattr(request, name, None)
        if value not in harmless:
            allowed = " or ".join(map(repr, harmless[1:]))
            remedy = f"leave it out, or send {allowed}" if allowed else "leave it out"
            raise ApiError(
                400,
                f"{name} is {shown(value)}, which this server does not support ({remedy})",
                param=name,
                code="unsupported_parameter",
            )


def _split_prompts(prompt: str | list[Any]) -> tuple[Prompt, ...]:
    """The prompts of a completions request: one text or one list of ids stands for itself."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        for i, item in enumerate(prompt):
            if type(item) is not type(prompt[0]):
                raise ApiError(
                    400, f"prompt[{i}] is {shown(item)}; a list of prompts holds texts or lists of ids", param="prompt"
                )
        return tuple(prompt)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        raise ApiError(400, "prompt holds messages; they belong to /v1/chat/completions", param="prompt")
    return (prompt,)


def _checked_messages(messages: list[Any], settings: ServerSettings) -> list[Any]:
    if not messages:
        raise ApiError(400, "messages are empty; a chat has at least one", param="messages")
    if len(messages) > settings.max_messages:
        raise too_many("messages", len(messages), "items", settings.max_messages, "max_messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ApiError(
                400, f"messages[{i}] is {shown(message)}; it is an object with a role and a content", param="messages"
            )
    return messages


def _num_choices(n: int | None, num_prompts: int, settings: ServerSettings) -> int:
    num_choices = 1 if n is None else n
    if num_choices < 1:
        raise ApiError(400, f"n is {shown(n)}; it is at least 1", param="n")
    if num_choices * num_prompts > settings.max_choices:
        asked = f"n is {shown(n)}" if num_prompts == 1 else f"{num_prompts} prompts times n ({shown(num_choices)})"
        raise ApiError(
            400,
            f"{asked}; one request has at most {settings.max_choices} answers (send fewer, or raise max_choices)",
            param="n" if num_prompts == 1 else "prompt",
        )
    return num_choices


def check_size(prompts: tuple[Prompt, ...], settings: ServerSettings) -> None:
    """Refuse texts that would take seconds to tokenize before anybody could see that they do not fit."""
    size = sum(map(_num_items, prompts))
    if size > settings.max_prompt_chars:
        raise too_many("the prompt", size, "characters", settings.max_prompt_chars, "max_prompt_chars")


def _num_items(prompt: Any) -> int:
    """Characters of all strings within, and ids."""
    if isinstance(prompt, Mapping):
        return sum(map(_num_items, prompt.values()))
    if isinstance(prompt, list):
        return len(prompt) if prompt and isinstance(prompt[0], int) else sum(map(_num_items, prompt))
    return len(prompt) if isinstance(prompt, str) else 1


def _stream_options(request: ChatCompletionRequest | CompletionRequest, is_stream: bool) -> StreamOptions:
    if request.stream_options is None:
        return StreamOptions()
    if not is_stream:
        raise ApiError(400, "stream_options go with a stream; send stream: true as well", param="stream_options")
    options = validate(StreamOptions, request.stream_options, prefix="stream_options.")
    if options.include_obfuscation:
        raise ApiError(
            400,
            "stream_options.include_obfuscation is True, which this server does not support (leave it out)",
            param="stream_options.include_obfuscation",
            code="unsupported_parameter",
        )
    return options
