"""`websocket_chat`: the chunks and the exceptions of the SDK over a WebSocket."""

from __future__ import annotations

import asyncio
import gc
import threading
from contextlib import suppress

import openai
import pytest
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessage

from inferneo import AsyncInferneoClient, InferneoClient


@pytest.fixture
def client(server):
    with InferneoClient(server.url, api_key="k") as client:
        yield client


@pytest.fixture
def good(say):
    pieces = [say.chunk("Hello"), {"type": "pong"}, say.chunk(" world"), say.chunk(finish_reason="stop")]
    return say.Answer(pieces, end="hang")


@pytest.fixture
def hanging(say):
    return say.Answer([say.chunk("Hello"), say.chunk(" world")], end="hang")


def run_async(server, work):
    async def run():
        async with AsyncInferneoClient(server.url, api_key="k") as client:
            return await work(client)

    return asyncio.run(asyncio.wait_for(run(), 120))


async def client_left(server) -> bool:
    return await asyncio.to_thread(server.client_left)


def contents(chunks):
    return [chunk.choices[0].delta.content for chunk in chunks]


# Whole answers


def test_websocket_chat_yields_the_chunks_of_the_sdk(server, say, client, good):
    server.will(good)
    chunks = list(client.websocket_chat(**say.ask, temperature=0.0, top_k=5))
    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in chunks)
    assert contents(chunks) == ["Hello", " world", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]
    assert server.client_left()
    assert server.close_code == 1000
    request = server.requests[0]
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer k"
    assert request.body == {**say.ask, "temperature": 0.0, "top_k": 5, "stream": True}


def test_async_websocket_chat_yields_the_chunks_of_the_sdk(server, say, good):
    server.will(good)

    async def work(client):
        return [chunk async for chunk in client.websocket_chat(**say.ask, min_p=0.1)]

    assert contents(run_async(server, work)) == ["Hello", " world", None]
    assert server.requests[0].headers["authorization"] == "Bearer k"
    assert server.requests[0].body == {**say.ask, "min_p": 0.1, "stream": True}


def test_answer_ends_when_every_choice_and_the_usage_have_come(server, say, client):
    pieces = [say.chunk(finish_reason="stop", index=1), say.chunk("a"), say.chunk(finish_reason="length")]
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    last = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "usage": usage}
    server.will(say.Answer([*pieces, last], end="hang"))
    chunks = list(client.websocket_chat(**say.ask, n=2, stream_options={"include_usage": True}))
    assert [len(chunk.choices) for chunk in chunks] == [1, 1, 1, 0]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 3


def test_request_options_of_the_sdk_are_honoured(server, say, client, good):
    server.will(good)
    options = {"extra_headers": {"x-more": "2"}, "extra_query": {"q": "a b"}, "extra_body": {"top_k": 9}}
    copy = client.with_options(default_headers={"x-mine": "1", "authorization": "Basic abc"})
    assert len(list(copy.websocket_chat(**say.ask, top_k=5, user=openai.omit, **options))) == 3
    request = server.requests[0]
    assert (request.headers["x-mine"], request.headers["x-more"]) == ("1", "2")
    assert request.headers["authorization"] == "Basic abc"
    assert request.query == "q=a+b"
    assert request.body == {**say.ask, "top_k": 9, "stream": True}


def test_messages_may_be_the_sdks_own_objects_and_any_iterable(server, say, client, good):
    server.will(good)
    reply = ChatCompletionMessage(role="assistant", content="Yes?")
    question = {"role": "user", "content": "Hi"}
    list(client.websocket_chat(model="m", messages=iter([question, reply])))
    assert server.requests[0].body["messages"] == [question, {"role": "assistant", "content": "Yes?"}]


def test_lacking_argument_is_a_type_error(client):
    with pytest.raises(TypeError, match="lacks messages and model"):
        client.websocket_chat()


# Errors


@pytest.mark.parametrize(
    ("kind", "code", "expected"),
    [
        ("invalid_request_error", None, openai.BadRequestError),
        ("invalid_request_error", "model_not_found", openai.NotFoundError),
        ("authentication_error", "invalid_api_key", openai.AuthenticationError),
        ("rate_limit_error", None, openai.RateLimitError),
        ("server_error", None, openai.InternalServerError),
        ("timeout_error", None, openai.APIError),
    ],
)
def test_error_message_is_the_exception_that_http_would_have_raised(server, say, client, kind, code, expected):
    error = {"error": {"message": "top_k is -1", "type": kind, "param": "top_k", "code": code}}
    server.will(say.Answer([say.chunk("Hello"), error], close_code=1008))
    stream = client.websocket_chat(**say.ask)
    assert next(stream).choices[0].delta.content == "Hello"
    with pytest.raises(expected, match="top_k is -1") as caught:
        next(stream)
    assert type(caught.value) is expected
    assert (caught.value.param, caught.value.code) == ("top_k", code)
    assert list(stream) == []


def test_async_error_message_is_the_exception_that_http_would_have_raised(server, say):
    server.will(say.Answer([say.error], close_code=1011))

    async def work(client):
        with pytest.raises(openai.InternalServerError, match="it broke"):
            async for _ in client.websocket_chat(**say.ask):
                pass

    run_async(server, work)


