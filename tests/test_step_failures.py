"""A step that raises: the streams of its batch fail, or go on where it may be repeated; the others never notice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from inferneo_core import EngineClosed, SamplingParams, StepFailed, TokenStream
from inferneo_core.stream_decoder import StreamDecoder

PROMPT = [5, 80, 200, 13, 7]
LONG_PROMPT = [(7 * i) % 250 for i in range(100)]
SAMPLED = SamplingParams(max_tokens=12, seed=3, ignore_eos=True, repetition_penalty=1.2, logit_bias={9: 2.0})


@pytest.fixture
def alone(tiny_engine: Any) -> Callable[..., list[int]]:
    """alone(prompt): the tokens that SAMPLED gets from an engine for itself."""
    engine = tiny_engine()
    return lambda prompt: [output.token_id for output in engine.stream(prompt, SAMPLED)]


def read(stream: TokenStream) -> tuple[list[int], BaseException | None]:
    """A stream's tokens, and the error it ends with."""
    got: list[int] = []
    try:
        for output in stream:
            got.append(output.token_id)
    except (StepFailed, EngineClosed) as error:
        return got, error
    return got, None


def raise_at(call: int, error: BaseException) -> Callable[[int], None]:
    def act(k: int) -> None:
        if k == call:
            raise error

    return act


