"""Plans: the meaning of each field, and the limit of each."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from inferneo.server.errors import ApiError
from inferneo.server.protocol import ChatCompletionRequest, CompletionRequest, validate
from inferneo.server.requests import INLINE_ITEMS, encode_prompts, make_plan
from inferneo_core import SamplingParams, Tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def plan(settings):
    """plan(fields) of a chat, or of a completion where they hold a prompt."""

    def make(fields: dict[str, Any], *, is_stream: bool = False, **limits: Any) -> Any:
        model = CompletionRequest if "prompt" in fields else ChatCompletionRequest
        given = {"model": "tiny", **({} if "prompt" in fields else {"messages": MESSAGES}), **fields}
        return make_plan(validate(model, given), settings(**limits), is_stream=is_stream)

    return make


@pytest.fixture(scope="session")
def tokenizer(chat_model):
    return Tokenizer.from_directory(chat_model)


# What the fields mean


def test_defaults_are_those_of_the_openai_api(plan):
    chat = plan({})
    assert chat.params == SamplingParams(max_tokens=None, temperature=1.0)
    assert (chat.is_chat, chat.num_choices, chat.echo, chat.include_usage) == (True, 1, False, False)
    assert plan({"prompt": "x"}).params == SamplingParams(max_tokens=16, temperature=1.0)


def test_every_sampling_parameter_of_the_engine_is_passed_on(plan):
    fields = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.8,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "seed": -5,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "min_tokens": 2,
        "prompt_logprobs": 1,
    }
    expected = SamplingParams(**fields, logit_bias={5: -1.0}, logprobs=2)
    assert set(SamplingParams.__slots__) == {*fields, "logit_bias", "logprobs"}
    shared = {**fields, "logit_bias": {"5": -1}}
    assert plan({**shared, "logprobs": True, "top_logprobs": 2}).params == expected
    assert plan({**shared, "prompt": "x", "logprobs": 2}).params == expected


def test_max_completion_tokens_is_another_name_of_max_tokens(plan):
    assert plan({"max_completion_tokens": 9}).params.max_tokens == 9
    assert plan({"max_completion_tokens": 9, "max_tokens": 9}).params.max_tokens == 9


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ("text",)),
        ([1, 2], ([1, 2],)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ([1], [2, 3])),
    ],
)
def test_prompt_is_one_or_several(prompt, prompts, plan):
    assert plan({"prompt": prompt}).prompts == prompts


def test_siblings_do_not_score_the_prompt_again(plan):
    made = plan({"prompt": "x", "echo": True, "logprobs": 3, "n": 2})
    assert made.params.prompt_logprobs == made.params.logprobs == 3
    assert made.sibling_params == SamplingParams(max_tokens=16, logprobs=3)
    assert made.num_prompt_logprobs is None


def test_echo_scores_as_much_of_the_prompt_as_both_fields_ask_for(plan):
    made = plan({"prompt": "x", "echo": True, "logprobs": 1, "prompt_logprobs": 4})
    assert made.params.prompt_logprobs == made.num_prompt_logprobs == 4
    assert plan({"prompt": "x", "echo": True, "logprobs": 4, "prompt_logprobs": 1}).params.prompt_logprobs == 4
    assert plan({"prompt": "x", "echo": True}).params.prompt_logprobs is None


def test_stream_options_are_read(plan):
    made = plan({"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, is_stream=True)
    assert made.include_usage and made.continuous_usage


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "store": True},
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "modalities": ["text"]},
        {"prompt": "x", "best_of": 1, "suffix": ""},
    ],
)
def test_fields_that_ask_for_nothing_special_are_accepted(fields, plan):
    assert plan(fields).num_choices == 1


# What is refused

BAD_FIELDS = [
    ({"n": 0}, "n is 0; it is at least 1", "n"),
    ({"n": -1}, "n is -1", "n"),
    ({"n": 129}, "n is 129; one request has at most 128 answers", "n"),
    ({"n": 10**6}, "at most 128", "n"),
    ({"n": 10**30}, "at most 128", "n"),
    ({"prompt": ["a"] * 65, "n": 2}, r"65 prompts times n \(2\)", "prompt"),
    ({"prompt": [[1]] * 129}, "at most 128", "prompt"),
    ({"prompt": ["a", [1]]}, r"prompt\[1\] is \[1\]", "prompt"),
    ({"prompt": MESSAGES}, "/v1/chat/completions", "prompt"),
    ({"messages": []}, "messages are empty", "messages"),
    ({"messages": [123]}, r"messages\[0\] is 123", "messages"),
    ({"messages": MESSAGES * 1025}, "messages has 1025 items; at most 1024", "messages"),
    ({"messages": [{"role": "user", "content": "x" * 2**20 + "y"}]}, "at most 1048576", "prompt"),
    ({"prompt": "x" * (2**20 + 1)}, "the prompt has 1048577 characters", "prompt"),
    ({"prompt": [1] * (2**20 + 1)}, "at most 1048576", "prompt"),
    ({"temperature": -0.1}, "temperature is -0.1", "temperature"),
    ({"temperature": 1e999}, "temperature is inf", "temperature"),
    ({"top_p": 0.0}, "top_p is 0.0", "top_p"),
    ({"top_p": 1.1}, "top_p is 1.1", "top_p"),
    ({"top_k": -1}, "top_k is -1", "top_k"),
    ({"min_p": 2}, "min_p is 2", "min_p"),
    ({"max_tokens": 0}, "max_tokens is 0", "max_tokens"),
    ({"max_tokens": -1}, "max_tokens is -1", "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens is 9223372036854775808", "max_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "they mean the same", "max_completion_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5", "min_tokens"),
    ({"seed": 2**64}, "seed is", "seed"),
    ({"presence_penalty": 3}, "presence_penalty is 3", "presence_penalty"),
    ({"logit_bias": {"foo": 0}}, "logit_bias has the key 'foo'", "logit_bias"),
    ({"logit_bias": {"-1": 0}}, "logit_bias has the key '-1'", "logit_bias"),
    ({"logit_bias": {"9" * 5000: 0}}, "logit_bias has the key", "logit_bias"),
    ({"logit_bias": {"²": 0}}, "logit_bias has the key", "logit_bias"),
    ({"logit_bias": {"1": "x"}}, r"logit_bias\[1\] is 'x'", None),
    ({"logit_bias": {"1": 101}}, r"logit_bias\[1\] is 101", None),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias has 1025 entries; at most 1024", "logit_bias"),
    ({"stop": ["a"] * 5}, "stop has 5 strings; at most 4", "stop"),
    ({"stop": ["a"] * 500_000}, "stop has 500000 strings; at most 4", "stop"),
    ({"stop": ""}, "a stop string has 0 characters", None),
    ({"stop": [5]}, "a stop string is 5", None),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids has 129 ids; at most 128", "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "a stop_token_id is 'a'", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; at most 20", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 10**9}, "at most 20", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "logprobs is -1", "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs is 2 without logprobs", "top_logprobs"),
    ({"prompt": "x", "logprobs": 21}, "logprobs is 21; at most 20", "logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs is -1", "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs is 21; at most 20", "prompt_logprobs"),
    ({"request_id": "x" * 257}, "request_id has 257 characters", "request_id"),
    ({"prompt": "x", "best_of": 5}, r"best_of is 5.*leave it out, or send 1", "best_of"),
    ({"prompt": "x", "best_of": 10**30}, "best_of is", "best_of"),
    ({"prompt": "x", "suffix": "y"}, "suffix is 'y'", "suffix"),
    ({"tools": [{"type": "function"}]}, "tools is", "tools"),
    ({"tool_choice": "required"}, "tool_choice is", "tool_choice"),
    ({"functions": [{}]}, "functions is", "functions"),
    ({"response_format": {"type": "json_object"}}, r"response_format is .*\{'type': 'text'\}", "response_format"),
    ({"audio": {}}, "audio is", "audio"),
    ({"stream_options": {"include_usage": True}}, "stream_options go with a stream", "stream_options"),
]


@pytest.mark.parametrize(("fields", "message", "param"), BAD_FIELDS, ids=lambda value: str(value)[:40])
def test_bad_field_is_named_with_its_limit(fields, message, param, plan):
    with pytest.raises(ApiError, match=message) as caught:
        plan(fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert len(caught.value.message) < 300
    assert not caught.value.should_retry


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ],
)
def test_bad_field_of_a_stream_is_named(fields, param, plan):
    with pytest.raises(ApiError) as caught:
        plan(fields, is_stream=True)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_unknown_model_is_a_404_that_lists_the_known_ones(plan):
    with pytest.raises(ApiError, match="'gpt-5' is not served here; it is tiny, alias") as caught:
        plan({"model": "gpt-5"})
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert plan({"model": "alias"}).model == "alias"


@pytest.mark.parametrize(
    ("limits", "fields"),
    [
        ({"max_choices": 2}, {"n": 3}),
        ({"max_messages": 1}, {"messages": MESSAGES * 2}),
        ({"max_prompt_chars": 3}, {"prompt": "four"}),
        ({"max_logprobs": 1}, {"logprobs": True, "top_logprobs": 2}),
        ({"max_stops": 1}, {"stop": ["a", "b"]}),
        ({"max_stop_token_ids": 1}, {"stop_token_ids": [1, 2]}),
    ],
)
def test_limit_is_the_servers_setting_and_names_it(limits, fields, plan):
    assert plan(fields)
    with pytest.raises(ApiError, match=next(iter(limits))):
        plan(fields, **limits)


# Tokens


def test_large_prompts_are_tokenized_off_the_event_loop(run, tokenizer, monkeypatch):
    threads = set()
    encode = Tokenizer.encode

    def watched(self: Tokenizer, text: str, **options: Any) -> list[int]:
        threads.add(threading.current_thread())
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    text = "x" * (INLINE_ITEMS + 1)
    assert run(encode_prompts(("ab", "c"), tokenizer, 263)) == [encode(tokenizer, "ab"), encode(tokenizer, "c")]
    assert threads == {threading.main_thread()}
    assert run(encode_prompts((text,), tokenizer, 263)) == [encode(tokenizer, text)]
    assert len(threads) == 2


@pytest.mark.parametrize(
    "prompt",
    ["", [], [263], [-1], [True], ["a", 1], [1, "a"], [[]], [{"role": "user"}], [{"role": 123, "content": "x"}]],
)
def test_prompt_that_is_no_prompt_is_a_400(prompt, run, tokenizer):
    with pytest.raises(ApiError) as caught:
        run(encode_prompts((prompt,), tokenizer, 263))
    assert caught.value.status == 400