@pytest.mark.parametrize("odd", ["no object", None])
def test_error_without_the_usual_shape_is_an_api_error(server, say, client, odd):
    server.will(say.Answer([{"error": odd}], close_code=1011))
    with pytest.raises(openai.APIError, match=str(odd)):
        list(client.websocket_chat(**say.ask))


@pytest.mark.parametrize("code", [1000, 1011])
def test_connection_that_closes_before_the_end_raises(server, say, client, code):
    server.will(say.Answer([say.chunk("Hello")], close_code=code))
    with pytest.raises(openai.APIConnectionError, match=f"after 1 chunks and before the finish_reason.*{code}"):
        list(client.websocket_chat(**say.ask))


def test_async_connection_that_closes_before_the_end_raises(server, say):
    server.will(say.Answer([say.chunk("Hello")]))

    async def work(client):
        with pytest.raises(openai.APIConnectionError, match="before the finish_reason"):
            async for _ in client.websocket_chat(**say.ask):
                pass

    run_async(server, work)


def refusal(say):
    return say.Answer([b'{"error": {"message": "no such key", "type": "authentication_error"}}'], status=401)


def test_refused_upgrade_raises_the_exception_of_its_status(server, say, client):
    server.will(refusal(say))
    with pytest.raises(openai.AuthenticationError, match="no such key"):
        client.websocket_chat(**say.ask)


def test_refused_async_upgrade_raises_the_exception_of_its_status(server, say):
    server.will(refusal(say))

    async def work(client):
        with pytest.raises(openai.AuthenticationError, match="no such key"):
            await client.websocket_chat(**say.ask).__anext__()

    run_async(server, work)


def test_absent_server_is_a_connection_error(say):
    client = InferneoClient("http://127.0.0.1:1")
    with pytest.raises(openai.APIConnectionError, match="no WebSocket to"):
        client.websocket_chat(**say.ask)


def test_silent_server_times_out(server, say, client, hanging):
    server.will(hanging)
    with pytest.raises(openai.APITimeoutError):
        list(client.websocket_chat(**say.ask, timeout=openai.Timeout(60.0, read=0.5)))
    assert server.client_left()


# Streams that are left


def leave_by_break(stream):
    for _ in stream:
        break


def leave_by_exception(stream):
    with suppress(KeyError):
        for _ in stream:
            raise KeyError


def leave_by_with(stream):
    with stream as same:
        next(same)


def leave_by_close(stream):
    stream.close()
    stream.close()


LEAVE = (leave_by_break, leave_by_exception, leave_by_with, leave_by_close)


@pytest.mark.parametrize("leave", LEAVE, ids=lambda leave: leave.__name__)
def test_left_websocket_is_closed_and_yields_nothing_more(server, say, client, hanging, leave):
    server.will(hanging)
    stream = client.websocket_chat(**say.ask)
    leave(stream)
    assert server.client_left()
    assert server.close_code == 1000
    assert list(stream) == []
    assert next(stream, None) is None


def test_dropped_websocket_is_cut_without_the_garbage_collector(server, say, client, hanging):
    server.will(hanging)
    gc.disable()
    try:
        stream = client.websocket_chat(**say.ask)
        next(stream)
        del stream
        assert server.client_left()
    finally:
        gc.enable()


def test_websocket_closed_by_another_thread_ends_its_reader(server, say, client, hanging):
    server.will(hanging)
    stream = client.websocket_chat(**say.ask)
    assert contents([next(stream), next(stream)]) == ["Hello", " world"]
    rest = []
    reader = threading.Thread(target=lambda: rest.append(list(stream)))
    reader.start()
    stream.close()
    reader.join(60)
    assert rest == [[]]
    assert server.client_left()


async def async_leave_by_break(stream):
    async for _ in stream:
        break


async def async_leave_by_with(stream):
    async with stream as same:
        await same.__anext__()


async def async_leave_by_close(stream):
    await stream.__anext__()
    await stream.close()
    await stream.close()


ASYNC_LEAVE = (async_leave_by_break, async_leave_by_with, async_leave_by_close)


@pytest.mark.parametrize("leave", ASYNC_LEAVE, ids=lambda leave: leave.__name__)
def test_left_async_websocket_is_closed_and_yields_nothing_more(server, say, hanging, leave):
    server.will(hanging)

    async def work(client):
        stream = client.websocket_chat(**say.ask)
        await leave(stream)
        assert await client_left(server)
        assert server.close_code == 1000
        assert [chunk async for chunk in stream] == []

    run_async(server, work)


def test_dropped_async_websocket_is_cut_without_the_garbage_collector(server, say, hanging):
    server.will(hanging)

    async def work(client):
        stream = client.websocket_chat(**say.ask)
        await stream.__anext__()
        del stream
        assert await client_left(server)

    gc.disable()
    try:
        run_async(server, work)
    finally:
        gc.enable()


def test_async_websocket_that_was_never_read_never_connects(server, say):
    async def work(client):
        stream = client.websocket_chat(**say.ask)
        await stream.close()
        assert [chunk async for chunk in stream] == []

    run_async(server, work)
    assert not server.requests