@pytest.mark.parametrize("verb", ["embed", "qkv_rope_store", "attention", "gate_up_silu", "linear_add", "next_tokens"])
def test_error_in_a_verb_fails_its_batch_and_no_other(
    verb: str, watched_engine: Any, alone: Any, at_call: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = watched_engine(max_num_seqs=2)
    cause = ValueError("mine")
    at_call(engine, raise_at(7, cause), verb)
    failing = [engine.stream(PROMPT, SAMPLED), engine.stream(PROMPT[::-1], SAMPLED)]
    queued = engine.stream(LONG_PROMPT, SAMPLED)
    for stream, prompt in zip(failing, (PROMPT, PROMPT[::-1]), strict=True):
        got, error = read(stream)
        assert isinstance(error, StepFailed)
        assert str(error) == "the engine's step failed: ValueError: mine"
        assert error.__cause__ is cause
        assert got == alone(prompt)[: len(got)]
        assert read(stream) == ([], error)  # it stays so
        assert stream.completion().finish_reason == "abort"
    assert read(queued) == (alone(LONG_PROMPT), None)
    assert "a step of 2 sequences failed: ValueError('mine')" in caplog.text


def test_error_reaches_every_thread_of_the_batch(
    watched_engine: Any, alone: Any, at_call: Any, background: Any
) -> None:
    engine = watched_engine(max_num_seqs=6)
    at_call(engine, raise_at(4, torch.cuda.OutOfMemoryError("mine")))
    streams = [engine.stream(PROMPT, SAMPLED) for _ in range(8)]
    results = [task.result() for task in [background(read, stream) for stream in streams]]
    assert all(isinstance(error, StepFailed) for _, error in results[:6])
    assert len({id(error) for _, error in results}) == 7  # each has its own, and None
    assert results[6:] == [(alone(PROMPT), None)] * 2


def test_error_in_mid_prefill_leaves_the_prefix_cache_right(watched_engine: Any, alone: Any, at_call: Any) -> None:
    engine = watched_engine(max_num_batched_tokens=16, block_size=8)
    at_call(engine, raise_at(10, ValueError("mine")), "linear_add")  # in the second step, its keys half written
    got, error = read(engine.stream(LONG_PROMPT, SAMPLED))
    assert got == [] and isinstance(error, StepFailed)
    assert read(engine.stream(LONG_PROMPT, SAMPLED)) == (alone(LONG_PROMPT), None)


def test_error_after_the_draw_fails_the_batch(watched_engine: Any, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = watched_engine(max_num_seqs=2)
    push, calls = StreamDecoder.push, []

    def failing(self: StreamDecoder, token_id: int) -> str:
        calls.append(token_id)
        if len(calls) == 6:
            raise LookupError("mine")
        return push(self, token_id)

    monkeypatch.setattr(StreamDecoder, "push", failing)
    streams = [engine.stream(prompt, SAMPLED) for prompt in (PROMPT, PROMPT[::-1], LONG_PROMPT)]
    (first, error_1), (second, error_2), last = map(read, streams)
    assert isinstance(error_1, StepFailed) and isinstance(error_2, StepFailed)
    assert (first, second) == (alone(PROMPT)[:3], alone(PROMPT[::-1])[:2])
    assert last == (alone(LONG_PROMPT), None)


def test_lost_device_closes_the_engine(watched_engine: Any, at_call: Any) -> None:
    engine = watched_engine(max_num_seqs=1)
    at_call(engine, raise_at(3, torch.AcceleratorError("mine")))
    failing, queued = engine.stream(PROMPT, SAMPLED), engine.stream(PROMPT, SAMPLED)
    assert isinstance(read(failing)[1], StepFailed)
    assert isinstance(read(queued)[1], EngineClosed)
    with pytest.raises(EngineClosed):
        engine.stream(PROMPT)


@pytest.mark.parametrize("verb", ["embed", "attention", "next_tokens"])
@pytest.mark.parametrize("step", [0, 3, 9])
def test_interrupt_in_a_verb_leaves_the_streams_whole(
    verb: str, step: int, watched_engine: Any, alone: Any, at_call: Any
) -> None:
    engine = watched_engine(max_num_batched_tokens=40, block_size=8)
    at_call(engine, raise_at(step, KeyboardInterrupt()), verb)
    streams = {tuple(prompt): engine.stream(prompt, SAMPLED) for prompt in (PROMPT, LONG_PROMPT, PROMPT[::-1])}
    got: list[int] = []
    interrupted = 0
    while len(got) < 12:
        try:
            got += [next(streams[tuple(PROMPT)]).token_id]
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 1
    assert got == alone(PROMPT)
    for prompt in (LONG_PROMPT, PROMPT[::-1]):
        assert read(streams[tuple(prompt)]) == (alone(prompt), None)


def test_interrupt_passes_the_turn_to_a_waiting_thread(
    watched_engine: Any, alone: Any, at_call: Any, background: Any
) -> None:
    engine = watched_engine()
    at_call(engine, raise_at(5, KeyboardInterrupt()))
    streams = [engine.stream(PROMPT, SAMPLED) for _ in range(4)]

    def patient(stream: TokenStream) -> tuple[list[int], int]:
        got: list[int] = []
        interrupts = 0
        while len(got) < 12:
            try:
                got += [next(stream).token_id]
            except KeyboardInterrupt:
                interrupts += 1
        return got, interrupts

    results = [task.result() for task in [background(patient, stream) for stream in streams]]
    assert [got for got, _ in results] == [alone(PROMPT)] * 4
    assert sum(interrupts for _, interrupts in results) == 1


def test_interrupt_after_the_draw_never_loses_a_token_in_silence(
    watched_engine: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = watched_engine(max_num_seqs=2)
    push, calls = StreamDecoder.push, []

    def interrupted(self: StreamDecoder, token_id: int) -> str:
        calls.append(token_id)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return push(self, token_id)

    monkeypatch.setattr(StreamDecoder, "push", interrupted)
    first, second, queued = (engine.stream(prompt, SAMPLED) for prompt in (PROMPT, PROMPT[::-1], LONG_PROMPT))
    got = [next(first).token_id, next(first).token_id]
    with pytest.raises(KeyboardInterrupt):
        next(first)
    assert got == alone(PROMPT)[:2]
    assert isinstance(read(first)[1], StepFailed)
    rest, error = read(second)
    assert rest == alone(PROMPT[::-1])[:2] and isinstance(error, StepFailed)
    assert read(queued) == (alone(LONG_PROMPT), None)


def test_generate_raises_what_a_step_raised_and_aborts_the_rest(watched_engine: Any, at_call: Any) -> None:
    engine = watched_engine(max_num_seqs=2)
    at_call(engine, raise_at(4, ValueError("mine")))
    with pytest.raises(StepFailed, match="mine"):
        engine.generate([PROMPT] * 5, SAMPLED)
    assert engine.stats().aborts == 5


def test_every_ended_request_is_logged_once_and_never_its_text(
    watched_engine: Any, at_call: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = watched_engine(max_num_seqs=1)
    at_call(engine, raise_at(15, ValueError("mine")))
    with caplog.at_level(logging.INFO, "inferneo_core.request"):
        done, failed, closed = (engine.stream("a secret", SAMPLED) for _ in range(3))
        read(done), read(failed), closed.close()
    lines = [record.getMessage() for record in caplog.records if record.name == "inferneo_core.request"]
    assert [line.rpartition("finish_reason=")[2] for line in lines] == ["length", "abort", "abort"]
    assert "secret" not in caplog.text
