"""POST /tokenize and /detokenize: a model's tokens without generating any. Shapes as in vLLM."""

from __future__ import annotations

import asyncio
from typing import Any

from inferneo.server.errors import ApiError, from_exception, too_many
from inferneo.server.protocol import DetokenizeRequest, TokenizeRequest
from inferneo.server.requests import check_model, check_size
from inferneo.server.settings import ServerSettings
from inferneo_core import AsyncEngine
from inferneo_core.errors import RequestError, shown


async def tokenize(engine: AsyncEngine, request: TokenizeRequest, settings: ServerSettings) -> dict[str, Any]:
    """{"tokens": ids, "count": how many, "max_model_len": how many fit}.

    Raises:
        ApiError: 400, both or neither of prompt and messages, or text that is refused; 404, another model.
    """
    if request.model is not None:
        check_model(request.model, settings)
    prompt, messages, tokenizer = request.prompt, request.messages, engine.tokenizer
    if (prompt is None) == (messages is None):
        raise ApiError(400, "the request has a prompt or messages, one of the two", param="prompt")
    check_size((prompt or messages or "",), settings)

    def encode() -> list[int]:
        if prompt is not None:
            return tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens)
        return tokenizer.encode_chat(messages or [])

    try:
        ids = await asyncio.to_thread(encode)  # a long text takes its time
    except RequestError as error:
        raise from_exception(error) from error
    return {"tokens": ids, "count": len(ids), "max_model_len": engine.max_model_len}


async def detokenize(engine: AsyncEngine, request: DetokenizeRequest, settings: ServerSettings) -> dict[str, Any]:
    """{"prompt": the text of the ids}.

    Raises:
        ApiError: 400, not a list of ids of this model's vocabulary; 404, another model.
    """
    if request.model is not None:
        check_model(request.model, settings)
    if len(request.tokens) > settings.max_prompt_chars:
        raise too_many("tokens", len(request.tokens), "ids", settings.max_prompt_chars, "max_prompt_chars")
    limit = engine.tokenizer.vocab_size
    for i, token_id in enumerate(request.tokens):
        if type(token_id) is not int or not 0 <= token_id < limit:
            message = f"tokens[{i}] is {shown(token_id)}; ids are integers in [0, {limit - 1}]"
            raise ApiError(400, message, param="tokens")
    return {"prompt": await asyncio.to_thread(engine.tokenizer.decode, request.tokens, skip_special_tokens=False)}
