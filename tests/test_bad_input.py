"""Requests that cannot be: each is refused by a typed error with value, limit and remedy; the engine goes on."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inferneo_core import ChatTemplateError, Engine, InvalidParameter, InvalidPrompt, PromptTooLong, SamplingParams
from inferneo_core.errors import shown

GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
HUGE = 10**5000  # more digits than Python agrees to print
NAN, INF = float("nan"), float("inf")
TEMPLATE = """{% for message in messages %}{% if message.role not in ('user', 'assistant') %}
{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}
[{{ message.role }}] {{ message.content }}{% endfor %}"""


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def case_id(value: object) -> str:
    return shown(value).encode("ascii", "replace").decode()[:40]


@pytest.fixture(scope="module")
def chat_model(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template that wants alternating roles."""
    directory = tmp_path_factory.mktemp("chat")
    for file in tiny_model().iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def one_engine(chat_model: Path) -> Iterator[Engine]:
    with Engine(chat_model, kv_cache_memory=8 * 2**20, num_threads=1) as engine:
        yield engine


@pytest.fixture
def engine(one_engine: Engine) -> Iterator[Engine]:
    """The same engine for every case; after each it holds no block and gives a normal request its tokens."""
    yield one_engine
    stats = one_engine.stats()
    assert stats.free_blocks + stats.cached_blocks == stats.total_blocks
    assert stats.running == stats.waiting == 0
    (completion,) = one_engine.generate([[5, 80, 200]], GREEDY)
    assert len(completion.token_ids) == 5


def refused(error: type[Exception], call: Callable[..., Any], *args: Any, words: str = "", **kwargs: Any) -> str:
    """The message of the error of exactly that type that the call raises; it holds each of the words."""
    with pytest.raises(error) as raised:
        call(*args, **kwargs)
    message = str(raised.value)
    assert type(raised.value) is error
    assert all(word in message for word in words.split()), message
    assert len(message) < 400
    return message


# Prompts


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty at least one token"),
        ([], "empty at least one token"),
        ((), "empty"),
        (range(0), "empty"),
        (None, "NoneType str, token ids messages"),
        (7, "int str"),
        (1.5, "float"),
        (b"bytes", "bytes"),
        (bytearray(b"bytes"), "bytearray"),
        (memoryview(b"bytes"), "memoryview"),
        ({"role": "user", "content": "Hi"}, "dict list of messages"),
        ({1, 2}, "set"),
        (iter([1, 2]), "iterator"),
        (np.array([1, 2]), "ndarray"),
        (torch.tensor([1, 2]), "Tensor"),
        ([263], "263 [0, 262]"),
        ([5, -1], "-1 [0, 262]"),
        ([HUGE], "[0, 262]"),
        ([-HUGE], "[0, 262]"),
        ([True], "True (int)"),
        ([1, 2.0], "2.0 (int)"),
        ([NAN], "nan (int)"),
        (["1"], "'1' (int)"),
        (["a text", "another"], "'a text' (int)"),
        ([None], "None"),
        ([[1, 2]], "[1, 2]"),
        ([1, {"role": "user", "content": "Hi"}], "{'role': (dict)"),
        ([{"role": "user", "content": "Hi"}, 1], "(dict)"),
        ([np.int64(5)], "5 (int)"),
        ([Unprintable()], "Unprintable (int)"),
        (["x" * 10**6], "xxx... (int)"),
        (array("d", [1.0]).tolist(), "1.0"),
        ("half a \ud800 pair", "U+D800 index 7"),
    ],
    ids=case_id,
)
def test_prompt_is_refused(prompt: Any, words: str, engine: Engine) -> None:
    refused(InvalidPrompt, engine.stream, prompt, GREEDY, words=words)
    refused(InvalidPrompt, engine.generate, [[1], prompt], GREEDY, words=words)


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "words"),
    [
        (512, None, "512 tokens; max_model_len shorten raise max_model_len"),
        (513, 1, "513 512 shorten"),
        (100_000, None, "100000 512"),
        (511, 2, "511 2, 513; 512 max_tokens to 1,"),
        (1, 512, "513; max_tokens to 511,"),
        (1, 2**31 - 1, "2147483647 max_tokens to 511,"),
    ],
)
def test_prompt_too_long_is_refused(num_tokens: int, max_tokens: int | None, words: str, engine: Engine) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    refused(PromptTooLong, engine.stream, [1] * num_tokens, params, words=words)
    refused(PromptTooLong, engine.stream, "a" * num_tokens, params, words=words)


