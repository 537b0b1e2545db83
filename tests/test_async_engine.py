"""AsyncEngine: many asyncio consumers, in several event loops, behind one driving thread."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from inferneo_core import (
    AsyncEngine,
    AsyncTokenStream,
    EngineClosed,
    InvalidParameter,
    InvalidPrompt,
    PromptTooLong,
    SamplingParams,
    StepFailed,
)
from inferneo_core.readers import Readers

PROMPT = [5, 80, 200, 13, 7]
LONG_PROMPT = [(7 * i) % 250 for i in range(100)]
SAMPLED = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=400, seed=3, ignore_eos=True)


@pytest.fixture
def engine(tiny_model: Any) -> Iterator[Callable[..., AsyncEngine]]:
    """Makes AsyncEngines. Afterwards every block is back, an open engine still serves, and its thread ends with it."""
    made: list[AsyncEngine] = []

    def make(**arguments: Any) -> AsyncEngine:
        made.append(AsyncEngine(tiny_model(), **{"kv_cache_memory": 8 * 2**20, "num_threads": 1, **arguments}))
        return made[-1]

    yield make
    gc.collect()
    for engine in made:
        if not engine._engine._driver._is_closed:
            (completion,) = run(engine.generate([PROMPT], SAMPLED))
            assert len(completion.token_ids) == 12
        run(engine.close())
        stats = engine.stats()
        assert stats.free_blocks + stats.cached_blocks == stats.total_blocks
        assert stats.running == stats.waiting == 0
        assert not engine._thread.is_alive()


@pytest.fixture
def alone(tiny_engine: Any) -> Callable[..., list[int]]:
    """alone(prompt, params): the tokens a request gets that has an engine for itself."""
    engine = tiny_engine()
    return lambda prompt, params: [output.token_id for output in engine.stream(prompt, params)]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run in a new event loop; hanging is failing."""

    async def limited() -> Any:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(limited())


async def ids(stream: AsyncTokenStream) -> list[int]:
    return [output.token_id async for output in stream]


async def reached(halted: Any) -> None:
    await asyncio.to_thread(halted.reached)


async def settle(condition: Callable[[], bool]) -> None:
    """Let the loop and the driving thread go on until the condition holds; the test's own limit ends the wait."""
    while not condition():
        await asyncio.sleep(0.001)


def test_many_streams_get_the_tokens_they_get_alone(engine: Any, alone: Any) -> None:
    shared = engine(max_num_seqs=7, max_num_batched_tokens=32)
    prompts = [[(i * 31 + j) % 256 for j in range(1 + 2 * i)] for i in range(24)]
    params = [SamplingParams(max_tokens=8 + i % 5, seed=i, ignore_eos=True) for i in range(24)]

    async def main() -> list[list[int]]:
        streams = [shared.stream(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
        return await asyncio.gather(*map(ids, streams))

    assert run(main()) == [alone(prompt, one) for prompt, one in zip(prompts, params, strict=True)]


def test_several_event_loops_share_one_engine(engine: Any, alone: Any, background: Any) -> None:
    shared = engine()
    start = threading.Barrier(4, timeout=60)

    async def main(seed: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=12, seed=seed, ignore_eos=True)
        start.wait()
        return await asyncio.gather(*(ids(shared.stream(prompt, params)) for prompt in (PROMPT, LONG_PROMPT)))

    tasks = [background(lambda seed=seed: run(main(seed))) for seed in range(4)]
    for seed, task in enumerate(tasks):
        params = SamplingParams(max_tokens=12, seed=seed, ignore_eos=True)
        assert task.result() == [alone(PROMPT, params), alone(LONG_PROMPT, params)]


def test_stream_yields_what_the_synchronous_stream_yields(engine: Any, tiny_engine: Any) -> None:
    async def main() -> tuple[list[Any], Any]:
        async with engine().stream("Grüße 🌍", SAMPLED) as stream:
            assert stream.finish_reason is None
            outputs = [output async for output in stream]
            assert stream.finish_reason == "length"
            return outputs, stream

    outputs, stream = run(main())
    (expected,) = tiny_engine().generate(["Grüße 🌍"], SAMPLED)
    assert [output.index for output in outputs] == list(range(12))
    assert "".join(output.text for output in outputs) == stream.completion().text == expected.text
    assert stream.prompt_token_ids == expected.prompt_token_ids
    assert isinstance(stream.request_id, int)


def test_generate_answers_in_the_order_of_the_prompts(engine: Any, alone: Any) -> None:
    prompts = [LONG_PROMPT, PROMPT, PROMPT[::-1]]
    completions = run(engine().generate(prompts, SAMPLED))
    assert [list(completion.token_ids) for completion in completions] == [alone(prompt, SAMPLED) for prompt in prompts]
    assert run(engine().generate([])) == []


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([], None, InvalidPrompt),
        ([263], None, InvalidPrompt),
        ([1] * 600, None, PromptTooLong),
        ([1], SamplingParams(logit_bias={263: 1.0}), InvalidParameter),
        ([1], {"max_tokens": 3}, TypeError),
    ],
)
def test_bad_request_is_refused_there_and_then(prompt: Any, params: Any, error: type, engine: Any) -> None:
    shared = engine()
    with pytest.raises(error):
        shared.stream(prompt, params)
    with pytest.raises(error):
        run(shared.generate([PROMPT, prompt], params))
    assert shared.stats().waiting == shared.stats().running == 0


