"""AsyncTokenStream's ways to read without waiting, to wait for several, and to hold back what nobody reads."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from inferneo_core import AsyncEngine, AsyncTokenStream, EngineClosed, SamplingParams, StepFailed
from inferneo_core.cpu_graph import MAX_BURST

PROMPT = [5, 80, 200, 13, 7]
SAMPLED = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=400, seed=3, ignore_eos=True)


@pytest.fixture
def engine(tiny_model: Any) -> Iterator[AsyncEngine]:
    """An AsyncEngine of which nothing is left when the test ends."""
    made = AsyncEngine(tiny_model(), kv_cache_memory=8 * 2**20, num_threads=1)
    yield made
    gc.collect()
    run(made.close())
    stats = made.stats()
    assert stats.free_blocks + stats.cached_blocks == stats.total_blocks
    assert stats.running == stats.waiting == 0


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run in a new event loop; hanging is failing."""

    async def limited() -> Any:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(limited())


async def settle(condition: Callable[[], bool]) -> None:
    """Let the loop and the driving thread go on until the condition holds; the test's own limit ends the wait."""
    while not condition():
        await asyncio.sleep(0.001)


async def drained(engine: AsyncEngine, stream: AsyncTokenStream) -> list[int]:
    """The ids of a stream, read in whatever portions are there."""
    got: list[int] = []
    while stream.finish_reason is None:
        await engine.wait_any([stream])
        got += [output.token_id for output in stream.read_ready()]
    return got


def expected(engine: AsyncEngine, params: SamplingParams) -> list[int]:
    (completion,) = run(engine.generate([PROMPT], params))
    return list(completion.token_ids)


def test_portions_are_the_whole_stream(engine: AsyncEngine) -> None:
    whole = expected(engine, SAMPLED)

    async def main() -> None:
        stream = engine.stream(PROMPT, SAMPLED)
        got = [output.token_id for output in stream.read_ready()]
        assert (got + await drained(engine, stream), stream.finish_reason) == (whole, "length")
        assert stream.read_ready() == []
        await engine.wait_any([stream])  # an ended stream keeps nobody waiting

    run(main())


def test_several_streams_are_read_as_their_tokens_come(engine: AsyncEngine) -> None:
    params = [SamplingParams(max_tokens=5 + 9 * i, seed=i, ignore_eos=True) for i in range(4)]
    whole = [expected(engine, one) for one in params]

    async def main() -> None:
        streams = [engine.stream(PROMPT, one) for one in params]
        got: list[list[int]] = [[] for _ in streams]
        while any(stream.finish_reason is None for stream in streams):
            await engine.wait_any([stream for stream in streams if stream.finish_reason is None])
            for stream, ids in zip(streams, got, strict=True):
                ids += [output.token_id for output in stream.read_ready()]
        assert got == whole

    run(main())


def test_waiting_ends_after_its_timeout_and_ends_no_stream(engine: AsyncEngine, halt: Any) -> None:
    halted = halt(engine._engine, 2)

    async def main() -> None:
        stream = engine.stream(PROMPT, SAMPLED)
        await asyncio.to_thread(halted.reached)
        got = len(stream.read_ready())
        await engine.wait_any([stream], timeout=0.001)
        await engine.wait_any([stream], timeout=0.0)
        task = asyncio.create_task(engine.wait_any([stream]))
        await settle(lambda: len(engine._readers._waiting) == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() and not engine._readers._waiting
        halted.go()
        assert got + len(await drained(engine, stream)) == 12

    run(main())


def test_waits_need_no_more_of_a_loop_than_asyncio_promises(engine: AsyncEngine) -> None:
    """uvloop's call_at gives a handle without `when` for a time that has come."""

    class Loop(asyncio.SelectorEventLoop):
        def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
            if when <= self.time():
                return self.call_soon(callback, *args, context=context)
            return super().call_at(when, callback, *args, context=context)

    async def main() -> None:
        stream = engine.stream(PROMPT, SAMPLED)
        await asyncio.gather(engine.wait_any([stream], timeout=0.0), engine.wait_any([stream], timeout=60.0))
        assert len(await drained(engine, stream)) == 12

    loop = Loop()
    try:
        loop.run_until_complete(asyncio.wait_for(main(), 60))
    finally:
        loop.close()


def test_error_is_raised_after_the_outputs_before_it(engine: AsyncEngine, at_call: Any) -> None:
    def act(step: int) -> None:
        if step == 4:
            raise ValueError("mine")

    at_call(engine._engine, act)

    async def main() -> None:
        stream = engine.stream(PROMPT, SAMPLED)
        await settle(lambda: stream._stream.has_ended)
        assert len(stream.read_ready()) == 4
        with pytest.raises(StepFailed, match="mine"):
            stream.read_ready()

    run(main())


def test_closing_the_engine_wakes_who_waits_for_several(engine: AsyncEngine) -> None:
    async def main() -> None:
        streams = [engine.stream(PROMPT, ENDLESS) for _ in range(3)]
        await engine.close()
        await engine.wait_any(streams)
        for stream in streams:
            if stream._stream.num_unread:
                stream.read_ready()
            with pytest.raises(EngineClosed):
                stream.read_ready()

    run(main())


@pytest.mark.parametrize("max_unread", [1, 7])
def test_stream_pauses_while_too_much_is_unread_and_loses_nothing(max_unread: int, engine: AsyncEngine) -> None:
    whole = expected(engine, ENDLESS)

    async def main() -> None:
        stream = engine.stream(PROMPT, ENDLESS, max_unread=max_unread)
        got: list[int] = []
        for _ in range(5):
            await settle(lambda: stream.is_paused and not engine._engine.step())
            portion = stream.read_ready()
            assert max_unread <= len(portion) < max_unread + MAX_BURST
            got += [output.token_id for output in portion]
            stream.resume_if_drained()
        assert got + await drained(engine, stream) == whole

    run(main())


def test_reading_one_by_one_resumes_a_stream_that_paused(engine: AsyncEngine) -> None:
    whole = expected(engine, SAMPLED)

    async def main() -> None:
        stream = engine.stream(PROMPT, SAMPLED, max_unread=2)
        await settle(lambda: stream.is_paused)
        assert [output.token_id async for output in stream] == whole

    run(main())


@pytest.mark.parametrize("end", ["read", "abort", "drop"])
def test_bounded_stream_is_forgotten_when_it_has_ended(end: str, engine: AsyncEngine) -> None:
    async def main() -> None:
        stream: AsyncTokenStream | None = engine.stream(PROMPT, SAMPLED, max_unread=50)
        assert stream is not None and engine._bounded
        if end == "read":
            await drained(engine, stream)
        elif end == "abort":
            stream.abort()
        stream = None
        gc.collect()
        await settle(lambda: engine.stats().running == 0)
        await drained(engine, engine.stream(PROMPT, SAMPLED))  # its steps come by
        assert not engine._bounded

    run(main())
