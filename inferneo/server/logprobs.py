"""Log-probabilities in the shapes of the two endpoints of the OpenAI API, and in vLLM's for a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from inferneo_core import Logprob, Tokenizer, TokenOutput
from inferneo_core.stream_decoder import StreamDecoder

LEAST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI's API writes this


class Scored(NamedTuple):
    """One token with its log-probability; None for the first of a prompt, which follows nothing."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def scored_output(output: TokenOutput) -> Scored:
    """A generated token, as it came from a stream that reports log-probabilities."""
    return Scored(output.token_id, output.logprob, output.top_logprobs or ())


def scored_logprob(logprob: Logprob) -> Scored:
    """A generated token, as it stands in a Completion."""
    return Scored(logprob.token_id, logprob.logprob, logprob.top)


def scored_prompt(token_ids: Sequence[int], logprobs: Sequence[Logprob | None], num_top: int) -> list[Scored]:
    """The tokens of a prompt, each with at most num_top others."""
    return [
        Scored(token_id, None, ()) if one is None else Scored(token_id, one.logprob, one.top[:num_top])
        for token_id, one in zip(token_ids, logprobs, strict=True)
    ]


def chat_logprobs(tokens: Iterable[Scored], tokenizer: Tokenizer) -> dict[str, Any]:
    """{"content": [...], "refusal": None}, one entry a token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = _shown_bytes(tokenizer, token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}

    content = []
    for token_id, logprob, top in tokens:
        assert logprob is not None, "a chat has no scores of its prompt here"
        content.append({**entry(token_id, logprob), "top_logprobs": [entry(*pair) for pair in top]})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[Scored], offsets: TextOffsets, tokenizer: Tokenizer, *, has_top: bool
) -> dict[str, Any]:
    """{"tokens", "token_logprobs", "top_logprobs", "text_offset"}, a list each; top_logprobs is None without has_top.

    A token's own log-probability is among its top_logprobs, even where it is not one of the most likely.
    """

    def text(token_id: int) -> str:
        return _shown_bytes(tokenizer, token_id).decode("utf-8", "replace")

    def top_of(token: Scored) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        by_text: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            by_text.setdefault(text(token_id), _finite(logprob))  # of two that read alike, the likelier stays
        return by_text

    return {
        "tokens": [text(token.token_id) for token in tokens],
        "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
        "top_logprobs": [top_of(token) for token in tokens] if has_top else None,
        "text_offset": [offsets.push(token.token_id) for token in tokens],
    }


def prompt_logprobs(
    logprobs: Sequence[Logprob | None], num_top: int, tokenizer: Tokenizer
) -> list[dict[str, Any] | None]:
    """For each token of a prompt {token id: {"logprob", "rank", "decoded_token"}}; None for the first. As in vLLM.

    The num_top most likely tokens are there, and the prompt's own.
    """

    def entries(one: Logprob) -> dict[str, Any]:
        ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(one.top[:num_top], 1)}
        ranked[one.token_id] = (one.logprob, one.rank)
        return {
            str(token_id): {
                "logprob": _finite(logprob),
                "rank": rank,
                "decoded_token": _shown_bytes(tokenizer, token_id).decode("utf-8", "replace"),
            }
            for token_id, (logprob, rank) in ranked.items()
        }

    return [None if one is None else entries(one) for one in logprobs]


class TextOffsets:
    """Where in an answer's text each token begins, counted in characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._length = 0

    def push(self, token_id: int) -> int:
        """The offset of the next token: the characters that are whole before it."""
        offset = self._length
        self._length += len(self._decoder.push(token_id))
        return offset

    def move_to(self, offset: int) -> None:
        """Set where the next token begins: a prompt's text may hold more than its tokens decode to."""
        self._length = offset


def _shown_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """A token's bytes; a special token's are those of its name."""
    return tokenizer.token_bytes(token_id) or tokenizer.id_to_token(token_id).encode()


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