def test_longest_prompts_that_fit_are_served(engine: Engine) -> None:
    (full,) = engine.generate([[1] * 511])
    assert (full.finish_reason, len(full.token_ids)) == ("length", 1)
    (full,) = engine.generate([[1] * 507], GREEDY)
    assert len(full.token_ids) == 5
    (open_ended,) = engine.generate([[1] * 500], SamplingParams(ignore_eos=True, seed=1))
    assert len(open_ended.token_ids) == 12


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("one prompt", "'one prompt' list"),
        (b"bytes", "bytes list"),
        (None, "None list"),
        (7, "7 list"),
        ({"a": 1}, "'a' list"),
        ({1}, "{1} list"),
        (iter([[1]]), "iterator list"),
        (np.array([[1, 2]]), "array list"),
        ([1, 2, 3], "list"),
        ([{"role": "user", "content": "Hi"}], "list"),
    ],
    ids=case_id,
)
def test_generate_refuses_what_is_no_list_of_prompts(prompts: Any, words: str, engine: Engine) -> None:
    refused(InvalidPrompt, engine.generate, prompts, GREEDY, words=words)


def test_generate_refuses_params_that_do_not_fit_the_prompts(engine: Engine) -> None:
    refused(InvalidPrompt, engine.generate, [[1], [2]], [GREEDY], words="2 prompts 1 params")
    for params in (7, {"max_tokens": 3}, [None, GREEDY], "ab"):
        with pytest.raises((TypeError, InvalidPrompt)):
            engine.generate([[1], [2], [3]], params)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [5, "greedy", {"max_tokens": 5}, SamplingParams])
def test_params_of_another_type_are_a_type_error(params: Any, engine: Engine) -> None:
    refused(TypeError, engine.stream, [1], params, words="params SamplingParams")


@pytest.mark.parametrize("choice", [-1, 2**32, HUGE, 1.0, "1", None, True, NAN], ids=case_id)
def test_choice_is_a_32_bit_integer(choice: Any, engine: Engine) -> None:
    refused(InvalidParameter, engine.stream, [1], GREEDY, choice=choice, words="choice [0, 4294967295]")


def test_unknown_keywords_are_type_errors(engine: Engine, chat_model: Path) -> None:
    refused(TypeError, engine.stream, [1], max_tokens=5, words="max_tokens")
    refused(TypeError, SamplingParams, best_of=5, words="best_of")
    refused(TypeError, Engine, chat_model, gpu_memory_utilization=0.9, words="gpu_memory_utilization")
    refused(TypeError, Engine, chat_model, "cpu", words="positional")


