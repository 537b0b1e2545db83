"""Requests as JSON: what is read, and what is refused by name."""

from __future__ import annotations

import pytest

from inferneo.server.errors import ApiError
from inferneo.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeRequest,
    read_json,
    validate,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a": [1, 2.5, true, null, "x"]}', {"a": [1, 2.5, True, None, "x"]}),
        ('{"a": "\\ud83c\\udf0d"}', {"a": "🌍"}),
        ("5", 5),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b"123456789012345678901234567890", 123456789012345678901234567890),
    ],
)
def test_json_is_read_as_plain_values(data, value):
    assert read_json(data) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{} {}",
        b"\xff\xfe",
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        '{"a": "\ud800"}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 100_000 + b"}",
        b"\xef\xbb\xbf{}",
        b"\x00",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_json_is_refused(data):
    with pytest.raises(ApiError) as caught:
        read_json(data)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_json"
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (ChatCompletionRequest, CHAT),
        (CompletionRequest, COMPLETION),
        (CompletionRequest, {**COMPLETION, "prompt": [1, 2]}),
        (CompletionRequest, {**COMPLETION, "prompt": [[1], [2]]}),
        (TokenizeRequest, {"prompt": "x"}),
        (DetokenizeRequest, {"tokens": [1]}),
    ],
)
def test_smallest_request_is_accepted(model, data):
    request = validate(model, data)
    assert {name: getattr(request, name) for name in data} == data


@pytest.mark.parametrize(("model", "data"), [(ChatCompletionRequest, CHAT), (CompletionRequest, COMPLETION)])
def test_null_stands_for_the_default(model, data):
    nulls = {name: None for name in model.model_fields if name not in data}
    assert validate(model, {**data, **nulls}) == validate(model, data)


@pytest.mark.parametrize("data", [[], "x", 5, True, None, 2.5])
def test_body_that_is_no_object_is_refused(data):
    with pytest.raises(ApiError, match="it is an object"):
        validate(ChatCompletionRequest, data)


@pytest.mark.parametrize(
    ("extra", "message", "param"),
    [
        ({"temprature": 1}, "unknown field 'temprature' (did you mean temperature?)", "temprature"),
        ({"chat_template_kwargs": {"tokenize": True}}, "unknown field 'chat_template_kwargs' (leave it out)", None),
        ({"n_discard": -1}, "unknown field 'n_discard' (leave it out)", "n_discard"),
        ({"n": "5"}, "n is '5'; it should be a valid integer", "n"),
        ({"n": True}, "n is True; it should be a valid integer", "n"),
        ({"n": 1.0}, "n is 1.0; it should be a valid integer", "n"),
        ({"temperature": "hot"}, "temperature is 'hot'; it should be a valid number", "temperature"),
        ({"stop": 5}, "stop is 5; it should be a valid string or a valid list", "stop"),
        ({"stream": "yes"}, "stream is 'yes'; it should be a valid boolean", "stream"),
        ({"logit_bias": [1]}, "logit_bias is [1]; it should be a valid dictionary", "logit_bias"),
        ({"messages": None}, "messages is None; it should be a valid list", "messages"),
        ({"messages": "hi"}, "messages is 'hi'; it should be a valid list", "messages"),
        ({"model": 5}, "model is 5; it should be a valid string", "model"),
    ],
)
def test_wrong_field_is_named_with_what_it_should_be(extra, message, param):
    with pytest.raises(ApiError) as caught:
        validate(ChatCompletionRequest, {**CHAT, **extra})
    assert caught.value.status == 400
    assert caught.value.message == message
    assert param is None or caught.value.param == param


def test_missing_field_is_named():
    with pytest.raises(ApiError, match=r"^messages is missing"):
        validate(ChatCompletionRequest, {"model": "m"})
    with pytest.raises(ApiError, match=r"^model is missing"):
        validate(CompletionRequest, {"prompt": "x"})


def test_error_about_a_huge_field_is_short():
    for extra in ({"x" * 10**6: 1}, {"model": ["y" * 10**6]}, {"seed": [10**4000] * 1000}):
        with pytest.raises(ApiError) as caught:
            validate(ChatCompletionRequest, {**CHAT, **extra})
        assert len(str(caught.value.to_json())) < 400


def test_field_of_a_nested_object_is_named_with_its_place():
    with pytest.raises(ApiError) as caught:
        validate(StreamOptions, {"include_usage": 1}, prefix="stream_options.")
    assert caught.value.param == "stream_options.include_usage"
    with pytest.raises(ApiError, match=r"did you mean stream_options\.include_usage\?"):
        validate(StreamOptions, {"include_use": True}, prefix="stream_options.")
