"""Callbacks: when they are called, what they measure and show, and what happens when they misbehave."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from inferneo_core import (
    Engine,
    InvalidPrompt,
    ProgressBar,
    SamplingParams,
    StepFailed,
    StreamMetrics,
    stream_with_callback,
)

PROMPT = [5, 80, 200, 13, 7]
PARAMS = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)


class Recorder:
    """Notes its calls; its n-th token is answered with answers[n], or raised if that is an exception."""

    def __init__(self, *answers: Any) -> None:
        self.calls: list[Any] = []
        self._answers = list(answers)

    def on_token(self, token: str) -> Any:
        self.calls.append(token)
        answer = self._answers.pop(0) if self._answers else None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def on_complete(self) -> None:
        self.calls.append("complete")


def blocks_are_back(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.free_blocks + stats.cached_blocks == stats.total_blocks and stats.running == stats.waiting == 0


def test_callback_runs_on_the_thread_of_its_caller(tiny_engine: Any, background: Any) -> None:
    class Where(Recorder):
        def on_token(self, token: str) -> None:
            self.calls.append(threading.get_ident())

    engine = tiny_engine()

    def call() -> tuple[int, list[Any]]:
        where = Where()
        stream_with_callback(engine, PROMPT, where, PARAMS)
        return threading.get_ident(), where.calls

    for task in [background(call) for _ in range(4)]:
        me, calls = task.result()
        assert calls == [me] * 12 + ["complete"]


@pytest.mark.parametrize("answer", [None, True, 0, "", "False"])
def test_only_false_stops_the_stream(answer: Any, tiny_engine: Any) -> None:
    recorder = Recorder(*[answer] * 12)
    assert stream_with_callback(tiny_engine(), PROMPT, recorder, PARAMS).finish_reason == "length"
    assert len(recorder.calls) == 13


def test_false_on_the_last_token_is_a_normal_end(tiny_engine: Any) -> None:
    recorder = Recorder(*[None] * 11, False)
    assert stream_with_callback(tiny_engine(), PROMPT, recorder, PARAMS).finish_reason == "length"
    assert recorder.calls[-1] == "complete"


@pytest.mark.parametrize("error", [LookupError("mine"), KeyboardInterrupt(), StopIteration(), GeneratorExit()])
def test_exception_of_a_callback_propagates_as_it_is(error: BaseException, tiny_engine: Any) -> None:
    engine = tiny_engine()
    recorder = Recorder(None, error)
    with pytest.raises(type(error)) as raised:
        stream_with_callback(engine, PROMPT, recorder, PARAMS)
    assert raised.value is error
    assert len(recorder.calls) == 2
    assert blocks_are_back(engine)


def test_exception_on_completion_propagates(tiny_engine: Any) -> None:
    class Failing(Recorder):
        def on_complete(self) -> None:
            raise LookupError("mine")

    engine = tiny_engine()
    with pytest.raises(LookupError, match="mine"):
        stream_with_callback(engine, PROMPT, Failing(), PARAMS)
    assert blocks_are_back(engine)


def test_object_without_the_methods_is_refused_before_anything_starts(tiny_engine: Any) -> None:
    class Half:
        def on_token(self, token: str) -> None:
            raise AssertionError("called")

    engine = tiny_engine()
    for callback, missing in ((print, "on_token"), (Half(), "on_complete")):
        with pytest.raises(TypeError, match=f"without {missing}"):
            stream_with_callback(engine, PROMPT, callback, PARAMS)  # type: ignore[arg-type]
    assert engine.stats().steps == 0
    assert blocks_are_back(engine)


def test_refused_prompt_calls_nothing(tiny_engine: Any) -> None:
    recorder = Recorder()
    with pytest.raises(InvalidPrompt):
        stream_with_callback(tiny_engine(), [], recorder, PARAMS)
    assert recorder.calls == []


def test_failed_step_completes_nothing(tiny_engine: Any, at_call: Any) -> None:
    engine = tiny_engine()

    def act(step: int) -> None:
        if step == 3:
            raise ValueError("mine")

    at_call(engine, act)
    recorder = Recorder()
    with pytest.raises(StepFailed, match="mine"):
        stream_with_callback(engine, PROMPT, recorder, PARAMS)
    assert len(recorder.calls) == 3
    assert blocks_are_back(engine)


def test_metrics_follow_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 2.5, 3.0, 4.0, 6.0, 6.25, 8.0])
    monkeypatch.setattr("inferneo_core.callbacks.time.perf_counter", lambda: next(clock))
    metrics = StreamMetrics(window=4)
    metrics.start()
    for _ in range(6):
        metrics.on_token("x")
    metrics.on_complete()
    # the last four intervals are 0.5, 1, 2 and 0.25 seconds
    assert metrics.get_metrics() == {
        "total_tokens": 6,
        "total_time": 8.0,
        "tokens_per_second": 0.75,
        "average_token_interval": 0.9375,
        "ttft_ms": 2000.0,
        "interval_p50_ms": 500.0,
        "interval_p90_ms": 2000.0,
        "interval_p99_ms": 2000.0,
    }


def test_metrics_before_the_first_token_and_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1.0
    monkeypatch.setattr("inferneo_core.callbacks.time.perf_counter", lambda: now)
    metrics = StreamMetrics()
    assert metrics.get_metrics() is None
    metrics.start()
    empty = metrics.get_metrics()
    assert empty is not None
    assert set(empty.values()) == {0}
    metrics.on_token("x")
    now = 2.0
    metrics.on_token("y")
    metrics.start()
    assert metrics.get_metrics() == empty


def test_metrics_without_a_start_begin_at_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    monkeypatch.setattr("inferneo_core.callbacks.time.perf_counter", lambda: now)
    metrics = StreamMetrics()
    metrics.on_token("x")
    now = 7.0
    metrics.on_token("y")
    measured = metrics.get_metrics()
    assert measured is not None
    assert (measured["total_time"], measured["ttft_ms"], measured["interval_p50_ms"]) == (2.0, 0.0, 2000.0)


def test_progress_bar_counts_the_tokens(tiny_engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(max_tokens=12, description="Telling")
    stream_with_callback(tiny_engine(), PROMPT, bar, PARAMS)
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert last.startswith("Telling: 100%")
    assert "12/12" in last and "token" in last


def test_progress_bar_without_a_total_shows_a_count(tiny_engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stream_with_callback(tiny_engine(), PROMPT, ProgressBar(), PARAMS)
    assert "Generating: 12token" in capsys.readouterr().err


def test_progress_bar_is_left_in_order_after_an_error(
    tiny_engine: Any, capsys: pytest.CaptureFixture[str], at_call: Any
) -> None:
    engine = tiny_engine()

    def act(step: int) -> None:
        if step == 3:
            raise ValueError("mine")

    at_call(engine, act)
    with pytest.raises(StepFailed), ProgressBar(max_tokens=12) as bar:
        stream_with_callback(engine, PROMPT, bar, PARAMS)
    err = capsys.readouterr().err
    assert "3/12" in err and err.endswith("\n")


def test_generate_shows_progress_only_when_asked(tiny_engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine = tiny_engine()
    engine.generate([PROMPT] * 3, PARAMS)
    assert capsys.readouterr().err == ""
    engine.generate([PROMPT] * 3, PARAMS, progress=True)
    assert "3/3" in capsys.readouterr().err
