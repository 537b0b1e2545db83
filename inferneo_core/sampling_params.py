"""SamplingParams: what one request asks of the sampler, validated once, when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inferneo_core.errors import InvalidParameter, shown

MAX_STOP_STRINGS = 32
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next tokens of one request are chosen, and when it stops.

    The filters apply in this order, each on the renormalised rest of the one before: penalties, logit_bias,
    min_tokens, temperature, top_k, typical_p, top_p, min_p.

    Args:
        max_tokens: tokens to generate at most; None runs to the engine's max_model_len.
        temperature: 0 is greedy; otherwise the logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all. Ties go to the lowest id.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least top_p, in (0, 1].
        min_p: drop tokens less likely than min_p times the most likely one, in [0, 1].
        typical_p: keep the fewest tokens nearest to the expected surprise whose probabilities sum to at least
            typical_p, in (0, 1]. Source: arXiv 2202.00666.
        repetition_penalty: > 1 makes tokens of prompt and output less likely. Source: arXiv 1909.05858.
        presence_penalty: subtracted from the logit of every token already generated, in [-2, 2].
        frequency_penalty: subtracted once for each time a token was generated, in [-2, 2].
        logit_bias: {token_id: bias}, added to the logits, each in [-100, 100].
        seed: fixes the draw; None draws a fresh seed. Any 64-bit integer.
        stop: a string, or strings, before which the text is cut.
        stop_token_ids: ids that end the stream as an end-of-text token does.
        ignore_eos: generate past end-of-text tokens.
        min_tokens: no end-of-text or stop token before so many tokens.
        logprobs: how many of the most likely tokens to report with each token; None reports no log-probability.
        prompt_logprobs: the same for the tokens of the prompt.

    Raises:
        InvalidParameter: a value is of the wrong type or out of its range.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1, "leave it None to run to max_model_len")
        _number("temperature", self.temperature, 0.0, 100.0, "0 is greedy")
        if 0.0 < self.temperature < 1e-3:
            raise InvalidParameter(f"temperature is {self.temperature}; it is 0 or in [0.001, 100] (0 is greedy)")
        _integer("top_k", self.top_k, 0, 2**31 - 1, "0 keeps every token")
        _number("top_p", self.top_p, 0.0, 1.0, "1 keeps every token", open_below=True)
        _number("min_p", self.min_p, 0.0, 1.0, "0 keeps every token")
        _number("typical_p", self.typical_p, 0.0, 1.0, "1 keeps every token", open_below=True)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "1 is none")
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0, "0 is none")
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "0 is none")
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1, "leave it None for a fresh one")
        if not isinstance(self.ignore_eos, bool):
            raise InvalidParameter(f"ignore_eos is {shown(self.ignore_eos)}; it is True or False")
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1, "0 is no minimum")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter(
                f"min_tokens is {self.min_tokens}; it is at most max_tokens ({self.max_tokens}) (raise max_tokens)"
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value, 0, MAX_LOGPROBS, "None reports none")
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_stop_ids(self.stop_token_ids))

    @property
    def needs_penalties(self) -> bool:
        """Whether any penalty changes the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def has_filters(self) -> bool:
        """Whether a draw may be kept from some tokens: a greedy choice never is."""
        filters = self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0 or self.typical_p < 1.0
        return self.temperature > 0.0 and filters


def _integer(name: str, value: object, low: int, high: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameter(f"{name} is {shown(value)}; it is an integer ({remedy})")
    if not low <= value <= high:
        raise InvalidParameter(f"{name} is {shown(value)}; it is in [{low}, {high}] ({remedy})")


def _number(name: str, value: object, low: float, high: float, remedy: str, *, open_below: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidParameter(f"{name} is {shown(value)}; it is a number ({remedy})")
    inside = low < value <= high if open_below else low <= value <= high
    if not inside:  # nor is NaN, whatever it is compared with
        bracket = "(" if open_below else "["
        raise InvalidParameter(f"{name} is {shown(value)}; it is in {bracket}{low:g}, {high:g}] ({remedy})")


def _checked_bias(bias: object) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise InvalidParameter(f"logit_bias is {shown(bias)}; it is a mapping of token id to bias")
    if len(bias) > MAX_LOGIT_BIAS_ENTRIES:
        raise InvalidParameter(f"logit_bias has {len(bias)} entries; at most {MAX_LOGIT_BIAS_ENTRIES} (send fewer)")
    for token_id, value in bias.items():
        _integer("a logit_bias key", token_id, 0, MAX_TOKEN_ID, "keys are token ids")
        _number(f"logit_bias[{token_id}]", value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, "-100 all but forbids a token")
    return {token_id: float(value) for token_id, value in bias.items()} or None


def _checked_stop(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence):
        raise InvalidParameter(f"stop is {shown(stop)}; it is a string or a sequence of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidParameter(f"stop has {len(strings)} strings; at most {MAX_STOP_STRINGS} (send fewer)")
    for string in strings:
        if not isinstance(string, str):
            raise InvalidParameter(f"a stop string is {shown(string)}; it is a string")
        if not 1 <= len(string) <= MAX_STOP_STRING_CHARS:
            raise InvalidParameter(
                f"a stop string has {len(string)} characters; it has 1 to {MAX_STOP_STRING_CHARS} (leave it out)"
            )
    return tuple(dict.fromkeys(strings))


def _checked_stop_ids(token_ids: object) -> tuple[int, ...]:
    if isinstance(token_ids, (str, bytes, bytearray)) or not isinstance(token_ids, Sequence):
        raise InvalidParameter(f"stop_token_ids is {shown(token_ids)}; it is a sequence of token ids")
    if len(token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidParameter(f"stop_token_ids has {len(token_ids)} ids; at most {MAX_STOP_TOKEN_IDS} (send fewer)")
    for token_id in token_ids:
        _integer("a stop_token_id", token_id, 0, MAX_TOKEN_ID, "it is a token id")
    return tuple(dict.fromkeys(token_ids))
