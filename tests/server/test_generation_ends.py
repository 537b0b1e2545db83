"""Generation: what is refused, what ends early, who reads too slowly; and that nothing of it is left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from inferneo.server.errors import ApiError
from inferneo.server.generation import HEARTBEAT, Generation

LONG = "All happy families are alike; each unhappy family is unhappy in its own way. " * 2
FIXED = {"seed": 3, "ignore_eos": True, "max_tokens": 9}
ENDLESS = {"seed": 3, "ignore_eos": True, "max_tokens": 300}


async def until(condition: Any) -> None:
    """Let the loop and the engine go on until the condition holds; the test's own limit ends the wait."""
    while not condition():
        await asyncio.sleep(0.001)


async def read_into(chunks: list[Any], generation: Generation) -> None:
    """Read to the end; what came before an error stays in the list."""
    async for chunk in generation.chunks():
        chunks.append(chunk)


# Refusals


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, None),
        ({"prompt": [300]}, None),
        ({"prompt": [[1, 2], [3] * 600]}, "context_length_exceeded"),
        ({"prompt": "x", "max_tokens": 600}, "context_length_exceeded"),
        ({"prompt": ["ok", "ok", ""]}, None),
        ({"prompt": "x", "stop_token_ids": [263]}, None),
        ({"prompt": "x", "logit_bias": {"263": 1}}, None),
        ({"messages": [{"role": "user"}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"n": 10**6}, None),
        ({"model": "other"}, "model_not_found"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("transport", ["http", "sse"])
def test_refused_request_leaves_nothing_behind(fields, code, transport, async_engine, run, start):
    engine = async_engine()
    before = engine.stats()

    async def main() -> None:
        with pytest.raises(ApiError) as caught:
            await start(engine, transport, fields)
        assert caught.value.status == (404 if code == "model_not_found" else 400)
        assert caught.value.code == code
        await until(lambda: engine.stats().running == engine.stats().waiting == 0)
        after = engine.stats()
        assert after.free_blocks + after.cached_blocks == before.free_blocks

    run(main())


def test_closed_engine_is_a_503(async_engine, run, start):
    engine = async_engine()

    async def main() -> None:
        await engine.close()
        with pytest.raises(ApiError) as caught:
            await start(engine, "sse", FIXED)
        assert (caught.value.status, caught.value.should_retry) == (503, True)

    run(main())


# Early ends


@pytest.mark.parametrize("how", ["aclose", "leave", "cancel"])
@pytest.mark.parametrize("fields", [{}, {"prompt": LONG, "n": 3}, {"prompt": ["a", "b"]}])
def test_stream_that_is_left_aborts_every_choice(how, fields, async_engine, run, start):
    engine = async_engine()

    async def main() -> None:
        generation = await start(engine, "sse", {**fields, **ENDLESS})
        batches, read = generation.batches(), asyncio.Event()

        async def consume() -> None:
            async for _ in batches:
                read.set()

        if how == "cancel":
            task = asyncio.create_task(consume())
            await read.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            await anext(batches)
            await (generation.aclose() if how == "aclose" else batches.aclose())
        await generation.aclose()
        await until(lambda: engine.stats().running == engine.stats().waiting == 0)
        assert engine.stats().generated_tokens < 300

    run(main())


def test_result_that_is_cancelled_aborts(async_engine, run, start):
    engine = async_engine()

    async def main() -> None:
        generation = await start(engine, "http", {"n": 2, "prompt": LONG, **ENDLESS})
        task = asyncio.create_task(generation.result())
        await until(lambda: generation.num_completion_tokens > 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        await until(lambda: engine.stats().running == engine.stats().waiting == 0)
        assert engine.stats().aborts == 2

    run(main())


def test_close_by_another_task_ends_the_reader_with_an_error(async_engine, run, start):
    engine = async_engine()

    async def main() -> None:
        generation = await start(engine, "http", ENDLESS)
        task = asyncio.create_task(generation.result())
        await until(lambda: generation.num_completion_tokens > 0)
        await generation.aclose()
        with pytest.raises(ApiError) as caught:
            await task
        assert (caught.value.status, caught.value.code) == (503, "aborted")

    run(main())


@pytest.mark.parametrize("fields", [{}, {"prompt": "x", "n": 2}])
def test_failed_step_is_an_error_in_mid_stream_and_the_next_request_is_served(
    fields, async_engine, run, start, collect, at_call, texts
):
    engine = async_engine()

    def act(step: int) -> None:
        if step == 3:
            raise ValueError("mine")

    at_call(engine._engine, act)

    async def main() -> None:
        generation = await start(engine, "sse", {**fields, **FIXED})
        chunks: list[Any] = []
        with pytest.raises(ApiError, match="mine") as caught:
            await read_into(chunks, generation)
        assert chunks
        assert (caught.value.status, caught.value.code) == (500, "engine_error")

    run(main())
    assert len(texts(collect(engine, "sse", FIXED))) == 9


def test_request_that_takes_too_long_is_aborted_and_says_so(async_engine, run, start, at_call):
    engine = async_engine()
    generations: list[Generation] = []

    def act(step: int) -> None:
        if step == 5:  # between two tokens, the deadline passes
            generations[0]._deadline = 0.0

    at_call(engine._engine, act)

    async def main() -> None:
        generations.append(await start(engine, "sse", ENDLESS))
        with pytest.raises(ApiError, match=r"took more than 600 s.*max_request_seconds") as caught:
            await read_into([], generations[0])
        assert (caught.value.status, caught.value.code) == (504, "request_timeout")
        await until(lambda: engine.stats().running == 0)

    run(main())


# Silence and slow readers


def test_queued_stream_sends_heartbeats_until_its_turn(async_engine, run, start, halt, texts):
    engine = async_engine(max_num_seqs=1)
    halted = halt(engine._engine, 2)

    async def main() -> None:
        first = await start(engine, "sse", ENDLESS)
        await asyncio.to_thread(halted.reached)
        second = await start(engine, "sse", FIXED, heartbeat_seconds=0.001)
        chunks = second.chunks()
        for _ in range(3):
            assert await anext(chunks) is HEARTBEAT
        await first.aclose()
        halted.go()
        assert len(texts([item async for item in chunks if item is not HEARTBEAT])) == 9

    run(main())


def test_heartbeat_comes_while_the_engine_stands_still(async_engine, run, start, halt, texts):
    engine = async_engine()
    halted = halt(engine._engine, 4)

    async def main() -> None:
        generation = await start(engine, "sse", FIXED, heartbeat_seconds=0.001)
        items = []
        async for item in generation.chunks():
            items.append(item)
            if item is HEARTBEAT and len(texts([one for one in items if one is not HEARTBEAT])) == 4:
                halted.go()
        assert HEARTBEAT in items
        assert len(texts([item for item in items if item is not HEARTBEAT])) == 9

    run(main())


def test_unread_stream_pauses_at_its_limit_and_loses_nothing(async_engine, run, start, collect, texts):
    engine = async_engine()
    fields = {"prompt": LONG, "n": 2, **ENDLESS}
    expected = collect(engine, "sse", fields)

    async def main() -> None:
        generation = await start(engine, "sse", fields, max_unread_tokens=7)
        chunks, sizes = [], []
        async for batch in generation.batches():
            chunks += batch
            sizes.append(len(batch))
            if len(sizes) in (3, 5):  # the transport is stuck in a send
                await until(lambda: all(stream.is_paused for stream in generation._live.values()))
        assert [texts(chunks, index) for index in range(2)] == [texts(expected, index) for index in range(2)]
        assert max(sizes) <= 2 * 8  # what was there, and a step that was under way

    run(main())
