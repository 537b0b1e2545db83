"""The engine's own parameters as plain arguments of `create()`."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect

import openai
import pytest

from inferneo import AsyncInferneoClient, InferneoClient
from inferneo.client.parameters import EngineParameters

OURS = {
    "top_k": 5,
    "min_p": 0.05,
    "typical_p": 0.9,
    "repetition_penalty": 1.1,
    "stop_token_ids": [2, 7],
    "ignore_eos": True,
    "min_tokens": 3,
    "prompt_logprobs": 1,
    "request_id": "mine",
}
KINDS = pytest.mark.parametrize("kind", ["chat", "text"])


def endpoint(client, kind):
    return client.chat.completions if kind == "chat" else client.completions


def call(kind, say):
    return say.ask if kind == "chat" else {"model": "m", "prompt": "Hi"}


@pytest.fixture
def good(say):
    return {
        "chat": say.good,
        "text": say.Answer(say.sse(say.text_chunk("Hello"), say.text_chunk("!", "length"), "[DONE]")),
    }


@KINDS
def test_own_parameters_stand_beside_the_others_in_the_body(server, say, good, kind):
    server.will(good[kind])
    with InferneoClient(server.url) as client:
        list(endpoint(client, kind).create(**call(kind, say), **OURS, temperature=0.5, seed=7, stream=True))
    assert server.requests[0].body == {**call(kind, say), **OURS, "temperature": 0.5, "seed": 7, "stream": True}


@KINDS
def test_own_parameters_pass_through_the_async_client(server, say, good, kind):
    server.will(good[kind])

    async def run():
        async with AsyncInferneoClient(server.url) as client:
            stream = await endpoint(client, kind).create(**call(kind, say), **OURS, stream=True)
            return [chunk async for chunk in stream]

    assert asyncio.run(asyncio.wait_for(run(), 60))
    assert server.requests[0].body == {**call(kind, say), **OURS, "stream": True}


def test_own_parameters_pass_through_raw_responses(server, say):
    server.will(say.good)
    with InferneoClient(server.url) as client:
        raw = client.chat.completions.with_raw_response.create(**say.ask, top_k=5, stream=True)
        assert [chunk.choices[0].delta.content for chunk in raw.parse()] == [None, "Hello", " world", None]
    assert server.requests[0].body["top_k"] == 5


def test_extra_body_has_the_last_word(server, say):
    server.will(say.good)
    with InferneoClient(server.url) as client:
        list(client.chat.completions.create(**say.ask, top_k=5, min_p=0.1, extra_body={"top_k": 9}, stream=True))
    assert (server.requests[0].body["top_k"], server.requests[0].body["min_p"]) == (9, 0.1)


@KINDS
def test_unknown_argument_is_a_type_error(server, say, kind):
    with InferneoClient(server.url) as client, pytest.raises(TypeError, match="topk"):
        endpoint(client, kind).create(**call(kind, say), topk=5)
    assert not server.requests


@KINDS
def test_every_sampling_parameter_of_the_engine_is_accepted(kind):
    sampling_params = pytest.importorskip("inferneo_core.sampling_params")
    resources = openai.resources
    sdk = resources.chat.Completions if kind == "chat" else resources.Completions
    accepted = {*inspect.signature(sdk.create).parameters, *EngineParameters.__annotations__}
    assert {field.name for field in dataclasses.fields(sampling_params.SamplingParams)} <= accepted
    assert set(OURS) == set(EngineParameters.__annotations__)
