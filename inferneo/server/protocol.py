"""The requests that the server reads, and how JSON becomes one of them.

Types are checked here, strictly: "5" is no number. What a number may be is checked where the field is used. An unknown
field is an error, so that a misspelt parameter is not ignored in silence.

Source: the OpenAI API reference; the fields that only an engine has are named as in vLLM.
"""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json

from inferneo.server.errors import ApiError
from inferneo_core.errors import shown

Text = str | None
Integer = int | None
Number = float | None
Flag = bool | None
# Items are checked where they are used, which ends at the first wrong one; pydantic would report a million.
Items = list[Any]
Mapping = dict[str, Any]


class _Request(BaseModel):
    """null stands for a field's default, as in the OpenAI API."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(_Request):
    """What a stream carries besides its tokens.

    Attributes:
        include_usage: a last chunk with the usage of the whole request.
        continuous_usage_stats: the usage so far in every chunk.
        include_obfuscation: padding against eavesdroppers who measure chunks; refused if true.
    """

    include_usage: Flag = None
    continuous_usage_stats: Flag = None
    include_obfuscation: Flag = None


class SamplingRequest(_Request):
    """What both endpoints take. The sampling parameters are those of `SamplingParams`, which checks their ranges."""

    model: str
    stream: Flag = None
    stream_options: Mapping | None = None
    n: Integer = None
    max_tokens: Integer = None
    temperature: Number = None
    top_p: Number = None
    presence_penalty: Number = None
    frequency_penalty: Number = None
    logit_bias: Mapping | None = None
    seed: Integer = None
    stop: str | Items | None = None
    # Of this engine:
    top_k: Integer = None
    min_p: Number = None
    typical_p: Number = None
    repetition_penalty: Number = None
    stop_token_ids: Items | None = None
    ignore_eos: Flag = None
    min_tokens: Integer = None
    prompt_logprobs: Integer = None
    request_id: Text = None
    # Labels for the provider, which change no answer:
    user: Text = None
    metadata: Any = None
    service_tier: Any = None
    store: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    # What this server cannot do, refused by name unless it asks for nothing:
    response_format: Any = None


class ChatCompletionRequest(SamplingRequest):
    """The body of POST /v1/chat/completions."""

    messages: Items
    max_completion_tokens: Integer = None
    logprobs: Flag = None
    top_logprobs: Integer = None
    parallel_tool_calls: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionRequest(SamplingRequest):
    """The body of POST /v1/completions. A prompt is a text or token ids, or a list of such."""

    prompt: str | Items
    echo: Flag = None
    logprobs: Integer = None
    best_of: Integer = None
    suffix: Text = None


class TokenizeRequest(_Request):
    """The body of POST /tokenize: a text or chat messages.

    Attributes:
        model: one of the server's; None takes its own.
        prompt, messages: one of the two.
        add_special_tokens: begin a prompt with BOS where the model wants one.
    """

    model: Text = None
    prompt: Text = None
    messages: Items | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(_Request):
    """The body of POST /detokenize."""

    model: Text = None
    tokens: Items


Request = TypeVar("Request", bound=BaseModel)


def read_json(data: bytes | str) -> Any:
    """A JSON text as plain Python values.

    Raises:
        ApiError: it is not JSON, not UTF-8, holds half a surrogate pair, or nests too deeply.
    """
    try:
        return from_json(data, allow_inf_nan=False)
    except (ValueError, TypeError) as error:  # a str that UTF-8 cannot carry is a TypeError
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error


def validate(model: type[Request], data: Any, *, prefix: str = "") -> Request:
    """A request, from what `read_json` returned.

    Args:
        model: what it should be.
        data: the JSON value.
        prefix: stands before the names of the fields in an error, as "stream_options.".
    Raises:
        ApiError: naming the field at fault and what it should be.
    """
    if not isinstance(data, dict):
        raise ApiError(400, f'the body is a JSON {_json_type(data)}; it is an object such as {{"model": ...}}')
    unknown = next((name for name in data if name not in model.model_fields), None)
    if unknown is not None:
        close = difflib.get_close_matches(unknown[:60], model.model_fields, n=1)
        remedy = f"did you mean {prefix}{close[0]}?" if close else "leave it out"
        name = shown(prefix + unknown)
        raise ApiError(400, f"unknown field {name} ({remedy})", param=name.strip("'"), code="unknown_parameter")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _field_error(error.errors(include_url=False, include_context=False), prefix) from None


def _field_error(details: list[ErrorDetails], prefix: str) -> ApiError:
    """One error about the first field at fault. A field that may be of several types has one detail for each."""
    first = details[0]
    field = f"{prefix}{first['loc'][0]}"
    if first["type"] == "missing":
        return ApiError(400, f"{field} is missing; the request needs it", param=field, code="missing_parameter")
    kinds = [
        detail["msg"].removeprefix("Input should be ") for detail in details if detail["loc"][0] == first["loc"][0]
    ]
    message = f"{field} is {shown(first['input'])}; it should be {' or '.join(dict.fromkeys(kinds))}"
    return ApiError(400, message, param=field, code="invalid_type")


def _json_type(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
