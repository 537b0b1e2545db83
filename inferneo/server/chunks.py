"""The JSON of answers: chunks of a stream, and whole ones, in the shapes of the OpenAI API.

One token is one chunk, always, so that who counts chunks counts tokens:

    chat          a chunk with the role and no content; one chunk a token; one with an empty delta and the finish_reason
    completions   one chunk a token, the last with the finish_reason

A token whose text is still held back, or that ends the text, is a chunk with the text "".
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any, TypeAlias

from inferneo.server.logprobs import (
    TextOffsets,
    chat_logprobs,
    completion_logprobs,
    scored_logprob,
    scored_output,
    scored_prompt,
)
from inferneo.server.requests import Plan
from inferneo_core import Completion, Logprob, Timings, Tokenizer, TokenOutput

Chunk: TypeAlias = dict[str, Any]
Entry: TypeAlias = dict[str, Any]  # one item of a chunk's "choices"


@dataclass(slots=True)
class EncodedPrompt:
    """A prompt as the engine takes it.

    Attributes:
        token_ids: what the model sees.
        text: what `echo` shows.
        logprobs: of its tokens, where the request asks for them, from its first answer's first token on.
    """

    token_ids: list[int]
    text: str
    logprobs: tuple[Logprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. A prompt counts once, however many answers it gets."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Envelope:
    """What every chunk of one answer has around its choices.

    Args:
        plan: of the request.
        is_stream: chunks, or one whole answer.
        omits_nulls: leave null fields out, for readers who ask `"content" in delta`, and send no chunk without
            choices. Over HTTP, nulls stand as in the OpenAI API.
    """

    def __init__(self, plan: Plan, *, is_stream: bool, omits_nulls: bool) -> None:
        kind = "chat.completion" if plan.is_chat else "text_completion"
        self.id = f"{'chatcmpl' if plan.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._omits_nulls = omits_nulls
        self._include_usage = plan.include_usage
        self._head: dict[str, Any] = {
            "id": self.id,
            "object": f"{kind}.chunk" if plan.is_chat and is_stream else kind,
            "created": int(time.time()),
            "model": plan.model,
        }
        if plan.request_id is not None:
            self._head["request_id"] = plan.request_id

    def chunk(self, entry: Entry, usage: Usage | None) -> Chunk:
        """One chunk with one choice's entry, and the usage so far if every chunk shows it."""
        chunk = {**self._head, "choices": [entry]}
        if usage is not None:
            chunk["usage"] = usage.to_json()
        elif self._include_usage:
            chunk["usage"] = None
        return omit_nulls(chunk) if self._omits_nulls else chunk

    def end(self, chunks: list[Chunk], usage: Usage, timings: Timings | None) -> None:
        """Add the request's usage, if it was asked for, to the last chunks of a stream."""
        if not self._include_usage:
            return
        last = {"usage": usage.to_json(), "timings": timings_json(timings)}
        if self._omits_nulls:
            chunks[-1].update(omit_nulls(last))
        else:
            chunks.append({**self._head, "choices": [], **last})

    def whole(self, entries: list[Entry], usage: Usage, timings: Timings | None) -> dict[str, Any]:
        """The answer that is no stream."""
        return {**self._head, "choices": entries, "usage": usage.to_json(), "timings": timings_json(timings)}


class ChatWriter:
    """The entries of one choice of a chat."""

    def __init__(self, index: int, plan: Plan, tokenizer: Tokenizer) -> None:
        self._index = index
        self._has_logprobs = plan.params.logprobs is not None
        self._tokenizer = tokenizer
        self._has_begun = False

    def write(self, output: TokenOutput, prompt: EncodedPrompt) -> list[Entry]:
        """The entries that one token brings."""
        logprobs = chat_logprobs([scored_output(output)], self._tokenizer) if self._has_logprobs else None
        entries = [self._entry({"content": output.text}, logprobs)]
        if not self._has_begun:
            self._has_begun = True
            entries.insert(0, self._entry({"role": "assistant", "content": None}))  # "" would count as a token
        if output.finish_reason is not None:
            entries.append(self._entry({}, None, output.finish_reason))
        return entries

    def whole(self, completion: Completion, prompt: EncodedPrompt) -> Entry:
        """The entry of a whole answer."""
        logprobs = None
        if completion.logprobs is not None:
            logprobs = chat_logprobs(map(scored_logprob, completion.logprobs), self._tokenizer)
        return {
            "index": self._index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
        }

    def _entry(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> Entry:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class CompletionWriter:
    """The entries of one choice of a completion."""

    def __init__(self, index: int, plan: Plan, tokenizer: Tokenizer) -> None:
        self._index = index
        self._plan = plan
        self._num_top = plan.params.logprobs  # None without log-probabilities
        self._tokenizer = tokenizer
        self._offsets = TextOffsets(tokenizer)
        self._has_begun = False

    def write(self, output: TokenOutput, prompt: EncodedPrompt) -> list[Entry]:
        """The entries that one token brings. An echo comes before the first, as an entry of its own."""
        entries = []
        if self._plan.echo and not self._has_begun:
            entries.append(self._entry(self._echo(prompt, output.token_id), self._prompt_scores(prompt), None))
        self._has_begun = True
        logprobs = None
        if self._num_top is not None:
            logprobs = self._logprobs([scored_output(output)])
        entries.append(self._entry(output.text, logprobs, output.finish_reason))
        return entries

    def whole(self, completion: Completion, prompt: EncodedPrompt) -> Entry:
        """The entry of a whole answer."""
        text, logprobs = completion.text, None
        if self._plan.echo:
            text = self._echo(prompt, completion.token_ids[0]) + text
            logprobs = self._prompt_scores(prompt)
        if completion.logprobs is not None:
            scores = self._logprobs([scored_logprob(one) for one in completion.logprobs])
            logprobs = scores if logprobs is None else _joined(logprobs, scores)
        return self._entry(text, logprobs, completion.finish_reason)

    def _echo(self, prompt: EncodedPrompt, first_token_id: int) -> str:
        """The prompt's text, and the space between it and the answer that a decoder strips from every text's start."""
        begins_with_space = self._tokenizer.token_bytes(first_token_id).startswith(b" ")
        return prompt.text + " " if self._tokenizer.strips_space and begins_with_space else prompt.text

    def _prompt_scores(self, prompt: EncodedPrompt) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        assert prompt.logprobs is not None, "the first token comes after the prompt's scores"
        logprobs = self._logprobs(scored_prompt(prompt.token_ids, prompt.logprobs, self._num_top))
        self._offsets.move_to(len(prompt.text))
        return logprobs

    def _logprobs(self, tokens: list[Any]) -> dict[str, Any]:
        return completion_logprobs(tokens, self._offsets, self._tokenizer, has_top=bool(self._num_top))

    def _entry(self, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> Entry:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


Writer: TypeAlias = ChatWriter | CompletionWriter


def timings_json(timings: Timings | None) -> dict[str, float] | None:
    """Where the time of the first choice went, in milliseconds and tokens per second."""
    if timings is None:
        return None
    names = ("queued_ms", "prefill_ms", "ttft_ms", "decode_ms", "tokens_per_s")
    return {name: round(getattr(timings, name), 3) for name in names}


def omit_nulls(value: Any) -> Any:
    """The same without the fields that are null. In a list, where places count, nulls stay."""
    if isinstance(value, dict):
        return {name: omit_nulls(item) for name, item in value.items() if item is not None}
    return [omit_nulls(item) for item in value] if isinstance(value, list) else value


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two objects of lists as one."""
    return {name: None if part is None else part + second[name] for name, part in first.items()}