@pytest.mark.parametrize("close", ["aclose", "with", "drop"])
def test_stream_that_is_left_is_aborted(close: str, engine: Any) -> None:
    shared = engine()

    async def main() -> None:
        stream = shared.stream(PROMPT, ENDLESS)
        if close == "with":
            async with stream:
                await anext_of(stream)
        else:
            await anext_of(stream)
        if close == "aclose":
            await stream.aclose()
            await stream.aclose()
        if close != "drop":
            assert await ids(stream) == []
            assert stream.finish_reason == "abort"
        del stream
        gc.collect()
        await settle(lambda: shared.stats().running == 0)
        assert shared.stats().aborts == 1

    run(main())


async def anext_of(stream: AsyncTokenStream) -> Any:
    return await stream.__anext__()


def test_cancelling_the_consumer_aborts_even_while_its_task_is_kept(engine: Any) -> None:
    shared = engine()

    async def main() -> None:
        read = 0

        async def consume() -> None:
            nonlocal read
            async for _ in shared.stream(PROMPT, ENDLESS):
                read += 1

        task = asyncio.create_task(consume())
        await settle(lambda: read >= 3)
        task.cancel()
        (error,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(error, asyncio.CancelledError)
        await settle(lambda: shared.stats().running == 0)  # `error` still holds the consumer's frame
        assert shared.stats().aborts == 1
        assert read < 400

    run(main())


def test_cancelling_while_queued_frees_the_place(engine: Any, alone: Any) -> None:
    shared = engine(max_num_seqs=1)

    async def main() -> None:
        running, queued = shared.stream(PROMPT, ENDLESS), shared.stream(LONG_PROMPT, SAMPLED)
        task = asyncio.create_task(ids(queued))
        await anext_of(running)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        last = shared.stream(PROMPT, SAMPLED)
        await running.aclose()
        assert await ids(last) == alone(PROMPT, SAMPLED)
        assert queued.completion().token_ids == ()

    run(main())


def test_close_by_another_task_wakes_the_reader(engine: Any, halt: Any) -> None:
    shared = engine()
    halted = halt(shared._engine, 3)

    async def main() -> None:
        stream = shared.stream(PROMPT, ENDLESS)
        reading = asyncio.create_task(ids(stream))
        await reached(halted)
        await stream.aclose()
        halted.go()
        assert len(await reading) <= 4

    run(main())


def test_close_wakes_the_reader_of_a_paused_stream(engine: Any, alone: Any, halt: Any) -> None:
    shared = engine(max_num_seqs=1)
    halted = halt(shared._engine, 1)

    async def main() -> None:
        running, queued = shared.stream(PROMPT, SAMPLED), shared.stream(LONG_PROMPT, SAMPLED)
        reading = asyncio.create_task(ids(queued))
        await reached(halted)
        await settle(lambda: len(shared._readers._waiting) == 1)
        queued.pause()
        halted.go()
        assert await ids(running) == alone(PROMPT, SAMPLED)
        await settle(lambda: not shared._engine.step())  # nothing left to do: the driving thread sleeps
        await queued.aclose()
        assert await reading == []

    run(main())


def test_pause_stops_the_tokens_and_reading_resumes_them(engine: Any, alone: Any) -> None:
    shared = engine()

    async def main() -> None:
        stream = shared.stream(PROMPT, SAMPLED)
        got = [(await anext_of(stream)).token_id]
        stream.pause()
        await settle(lambda: not shared._engine.step())
        ready = len(stream._stream._request.outputs)
        assert await ids(shared.stream(LONG_PROMPT, SAMPLED)) == alone(LONG_PROMPT, SAMPLED)
        assert len(stream._stream._request.outputs) == ready
        got += await ids(stream)
        assert got == alone(PROMPT, SAMPLED)

    run(main())


def test_resume_goes_on_without_a_reader(engine: Any) -> None:
    shared = engine()

    async def main() -> None:
        stream = shared.stream(PROMPT, SAMPLED)
        stream.pause()
        await settle(lambda: not shared._engine.step())
        stream.resume()
        await settle(lambda: len(stream._stream._request.outputs) == 12)
        assert stream.finish_reason is None  # there are outputs to read
        assert len(await ids(stream)) == 12

    run(main())


def test_failed_step_reaches_every_reader_and_the_thread_survives(engine: Any, alone: Any, at_call: Any) -> None:
    shared = engine(max_num_seqs=2)
    cause = ValueError("mine")

    def act(step: int) -> None:
        if step == 4:
            raise cause

    at_call(shared._engine, act)

    async def main() -> None:
        tasks = [ids(shared.stream(PROMPT, SAMPLED)) for _ in range(3)]
        first, second, queued = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(first, StepFailed) and isinstance(second, StepFailed)
        assert first.__cause__ is cause and first is not second
        assert queued == alone(PROMPT, SAMPLED)
        assert shared._thread.is_alive()

    run(main())


def test_closing_the_engine_ends_every_awaiting_reader(engine: Any, halt: Any) -> None:
    shared = engine(max_num_seqs=2)
    halted = halt(shared._engine, 3)

    async def main() -> None:
        tasks = [asyncio.create_task(ids(shared.stream(PROMPT, ENDLESS))) for _ in range(4)]
        await reached(halted)
        closing = asyncio.gather(shared.close(), shared.close())
        halted.go()
        await closing
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [EngineClosed] * 4
        assert not shared._thread.is_alive()
        with pytest.raises(EngineClosed):
            shared.stream(PROMPT)
        await shared.close()

    run(main())


def test_engine_is_an_async_context_manager(engine: Any) -> None:
    async def main() -> None:
        async with engine() as shared:
            stream = shared.stream(PROMPT, ENDLESS)
            await anext_of(stream)
        with pytest.raises(EngineClosed):
            await ids(stream)
        assert not shared._thread.is_alive()

    run(main())


def test_event_loop_closed_under_its_readers_harms_nobody_else(engine: Any, alone: Any, halt: Any) -> None:
    shared = engine()
    halted = halt(shared._engine, 3)
    loop = asyncio.new_event_loop()
    left = shared.stream(LONG_PROMPT, SAMPLED)

    async def read_a_little() -> Coroutine[Any, Any, Any]:
        await anext_of(left)
        reading = anext_after(left, 3)
        await asyncio.to_thread(halted.reached)
        reading.send(None)  # waits on a future of this loop
        return reading

    reading = loop.run_until_complete(read_a_little())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    stream = shared.stream(PROMPT, SAMPLED)
    halted.go()
    assert run(ids(stream)) == alone(PROMPT, SAMPLED)
    assert shared._thread.is_alive()
    reading.close()


async def anext_after(stream: AsyncTokenStream, count: int) -> None:
    for _ in range(count):
        await anext_of(stream)


def test_reader_collected_while_others_are_woken_does_no_harm(background: Any) -> None:
    readers = Readers()

    class Unsettled:
        is_settled = False

    class Trap:
        """Is asked whether it is settled in the middle of `wake_settled`; the collector may strike right there."""

        asked = 0

        @property
        def is_settled(self) -> bool:
            Trap.asked += 1
            if Trap.asked > 1:
                victim.close()
            return Trap.asked > 1

    async def main() -> None:
        nonlocal victim
        victim = readers.wait(Unsettled())  # type: ignore[arg-type]
        victim.send(None)
        waiting = asyncio.create_task(readers.wait(Trap()))  # type: ignore[arg-type]
        await settle(lambda: Trap.asked == 1)
        await asyncio.wrap_future(background(readers.wake_settled)._future)
        await waiting
        assert readers._waiting == {}

    victim: Any = None
    run(main())
