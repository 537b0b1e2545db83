"""Streams over HTTP: left ones are closed, truncated ones raise, errors arrive as the SDK's exceptions."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from contextlib import suppress

import openai
import pytest

from inferneo import AsyncInferneoClient, InferneoClient
from inferneo.client import AsyncInferneoStream, InferneoStream


@pytest.fixture
def client(server):
    with InferneoClient(server.url, max_retries=0) as client:
        yield client


def run_async(server, work, **options):
    """`work(client)` in an event loop of its own."""

    async def run():
        async with AsyncInferneoClient(server.url, max_retries=0, **options) as client:
            return await work(client)

    return asyncio.run(asyncio.wait_for(run(), 120))


async def client_left(server) -> bool:
    return await asyncio.to_thread(server.client_left)


def contents(chunks):
    return [chunk.choices[0].delta.content for chunk in chunks]


# Whole streams


def test_stream_yields_every_chunk_and_closes(server, say, client):
    server.will(say.good)
    stream = client.chat.completions.create(**say.ask, stream=True)
    assert isinstance(stream, InferneoStream)
    assert contents(stream) == [None, "Hello", " world", None]
    assert stream.response.is_closed
    assert list(stream) == []


def test_async_stream_yields_every_chunk_and_closes(server, say):
    server.will(say.good)

    async def work(client):
        stream = await client.chat.completions.create(**say.ask, stream=True)
        assert isinstance(stream, AsyncInferneoStream)
        assert contents([chunk async for chunk in stream]) == [None, "Hello", " world", None]
        assert stream.response.is_closed
        assert [chunk async for chunk in stream] == []

    run_async(server, work)


def test_answer_that_is_not_streamed_is_the_sdks_own(server, say, client):
    answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": []}
    server.will(say.Answer([json.dumps(answer).encode()], headers={"content-type": "application/json"}))
    assert client.chat.completions.create(**say.ask).id == "1"


def test_stream_of_several_answers_ends_when_all_have(server, say, client):
    usage = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [], "usage": None}
    events = [
        say.text_chunk("a", index=0),
        say.text_chunk("b", "stop", index=1),
        say.text_chunk("c", "length", index=0),
    ]
    server.will(say.Answer(say.sse(*events, usage, "[DONE]")))
    stream = client.completions.create(model="m", prompt="Hi", n=2, stream=True)
    assert [choice.text for chunk in stream for choice in chunk.choices] == ["a", "b", "c"]


def test_heartbeats_are_no_chunks(server, say, client):
    server.will(say.Answer([b": ping\n\n", *say.good.pieces[:2], b": ping\n\n", *say.good.pieces[2:]]))
    assert contents(client.chat.completions.create(**say.ask, stream=True)) == [None, "Hello", " world", None]


# Truncated streams and errors


def truncated(say, end):
    return [
        say.Answer(say.sse(say.chunk(), say.chunk("Hello")), end=end),
        say.Answer(say.sse(say.chunk("a", "stop", index=0), say.chunk("b", index=1)), end=end),
        say.Answer([], end=end),
    ]


@pytest.mark.parametrize("case", [0, 1, 2])
@pytest.mark.parametrize("end", ["close", "cut"])
def test_truncated_stream_raises(server, say, client, end, case):
    server.will(truncated(say, end)[case])
    stream = client.chat.completions.create(**say.ask, stream=True)
    seen = []
    with pytest.raises(openai.APIConnectionError) as caught:
        seen.extend(stream)
    assert len(seen) == (2, 2, 0)[case]
    assert str(caught.value.request.url).endswith("/v1/chat/completions")
    if end == "close":
        assert f"after {len(seen)} chunks and before the finish_reason" in str(caught.value)


@pytest.mark.parametrize("end", ["close", "cut"])
def test_truncated_text_stream_raises(server, say, client, end):
    server.will(say.Answer(say.sse(say.text_chunk("Hello")), end=end))
    with pytest.raises(openai.APIConnectionError):
        list(client.completions.create(model="m", prompt="Hi", stream=True))


@pytest.mark.parametrize("end", ["close", "cut"])
def test_truncated_async_stream_raises(server, say, end):
    server.will(truncated(say, end)[0])

    async def work(client):
        stream = await client.chat.completions.create(**say.ask, stream=True)
        with pytest.raises(openai.APIConnectionError):
            async for _ in stream:
                pass
        assert stream.response.is_closed

    run_async(server, work)


def test_silent_stream_times_out(server, say, client):
    server.will(say.hanging)
    impatient = client.with_options(timeout=openai.Timeout(60.0, read=0.5))
    with pytest.raises(openai.APITimeoutError):
        list(impatient.chat.completions.create(**say.ask, stream=True))
    assert server.client_left()


def test_error_in_mid_stream_raises_its_message(server, say, client):
    server.will(say.Answer(say.sse(say.chunk("Hello"), say.error)))
    with pytest.raises(openai.APIError, match="it broke") as caught:
        list(client.chat.completions.create(**say.ask, stream=True))
    assert not isinstance(caught.value, openai.APIConnectionError)
    assert (caught.value.type, caught.value.code) == ("server_error", "engine_error")


def test_error_in_mid_stream_raises_its_message_in_the_async_client(server, say):
    server.will(say.Answer(say.sse(say.chunk("Hello"), say.error)))

    async def work(client):
        with pytest.raises(openai.APIError, match="it broke"):
            async for _ in await client.chat.completions.create(**say.ask, stream=True):
                pass

    run_async(server, work)


@pytest.mark.parametrize(("headers", "requests"), [({"x-should-retry": "false"}, 1), ({"retry-after-ms": "1"}, 3)])
def test_busy_server_is_asked_again_unless_it_says_not_to(server, say, client, headers, requests):
    body = b'{"error": {"message": "come back", "type": "server_error", "param": null, "code": null}}'
    server.will(*[say.Answer([body], status=503, headers=headers) for _ in range(3)])
    with pytest.raises(openai.InternalServerError, match="come back") as caught:
        client.with_options(max_retries=2).chat.completions.create(**say.ask, stream=True)
    assert caught.value.status_code == 503
    assert len(server.requests) == requests


# Streams that are left


def leave_by_break(stream):
    for _ in stream:
        break


def leave_by_exception(stream):
    with suppress(KeyError):
        for _ in stream:
            raise KeyError


def leave_by_with(stream):
    with stream:
        next(stream)


def leave_by_close(stream):
    next(stream)
    stream.close()
    stream.close()


def leave_unread(stream):
    stream.close()


LEAVE = (leave_by_break, leave_by_exception, leave_by_with, leave_by_close, leave_unread)


@pytest.mark.parametrize("leave", LEAVE, ids=lambda leave: leave.__name__)
def test_left_stream_is_closed_and_yields_nothing_more(server, say, client, leave):
    server.will(say.hanging)
    stream = client.chat.completions.create(**say.ask, stream=True)
    leave(stream)
    assert stream.response.is_closed
    assert server.client_left()
    assert list(stream) == []
    assert next(stream, None) is None


@pytest.mark.parametrize("num_read", [0, 1])
def test_dropped_stream_is_closed_without_the_garbage_collector(server, say, client, num_read):
    server.will(say.hanging)
    gc.disable()
    try:
        stream = client.chat.completions.create(**say.ask, stream=True)
        for _ in range(num_read):
            next(stream)
        del stream
        assert server.client_left()
    finally:
        gc.enable()


def test_stream_closed_by_another_thread_ends_its_reader(server, say, client):
    server.will(say.hanging)
    stream = client.chat.completions.create(**say.ask, stream=True)
    first = next(stream)
    closer = threading.Thread(target=stream.close)
    closer.start()
    closer.join(60)
    assert first.id == "chatcmpl-1"
    assert list(stream) == []
    assert server.client_left()


async def async_leave_by_break(stream):
    async for _ in stream:
        break


async def async_leave_by_exception(stream):
    with suppress(KeyError):
        async for _ in stream:
            raise KeyError


async def async_leave_by_with(stream):
    async with stream:
        await stream.__anext__()


async def async_leave_by_close(stream):
    await stream.__anext__()
    await stream.close()
    await stream.close()


async def async_leave_unread(stream):
    await stream.close()


ASYNC_LEAVE = (
    async_leave_by_break,
    async_leave_by_exception,
    async_leave_by_with,
    async_leave_by_close,
    async_leave_unread,
)


@pytest.mark.parametrize("leave", ASYNC_LEAVE, ids=lambda leave: leave.__name__)
def test_left_async_stream_is_closed_and_yields_nothing_more(server, say, leave):
    server.will(say.hanging)

    async def work(client):
        stream = await client.chat.completions.create(**say.ask, stream=True)
        await leave(stream)
        assert await client_left(server)  # the event loop goes on meanwhile
        assert stream.response.is_closed
        assert [chunk async for chunk in stream] == []

    run_async(server, work)


@pytest.mark.parametrize("num_read", [0, 1])
def test_dropped_async_stream_is_closed_without_the_garbage_collector(server, say, num_read):
    server.will(say.hanging)

    async def work(client):
        stream = await client.chat.completions.create(**say.ask, stream=True)
        for _ in range(num_read):
            await stream.__anext__()
        del stream
        assert await client_left(server)

    gc.disable()
    try:
        run_async(server, work)
    finally:
        gc.enable()


def test_cancelled_reader_closes_its_async_stream(server, say):
    server.will(say.hanging)

    async def work(client):
        stream = await client.chat.completions.create(**say.ask, stream=True)
        reading = asyncio.Event()

        async def read():
            async for chunk in stream:
                if chunk.choices[0].delta.content == " world":
                    reading.set()

        task = asyncio.create_task(read())
        await reading.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await client_left(server)

    run_async(server, work)
