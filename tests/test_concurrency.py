"""Many threads on one engine: each gets its own tokens, whatever the others do, close, drop, pause or break."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from inferneo_core import EngineClosed, SamplingParams, TokenStream, stream_with_callback

PROMPT = [5, 80, 200, 13, 7]
LONG_PROMPT = [(7 * i) % 250 for i in range(100)]
SAMPLED = SamplingParams(max_tokens=12, seed=3, ignore_eos=True, repetition_penalty=1.2, logit_bias={9: 2.0})


@pytest.fixture
def alone(tiny_engine: Any) -> Callable[..., list[int]]:
    """alone(prompt, params): the tokens a request gets that has an engine for itself."""
    engine = tiny_engine()
    return lambda prompt, params: ids(engine.stream(prompt, params))


def ids(stream: TokenStream) -> list[int]:
    return [output.token_id for output in stream]


# Streams side by side


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_num_seqs": 9, "max_num_batched_tokens": 24},
        {"max_model_len": 96, "block_size": 4, "kv_cache_memory": 40 * 4 * 384},  # 40 blocks: preempts
    ],
    ids=["queued", "preempted"],
)
def test_32_threads_get_the_tokens_they_get_alone(
    arguments: dict[str, Any], watched_engine: Any, alone: Any, background: Any
) -> None:
    shared = watched_engine(**arguments)
    start = threading.Barrier(33, timeout=60)
    submitted = threading.Barrier(32, timeout=60)  # all wait before any is read: so the cache is short of blocks
    done = threading.Event()
    prompts = [[(i * 31 + j) % 256 for j in range(1 + 2 * i)] for i in range(32)]
    params = [SamplingParams(max_tokens=20 + i % 7, seed=i, ignore_eos=True, top_k=i % 3 * 20) for i in range(32)]

    def consume(i: int) -> list[int]:
        start.wait()
        stream = shared.stream(prompts[i], params[i])
        submitted.wait()
        return ids(stream)

    def watch() -> int:
        start.wait()
        looks = 0
        while not done.is_set():
            stats = shared.stats()
            assert stats.running <= 32 and stats.tokens_per_s >= 0.0
            looks += 1
        return looks

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        consumers = [background(consume, i) for i in range(32)]
        watching = background(watch)
        got = [task.result() for task in consumers]
        done.set()
        assert watching.result() > 0
    finally:
        done.set()
        sys.setswitchinterval(interval)
    assert got == [alone(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    stats = shared.stats()
    assert stats.generated_tokens == sum(one.max_tokens for one in params)
    assert (stats.preemptions > 0) == ("block_size" in arguments)


def test_two_threads_share_one_stream_without_loss(watched_engine: Any, alone: Any, background: Any) -> None:
    params = SamplingParams(max_tokens=60, seed=5, ignore_eos=True)
    stream = watched_engine().stream(PROMPT, params)
    start = threading.Barrier(2, timeout=60)

    def consume() -> list[Any]:
        start.wait()
        return list(stream)

    tasks = [background(consume) for _ in range(2)]
    outputs = sorted(itertools.chain(*(task.result() for task in tasks)), key=lambda output: output.index)
    assert [output.index for output in outputs] == list(range(60))
    assert [output.token_id for output in outputs] == alone(PROMPT, params)


def test_last_output_that_arrives_while_a_reader_looks_is_not_lost(watched_engine: Any, alone: Any) -> None:
    shared = watched_engine()
    stream = shared.stream(PROMPT, SAMPLED)

    class Late(deque):  # type: ignore[type-arg]
        def popleft(self) -> Any:
            if self:
                return super().popleft()
            while shared.step():  # as another thread may, between finding nothing and asking for the end
                pass
            raise IndexError

    stream._request.outputs = Late()
    assert ids(stream) == alone(PROMPT, SAMPLED)


def test_consumer_that_stops_reading_holds_nobody_up(watched_engine: Any, alone: Any) -> None:
    shared = watched_engine()
    slow = shared.stream(PROMPT, SAMPLED)
    first = next(slow)
    longer = SamplingParams(max_tokens=40, seed=4, ignore_eos=True)
    assert ids(shared.stream(LONG_PROMPT, longer)) == alone(LONG_PROMPT, longer)
    assert len(slow._request.outputs) == 11  # all there will ever be
    assert shared.stats().running == 0
    assert [first.token_id, *ids(slow)] == alone(PROMPT, SAMPLED)


def test_pause_that_comes_as_a_reader_is_about_to_step_does_not_break_it(
    watched_engine: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = watched_engine()
    stream = shared.stream(PROMPT, SAMPLED)
    advance, paused = shared.advance, []

    def late(request: Any) -> None:
        if len(paused) < 3:  # as another thread may, once the reader has seen that it is not paused
            paused.append(stream.pause())
        advance(request)

    monkeypatch.setattr(shared, "advance", late)
    assert ids(stream) == alone(PROMPT, SAMPLED)
    assert len(paused) == 3


# Closing


@pytest.mark.parametrize(("prompt", "step"), [(LONG_PROMPT, 2), (PROMPT, 5)], ids=["mid-prefill", "mid-decode"])
def test_close_from_another_thread_ends_the_stream(
    prompt: list[int], step: int, watched_engine: Any, alone: Any, halt: Any, background: Any
) -> None:
    shared = watched_engine(max_num_batched_tokens=16, block_size=8)
    halted = halt(shared, step)
    stream = shared.stream(prompt, SAMPLED)
    reading = background(ids, stream)
    halted.reached()
    stream.close()  # returns while the step stands still
    stream.close()
    halted.go()
    got = reading.result()
    expected = alone(prompt, SAMPLED)
    assert got == ([] if prompt is LONG_PROMPT else expected[: len(got)])
    assert stream.finish_reason == stream.completion().finish_reason == "abort"
    assert ids(shared.stream(prompt, SAMPLED)) == expected  # on what it left in the prefix cache


@pytest.mark.parametrize("in_step", [False, True])
def test_close_while_queued(in_step: bool, watched_engine: Any, alone: Any, halt: Any, background: Any) -> None:
    shared = watched_engine(max_num_seqs=1)
    halted = halt(shared, 3 if in_step else -1)
    running, queued, third = (shared.stream(prompt, SAMPLED) for prompt in (PROMPT, LONG_PROMPT, PROMPT[::-1]))
    reading = background(ids, running)
    if in_step:
        halted.reached()
    waiting = background(ids, queued)
    queued.close()
    halted.go()
    assert reading.result() == alone(PROMPT, SAMPLED)
    assert waiting.result() == []
    assert ids(third) == alone(PROMPT[::-1], SAMPLED)
    assert queued.completion().timings is None


def test_close_after_the_end_changes_nothing(watched_engine: Any) -> None:
    shared = watched_engine()
    stream = shared.stream(PROMPT, SAMPLED)
    before = [*stream], stream.completion()
    stream.close()
    stream.close()
    assert stream.finish_reason == "length"
    assert stream.completion() == before[1]
    assert shared.stats().aborts == 0


def test_many_threads_may_close_one_stream(watched_engine: Any, background: Any) -> None:
    shared = watched_engine()
    stream = shared.stream(PROMPT, SAMPLED)
    next(stream)
    for task in [background(stream.close) for _ in range(8)]:
        task.result()
    assert list(stream) == []
    assert shared.stats().aborts == 1


@pytest.mark.parametrize("collected", [False, True], ids=["dropped", "collected"])
def test_stream_that_goes_away_during_a_step_is_aborted(
    collected: bool, watched_engine: Any, alone: Any, at_call: Any
) -> None:
    shared = watched_engine()
    streams = [shared.stream(LONG_PROMPT, SAMPLED), shared.stream(PROMPT, SAMPLED)]
    if collected:
        streams[0].itself = streams[0]

    def act(step: int) -> None:
        if step == 3:
            del streams[0]
            gc.collect()

    at_call(shared, act)
    assert ids(streams[1]) == alone(PROMPT, SAMPLED)
    assert shared.stats().aborts == 1


def test_engine_close_ends_every_stream_and_leaves_no_thread_waiting(
    watched_engine: Any, halt: Any, background: Any
) -> None:
    shared = watched_engine(max_num_seqs=3)
    halted = halt(shared, 4)
    streams = [shared.stream(PROMPT, SamplingParams(max_tokens=400, seed=i, ignore_eos=True)) for i in range(6)]
    readers = [background(ids, stream) for stream in streams]
    halted.reached()
    closing = [background(shared.close) for _ in range(2)]
    halted.go()
    for task in closing:
        task.result()
    for reader in readers:
        with pytest.raises(EngineClosed, match="closed"):
            reader.result()
    with pytest.raises(EngineClosed, match="make a new Engine"):
        shared.stream(PROMPT)
    with pytest.raises(EngineClosed):
        shared.step()
    for stream in streams:
        stream.close()


def test_engine_close_inside_a_step(watched_engine: Any, at_call: Any) -> None:
    shared = watched_engine()
    at_call(shared, lambda step: shared.close() if step == 2 else None)
    stream = shared.stream(PROMPT, SAMPLED)
    got = [next(stream).index for _ in range(3)]
    with pytest.raises(EngineClosed):
        next(stream)
    assert got == [0, 1, 2]


# Callbacks


class Callback:
    def __init__(self, act: Callable[[], None]) -> None:
        self.act, self.num_tokens, self.completed = act, 0, 0

    def on_token(self, token: str) -> None:
        self.num_tokens += 1
        if self.num_tokens == 3:
            self.act()

    def on_complete(self) -> None:
        self.completed += 1


def test_callback_that_raises_harms_only_its_own_stream(watched_engine: Any, alone: Any, background: Any) -> None:
    shared = watched_engine()

    def fail() -> None:
        raise LookupError("mine")

    bad, good = Callback(fail), Callback(lambda: None)
    failing = background(stream_with_callback, shared, LONG_PROMPT, bad, SAMPLED)
    passing = background(stream_with_callback, shared, PROMPT, good, SAMPLED)
    with pytest.raises(LookupError, match="mine"):
        failing.result()
    assert list(passing.result().token_ids) == alone(PROMPT, SAMPLED)
    assert (bad.num_tokens, bad.completed, good.num_tokens, good.completed) == (3, 0, 12, 1)


def test_callback_may_close_the_engine(watched_engine: Any) -> None:
    shared = watched_engine()
    callback = Callback(shared.close)
    with pytest.raises(EngineClosed):
        stream_with_callback(shared, PROMPT, callback, SAMPLED)
    assert (callback.num_tokens, callback.completed) == (3, 0)


def test_callback_may_stream_from_the_same_engine(watched_engine: Any, alone: Any) -> None:
    shared = watched_engine(max_num_seqs=1, enable_prefix_caching=False)
    inner: list[int] = []
    shared_params = SamplingParams(max_tokens=4, seed=1, ignore_eos=True)
    callback = Callback(lambda: inner.extend(ids(shared.stream(PROMPT[::-1], shared_params))))
    completion = stream_with_callback(shared, PROMPT, callback, SAMPLED)
    assert list(completion.token_ids) == alone(PROMPT, SAMPLED)
    assert inner == alone(PROMPT[::-1], shared_params)
