"""From the fields of a request to the engine's SamplingParams."""

from __future__ import annotations

from typing import Any

from inferneo.server.errors import ApiError, too_many
from inferneo.server.protocol import ChatCompletionRequest, CompletionRequest
from inferneo.server.settings import ServerSettings
from inferneo_core import InvalidParameter, SamplingParams
from inferneo_core.errors import shown
from inferneo_core.sampling_params import MAX_LOGIT_BIAS_ENTRIES

COMPLETION_MAX_TOKENS = 16  # OpenAI's default; a chat's is whatever fits

# Taken from the request as they are, wherever it does not leave them null.
PASSED_ON = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
)


def to_sampling_params(
    request: ChatCompletionRequest | CompletionRequest, settings: ServerSettings, *, is_stream: bool
) -> SamplingParams:
    """What every choice of a request is drawn with.

    Raises:
        ApiError: 400, naming the field, its limit and the remedy.
    """
    fields = {name: getattr(request, name) for name in PASSED_ON}
    fields = {name: value for name, value in fields.items() if value is not None}
    num_stops = len(request.stop) if isinstance(request.stop, list) else 0
    if num_stops > settings.max_stops:
        raise too_many("stop", num_stops, "strings", settings.max_stops, "max_stops")
    num_stop_ids = len(request.stop_token_ids or ())
    if num_stop_ids > settings.max_stop_token_ids:
        raise too_many("stop_token_ids", num_stop_ids, "ids", settings.max_stop_token_ids, "max_stop_token_ids")
    logprobs = _num_logprobs(request)
    prompt_logprobs = request.prompt_logprobs
    if prompt_logprobs is not None and is_stream:
        remedy = "send stream: false, or echo with logprobs"
        raise ApiError(400, f"prompt_logprobs do not go with a stream ({remedy})", param="prompt_logprobs")
    top = "logprobs" if isinstance(request, CompletionRequest) else "top_logprobs"
    for name, count in ((top, logprobs), ("prompt_logprobs", prompt_logprobs)):
        if count is not None and count > settings.max_logprobs:
            limit = f"at most {settings.max_logprobs} (ask for fewer, or raise the server's max_logprobs)"
            raise ApiError(400, f"{name} is {shown(count)}; {limit}", param=name)
    if logprobs is not None and isinstance(request, CompletionRequest) and request.echo:
        prompt_logprobs = max(logprobs, prompt_logprobs or 0)
    try:
        return SamplingParams(
            **fields,
            max_tokens=_max_tokens(request),
            logit_bias=_logit_bias(request.logit_bias),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
    except InvalidParameter as error:
        field = str(error).split(" ", 1)[0]
        raise ApiError(400, str(error), param=field if field in type(request).model_fields else None) from error


def _max_tokens(request: ChatCompletionRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if request.max_completion_tokens is None:
        return request.max_tokens
    if request.max_tokens not in (None, request.max_completion_tokens):
        raise ApiError(
            400,
            f"max_tokens is {shown(request.max_tokens)} and max_completion_tokens is "
            f"{shown(request.max_completion_tokens)}; they mean the same (send one)",
            param="max_completion_tokens",
        )
    return request.max_completion_tokens


def _num_logprobs(request: ChatCompletionRequest | CompletionRequest) -> int | None:
    """How many tokens a position; None for none at all."""
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs is not None:
        raise ApiError(
            400,
            f"top_logprobs is {shown(request.top_logprobs)} without logprobs (send logprobs: true as well)",
            param="top_logprobs",
        )
    return None


def _logit_bias(bias: dict[str, Any] | None) -> dict[int, Any] | None:
    """JSON's keys are strings; the engine's are ids."""
    if bias is None:
        return None
    if len(bias) > MAX_LOGIT_BIAS_ENTRIES:
        raise too_many("logit_bias", len(bias), "entries", MAX_LOGIT_BIAS_ENTRIES, None)
    for key in bias:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise ApiError(400, f"logit_bias has the key {shown(key)}; keys are token ids", param="logit_bias")
    return {int(key): value for key, value in bias.items()}
