"""Errors and settings: what clients and operators are told."""

from __future__ import annotations

import logging

import pytest

from inferneo.server.errors import ApiError, from_exception, too_many
from inferneo.server.settings import ServerSettings
from inferneo_core import ConfigError, EngineClosed, InvalidPrompt, PromptTooLong, StepFailed


def test_error_is_shaped_as_the_openai_api_has_it():
    error = ApiError(400, "no", param="n", code="c")
    assert error.to_json() == {"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "c"}}
    assert str(error) == "no"


def test_headers_say_whether_to_try_again():
    assert ApiError(400, "no").headers() == {"x-should-retry": "false"}
    later = ApiError(429, "later", should_retry=True, retry_after=0.2)
    assert later.headers() == {"x-should-retry": "true", "Retry-After": "1"}


@pytest.mark.parametrize(
    ("error", "status", "code", "should_retry"),
    [
        (InvalidPrompt("the prompt is empty"), 400, None, False),
        (PromptTooLong("the prompt has 9 tokens"), 400, "context_length_exceeded", False),
        (EngineClosed("closed"), 503, "shutting_down", True),
        (StepFailed("the step failed"), 500, "engine_error", True),
        (ZeroDivisionError("secret"), 500, "internal_error", False),
    ],
)
def test_exception_becomes_the_answer_that_fits_it(error, status, code, should_retry, caplog):
    with caplog.at_level(logging.ERROR):
        answer = from_exception(error)
    assert (answer.status, answer.code, answer.should_retry) == (status, code, should_retry)
    assert from_exception(answer) is answer
    assert (status == 400) == (answer.message == str(error) and answer.type == "invalid_request_error")
    assert "secret" not in answer.message
    assert bool(caplog.records) == (code == "internal_error")


def test_limit_names_value_limit_and_remedy():
    error = too_many("stop", 5, "strings", 4, "max_stops")
    assert error.message == "stop has 5 strings; at most 4 (send fewer, or raise the server's max_stops)"
    assert error.param == "stop"


def test_settings_have_a_default_for_everything_but_the_name():
    settings = ServerSettings(served_model_names=("a", "b"))
    assert settings.model_name == "a"
    assert settings.host == "127.0.0.1"


@pytest.mark.parametrize(
    "fields",
    [
        {"served_model_names": ()},
        {"served_model_names": ("",)},
        {"api_key": ""},
        {"port": 70_000},
        {"max_stops": 0},
        {"max_body_bytes": -1},
        {"max_request_seconds": 0.0},
        {"heartbeat_seconds": float("nan")},
        {"slow_reader_seconds": float("inf")},
    ],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        ServerSettings(**{"served_model_names": ("a",), **fields})
