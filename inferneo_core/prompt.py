"""Prompts: whatever a caller hands to the engine, as checked token ids and a Sequence."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence as SequenceOf
from typing import Any, TypeAlias, cast

from inferneo_core.errors import InvalidParameter, InvalidPrompt, PromptTooLong, shown
from inferneo_core.sampling_params import SamplingParams
from inferneo_core.sequence import Sequence
from inferneo_core.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | SequenceOf[int] | SequenceOf[Message]


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Token ids of a text, of ids, or of chat messages.

    Raises:
        InvalidPrompt: empty, of another type, or with ids outside the vocabulary.
        ChatTemplateError: the template refuses the messages.
    """
    if isinstance(prompt, str):
        token_ids = tokenizer.encode(prompt)
    elif isinstance(prompt, (bytes, bytearray, memoryview, Mapping)) or not isinstance(prompt, SequenceOf):
        raise InvalidPrompt(f"the prompt is a {type(prompt).__name__}; it is a str, token ids or a list of messages")
    elif prompt and all(isinstance(item, Mapping) for item in prompt):
        token_ids = tokenizer.encode_chat(cast("SequenceOf[Message]", prompt))
    else:
        token_ids = list(cast("SequenceOf[int]", prompt))
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise InvalidPrompt(
                    f"the prompt holds {shown(token_id)}; a sequence is all token ids (int) or all messages (dict)"
                )
            if not 0 <= token_id < vocab_size:
                raise InvalidPrompt(f"the prompt holds token id {shown(token_id)}; ids are in [0, {vocab_size - 1}]")
    if not token_ids:
        raise InvalidPrompt("the prompt is empty; it has at least one token")
    return token_ids


def pair_params(
    prompts: SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None
) -> list[tuple[Prompt, SamplingParams | None]]:
    """Each prompt of a list with its parameters.

    Raises:
        InvalidPrompt: not a list of prompts, or not as many params.
    """
    if not isinstance(prompts, SequenceOf) or isinstance(prompts, (str, bytes, bytearray, memoryview)):
        raise InvalidPrompt(
            f"prompts are {shown(prompts)}; generate takes a list of prompts (wrap a single one in a list)"
        )
    if len(prompts) and isinstance(prompts[0], (int, Mapping)):
        raise InvalidPrompt(
            "prompts are the ids or messages of one; generate takes a list of prompts (wrap it in a list)"
        )
    if params is None or isinstance(params, SamplingParams):
        return [(prompt, params) for prompt in prompts]
    if not isinstance(params, SequenceOf):
        raise TypeError(f"params is a {type(params).__name__}; it is a SamplingParams, a list of them or None")
    if len(params) != len(prompts):
        raise InvalidPrompt(
            f"there are {len(prompts)} prompts and {len(params)} params; pass one for each, or one for all"
        )
    return list(zip(prompts, params, strict=True))


def make_sequence(
    seq_id: int,
    token_ids: list[int],
    params: SamplingParams,
    *,
    choice: int,
    max_model_len: int,
    vocab_size: int,
    eos_token_ids: frozenset[int],
) -> Sequence:
    """The Sequence of a request that fits, its open parameters resolved.

    Raises:
        PromptTooLong: the prompt, or the prompt and max_tokens, exceeds max_model_len.
        InvalidParameter: an id in the parameters lies outside the vocabulary, or choice is no 32-bit integer.
    """
    room = max_model_len - len(token_ids)
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {len(token_ids)} tokens; max_model_len is {max_model_len} and the answer needs one at "
            "least (shorten the prompt, or raise max_model_len where the model's context is longer)"
        )
    if params.max_tokens is not None and params.max_tokens > room:
        raise PromptTooLong(
            f"the prompt has {len(token_ids)} tokens and max_tokens is {params.max_tokens}, together "
            f"{len(token_ids) + params.max_tokens}; max_model_len is {max_model_len} (lower max_tokens to {room}, or "
            "raise max_model_len where the model's context is longer)"
        )
    max_tokens = room if params.max_tokens is None else params.max_tokens
    if params.min_tokens > max_tokens:
        raise InvalidParameter(
            f"min_tokens is {params.min_tokens}; only {max_tokens} tokens fit max_model_len (lower min_tokens)"
        )
    for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
        for token_id in ids:
            if token_id >= vocab_size:
                raise InvalidParameter(f"{name} holds token id {token_id}; ids are in [0, {vocab_size - 1}]")
    if isinstance(choice, bool) or not isinstance(choice, int) or not 0 <= choice < 2**32:
        raise InvalidParameter(f"choice is {shown(choice)}; it is an integer in [0, {2**32 - 1}]")
    stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
    seed = int.from_bytes(os.urandom(8), "little") if params.seed is None else params.seed
    return Sequence(seq_id, token_ids, params, max_tokens=max_tokens, seed=seed, choice=choice, stop_ids=stop_ids)
