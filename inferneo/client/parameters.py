"""The sampling parameters that the engine has and the OpenAI API has not, as plain arguments of `create()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from inferneo.client.sdk import httpx


class EngineParameters(TypedDict, total=False):
    """What `create()` takes besides the SDK's own arguments. Their ranges are those of SamplingParams.

    Keys:
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than min_p times the most likely one.
        typical_p: keep the tokens nearest to the expected surprise, up to this probability.
        repetition_penalty: above 1, tokens of prompt and output become less likely.
        stop_token_ids: ids that end the answer as an end-of-text token does.
        ignore_eos: generate past end-of-text tokens.
        min_tokens: no end-of-text or stop token before so many tokens.
        prompt_logprobs: how many of the most likely tokens to report with each token of the prompt.
        request_id: the caller's name for the request; the answer repeats it.
    """

    top_k: int
    min_p: float
    typical_p: float
    repetition_penalty: float
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    prompt_logprobs: int
    request_id: str


if TYPE_CHECKING:
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatCreateParams
    from openai.types.completion_create_params import CompletionCreateParamsBase as TextCreateParams

    class RequestOptions(TypedDict, total=False):
        """What the SDK takes with every request."""

        extra_headers: Mapping[str, str]
        extra_query: Mapping[str, object]
        extra_body: object
        timeout: float | httpx.Timeout | None

    class ChatParameters(ChatCreateParams, EngineParameters, RequestOptions, total=False):
        """The arguments of a chat completion, `stream` apart."""

    class TextParameters(TextCreateParams, EngineParameters, RequestOptions, total=False):
        """The arguments of a text completion, `stream` apart."""


def to_extra_body(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with the engine's own moved to `extra_body`, the SDK's door for what it does not know.

    What the caller put into `extra_body` by hand has the last word, as it has in the SDK.
    """
    own = {name: value for name, value in arguments.items() if name in EngineParameters.__annotations__}
    rest = {name: value for name, value in arguments.items() if name not in own}
    if own:
        rest["extra_body"] = {**own, **(rest.get("extra_body") or {})}
    return rest