# Messages


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{}], "messages[0] role"),
        ([{"role": "user"}], "messages[0]['content'] missing"),
        ([{"content": "Hi"}], "messages[0] role"),
        ([{"role": 123, "content": "Hi"}], "messages[0] role"),
        ([{"role": "", "content": "Hi"}], "messages[0] role"),
        ([{"role": None, "content": "Hi"}], "role"),
        ([{"role": "user", "content": 123}], "messages[0]['content'] int"),
        ([{"role": "user", "content": None}], "NoneType"),
        ([{"role": "user", "content": b"Hi"}], "bytes"),
        ([{"role": "user", "content": ["Hi"]}], "messages[0]['content'][0] text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "text only"),
        ([{"role": "user", "content": "Hi"}, {"role": "user"}], "messages[1]"),
        ([{"role": "user", "content": "Hi", 5: 6}], "messages[0] 5 strings"),
        ([{"role": "user", "content": "Hi", "x": Unprintable()}], "Unprintable JSON"),
        ([{"role": "user", "content": "half a \ud800 pair"}], "U+D800"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, words: str, engine: Engine) -> None:
    refused(InvalidPrompt, engine.stream, messages, GREEDY, words=words)


def test_messages_nested_without_end_are_refused(engine: Engine) -> None:
    endless: dict[str, Any] = {"role": "user", "content": "Hi"}
    endless["itself"] = endless
    refused(InvalidPrompt, engine.stream, [endless], GREEDY, words="nests deeper 32")


@pytest.mark.parametrize(
    ("roles", "words"),
    [(["system"], "Only user and assistant roles"), (["assistant"], "alternate"), (["user", "user"], "alternate")],
)
def test_messages_that_the_template_refuses(roles: list[str], words: str, engine: Engine) -> None:
    messages = [{"role": role, "content": "Hi"} for role in roles]
    refused(ChatTemplateError, engine.stream, messages, GREEDY, words=f"refused {words}")


def test_messages_without_a_template_are_refused(tiny_engine: Any) -> None:
    message = {"role": "user", "content": "Hi"}
    refused(ChatTemplateError, tiny_engine().stream, [message], words="no chat template plain prompt")


def test_messages_longer_than_the_model_are_refused(engine: Engine) -> None:
    refused(PromptTooLong, engine.stream, [{"role": "user", "content": "Hi " * 400}], words="512 shorten")


# Parameters


RANGES: dict[str, tuple[list[Any], str]] = {
    "max_tokens": ([0, -1, 2**63, 1.5, "5"], "[1, 2147483647] None"),
    "temperature": ([-0.1, 1e-9, 101, 1e308, "hot", None], "[0 100] greedy"),
    "top_k": ([-1, 2**31, 1.0, "5", None], "[0, 2147483647] keeps every token"),
    "top_p": ([0, 0.0, -0.5, 1.001, "1", None], "(0, 1] keeps every token"),
    "min_p": ([-0.1, 1.1, "0", None], "[0, 1] keeps every token"),
    "typical_p": ([0, -1, 2, "1", None], "(0, 1] keeps every token"),
    "repetition_penalty": ([0, -1, 0.009, 101, "1", None], "[0.01, 100] none"),
    "presence_penalty": ([-2.1, 2.1, "0", None], "[-2, 2] none"),
    "frequency_penalty": ([-2.1, 2.1, "0", None], "[-2, 2] none"),
    "seed": ([-(2**63) - 1, 2**64, 1.0, "seed"], "fresh"),
    "min_tokens": ([-1, 2**31, 1.0, "1", None], "[0, 2147483647] no minimum"),
    "logprobs": ([-1, 21, 10**9, 1.0, "5"], "[0, 20] None"),
    "prompt_logprobs": ([-1, 21, 10**9, 1.0, "5"], "[0, 20] None"),
}
NEVER = [NAN, INF, -INF, HUGE, -HUGE, True, [], {}, b"1", 1j, Unprintable(), np.array([0.5, 0.5])]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, (values, _) in RANGES.items() for value in [*values, *NEVER]],
    ids=case_id,
)
def test_parameter_out_of_range_is_refused(name: str, value: Any) -> None:
    message = refused(InvalidParameter, SamplingParams, **{name: value})
    assert message.startswith(f"{name} is ")
    is_of_the_right_type = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_of_the_right_type or (isinstance(value, float) and "an integer" in message):
        assert "it is an integer" in message or "it is a number" in message
    else:
        assert all(word in message for word in RANGES[name][1].split()), message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("stop", "", "0 characters 1 to 1024 leave it out"),
        ("stop", ["end", ""], "0 characters"),
        ("stop", "x" * 1025, "1025 characters 1024"),
        ("stop", ["x"] * 10_000, "10000 strings at most 32 send fewer"),
        ("stop", 5, "5 string"),
        ("stop", None, "None string"),
        ("stop", b"end", "string"),
        ("stop", [5], "5 string"),
        ("stop", {"end"}, "'end' sequence of strings"),
        ("stop", {"end": 1}, "sequence of strings"),
        ("stop", [Unprintable()], "Unprintable"),
        ("stop_token_ids", 5, "5 sequence of token ids"),
        ("stop_token_ids", "5", "'5' sequence of token ids"),
        ("stop_token_ids", b"5", "sequence of token ids"),
        ("stop_token_ids", None, "None sequence"),
        ("stop_token_ids", list(range(129)), "129 at most 128 send fewer"),
        ("stop_token_ids", [-1], "-1 token id"),
        ("stop_token_ids", [HUGE], "token id"),
        ("stop_token_ids", [1.0], "1.0 integer"),
        ("stop_token_ids", [True], "True integer"),
        ("stop_token_ids", np.array([1]), "sequence of token ids"),
        ("logit_bias", 5, "5 mapping"),
        ("logit_bias", [(1, 1.0)], "mapping"),
        ("logit_bias", {"foo": 0}, "'foo' integer token ids"),
        ("logit_bias", {-1: 0}, "-1 token ids"),
        ("logit_bias", {HUGE: 0}, "token ids"),
        ("logit_bias", {True: 0}, "True"),
        ("logit_bias", {1: 100.5}, "logit_bias[1] 100.5 [-100, 100]"),
        ("logit_bias", {1: NAN}, "logit_bias[1] nan"),
        ("logit_bias", {1: -INF}, "logit_bias[1] -inf all but forbids"),
        ("logit_bias", {1: HUGE}, "logit_bias[1]"),
        ("logit_bias", {1: "1"}, "logit_bias[1] number"),
        ("logit_bias", dict.fromkeys(range(1025), 0.0), "1025 at most 1024 send fewer"),
        ("ignore_eos", 1, "1 True or False"),
        ("ignore_eos", "no", "'no' True or False"),
        ("ignore_eos", None, "None True or False"),
    ],
    ids=case_id,
)
def test_parameter_of_another_form_is_refused(name: str, value: Any, words: str) -> None:
    refused(InvalidParameter, SamplingParams, **{name: value}, words=words)


