"""InferneoClient against the real server: the two transports tell the same, errors included."""

from __future__ import annotations

import openai
import pytest

from inferneo import AsyncInferneoClient, InferneoClient

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 24, "seed": 11}
TRANSPORTS = pytest.mark.parametrize("transport", ["sse", "websocket"])


def stream(client, transport, **arguments):
    arguments = {**ASK, **arguments}
    if transport == "websocket":
        return client.websocket_chat(**arguments)
    return client.chat.completions.create(**arguments, stream=True)


def told(chunks, num_choices=1):
    """Text, number of tokens and finish_reason of each choice."""
    answers = [["", 0, None] for _ in range(num_choices)]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        answer = answers[choice.index]
        if choice.delta.content is not None:
            answer[0] += choice.delta.content
            answer[1] += 1
        answer[2] = choice.finish_reason or answer[2]
    return answers


@TRANSPORTS
def test_client_counts_the_tokens_of_the_usage(live_server, transport):
    server = live_server()
    with InferneoClient(server.url) as client:
        chunks = list(stream(client, transport, n=2, top_k=5, ignore_eos=True, stream_options={"include_usage": True}))
    answers = told(chunks, 2)
    assert [answer[1:] for answer in answers] == [[24, "length"], [24, "length"]]
    assert chunks[-1].usage.completion_tokens == 48


def test_transports_tell_the_same(live_server, run):
    server = live_server()
    with InferneoClient(server.url) as client:
        answers = [told(stream(client, transport, min_p=0.01)) for transport in ("sse", "websocket")]

    async def ask():
        async with AsyncInferneoClient(server.url) as client:
            over_http = [chunk async for chunk in await client.chat.completions.create(**ASK, min_p=0.01, stream=True)]
            over_websocket = [chunk async for chunk in client.websocket_chat(**ASK, min_p=0.01)]
            return [told(over_http), told(over_websocket)]

    answers += run(ask())
    assert answers[0][0][1] > 0
    assert answers == [answers[0]] * 4


@TRANSPORTS
def test_left_answer_leaves_the_server_idle(live_server, transport):
    server = live_server()
    with InferneoClient(server.url) as client:
        kept = stream(client, transport, ignore_eos=True)
        for _ in kept:
            break
        server.wait_until_idle()
        assert list(kept) == []
        assert told(stream(client, transport, ignore_eos=True))[0][1:] == [24, "length"]


@TRANSPORTS
@pytest.mark.parametrize(
    ("arguments", "expected", "message"),
    [
        ({"top_k": -1}, openai.BadRequestError, "top_k"),
        ({"model": "other"}, openai.NotFoundError, "other"),
        ({"extra_body": {"topk": 1}}, openai.BadRequestError, "topk"),
        ({"n": "3"}, openai.BadRequestError, "n"),
    ],
)
def test_bad_request_is_the_same_exception_on_both_transports(live_server, transport, arguments, expected, message):
    server = live_server()
    with InferneoClient(server.url) as client, pytest.raises(expected, match=message):
        list(stream(client, transport, **arguments))


@TRANSPORTS
def test_key_is_needed_where_the_server_has_one(live_server, transport):
    server = live_server(api_key="sesame")
    with InferneoClient(server.url, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        list(stream(client, transport))
    with InferneoClient(server.url, api_key="sesame") as client:
        assert told(stream(client, transport))[0][1] > 0