def test_min_tokens_beyond_max_tokens_is_refused(engine: Engine) -> None:
    refused(InvalidParameter, SamplingParams, max_tokens=3, min_tokens=4, words="4; max_tokens (3) raise")
    params = SamplingParams(min_tokens=13)
    refused(InvalidParameter, engine.stream, [1] * 500, params, words="13; 12 lower")


@pytest.mark.parametrize("params", [{"logit_bias": {1: 1.0, 263: 1.0}}, {"stop_token_ids": [1, 263]}], ids=case_id)
def test_token_ids_beyond_the_vocabulary_are_refused(params: dict[str, Any], engine: Engine) -> None:
    (name,) = params
    refused(InvalidParameter, engine.stream, [1], SamplingParams(**params), words=f"{name} 263; [0, 262]")


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=4, temperature=1e-3, top_k=2**31 - 1, top_p=1e-300, min_p=1.0, typical_p=1e-300),
        SamplingParams(max_tokens=4, temperature=100.0, repetition_penalty=100.0, presence_penalty=-2.0),
        SamplingParams(max_tokens=4, repetition_penalty=0.01, frequency_penalty=2.0, seed=-(2**63)),
        SamplingParams(max_tokens=4, seed=2**64 - 1, logprobs=20, prompt_logprobs=20, min_tokens=4),
        SamplingParams(max_tokens=4, logit_bias=dict.fromkeys(range(263), -100.0), ignore_eos=True),
        SamplingParams(max_tokens=4, stop=["x" * 1024] + [chr(97 + i) * 9 for i in range(31)], ignore_eos=True),
        SamplingParams(max_tokens=4, min_tokens=4, stop_token_ids=list(range(128))),
    ],
    ids=case_id,
)
def test_parameters_at_the_edge_are_served(params: SamplingParams, engine: Engine) -> None:
    (completion,) = engine.generate([[1, 2, 3]], params)
    assert 1 <= len(completion.token_ids) <= 4
    assert all(0 <= token_id < 263 for token_id in completion.token_ids)
