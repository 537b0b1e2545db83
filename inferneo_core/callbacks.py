"""Callbacks on a stream: the ten-line consumer, and two ready-made ones."""

from __future__ import annotations

import math
import time
from collections import deque
from types import TracebackType
from typing import Protocol

from tqdm import tqdm

from inferneo_core.engine import Engine
from inferneo_core.outputs import Completion
from inferneo_core.prompt import Prompt
from inferneo_core.sampling_params import SamplingParams


class StreamCallback(Protocol):
    """What `stream_with_callback` calls; any class with these two methods will do."""

    def on_token(self, token: str) -> bool | None:
        """Called once a token with the text it completed, "" while text is held back; False stops the stream."""

    def on_complete(self) -> object:
        """Called once after a normal end or a False, never after an exception."""


def stream_with_callback(
    engine: Engine, prompt: Prompt, callback: StreamCallback, params: SamplingParams | None = None
) -> Completion:
    """Stream an answer into a callback, on the caller's thread.

    Args:
        engine: the Engine.
        prompt: what Engine.stream takes: text, token ids or chat messages.
        callback: its on_token and on_complete are called; if one raises, the request is aborted and the exception
            propagates.
        params: SamplingParams; None takes its defaults.
    Returns:
        The Completion; its finish_reason is "abort" after a False.
    Raises:
        TypeError: the callback lacks a method; nothing was started.
        What Engine.stream and iteration over its stream raise.
    """
    for method in ("on_token", "on_complete"):
        if not callable(getattr(callback, method, None)):
            raise TypeError(
                f"callback is a {type(callback).__name__} without {method}; it has on_token(token) and on_complete()"
            )
    with engine.stream(prompt, params) as stream:
        for token in stream:
            if callback.on_token(token.text) is False:
                break
    callback.on_complete()
    return stream.completion()


class StreamMetrics:
    """A callback that measures a stream as its consumer sees it.

    Call `start` when the request is sent; without it the clock starts at the first token. Intervals between tokens are
    kept for the last `window` of them.

    On a CPU up to four tokens are drawn in one call and come together. Most intervals are then near 0, interval_p50_ms
    among them: tokens_per_second and average_token_interval tell the speed.
    """

    def __init__(self, window: int = 100) -> None:
        self.start_time: float | None = None
        self.tokens_received = 0
        self._last_time: float | None = None
        self._ttft: float | None = None
        self._intervals: deque[float] = deque(maxlen=window)

    def start(self) -> None:
        """Start, or restart, the clock; forget what was measured before."""
        self.start_time = time.perf_counter()
        self.tokens_received = 0
        self._last_time = self._ttft = None
        self._intervals.clear()

    def on_token(self, token: str) -> None:
        """Count one token."""
        now = time.perf_counter()
        if self.start_time is None:
            self.start_time = now
        if self._last_time is None:
            self._ttft = now - self.start_time
        else:
            self._intervals.append(now - self._last_time)
        self._last_time = now
        self.tokens_received += 1

    def on_complete(self) -> None:
        """Nothing to do: `get_metrics` may be called at any time."""

    def get_metrics(self) -> dict[str, float] | None:
        """What was measured so far; None before the clock has started.

        Returns:
            total_tokens, total_time (seconds), tokens_per_second, average_token_interval (seconds); then ttft_ms, and
            the percentiles of the intervals in milliseconds: interval_p50_ms, interval_p90_ms, interval_p99_ms.
        """
        if self.start_time is None:
            return None
        total_time = time.perf_counter() - self.start_time
        intervals = sorted(self._intervals)
        return {
            "total_tokens": self.tokens_received,
            "total_time": total_time,
            "tokens_per_second": self.tokens_received / total_time if total_time > 0 else 0.0,
            "average_token_interval": sum(intervals) / len(intervals) if intervals else 0.0,
            "ttft_ms": 0.0 if self._ttft is None else self._ttft * 1e3,
            "interval_p50_ms": _percentile(intervals, 0.50) * 1e3,
            "interval_p90_ms": _percentile(intervals, 0.90) * 1e3,
            "interval_p99_ms": _percentile(intervals, 0.99) * 1e3,
        }


def _percentile(ordered: list[float], share: float) -> float:
    """The nearest-rank percentile; 0.0 of nothing."""
    if not ordered:
        return 0.0
    return ordered[math.ceil(share * len(ordered)) - 1]


class ProgressBar:
    """A callback that shows a tqdm bar of the tokens generated.

    Args:
        max_tokens: the bar's total; None shows a bare count.
        description: what stands before the bar.
    """

    def __init__(self, max_tokens: int | None = None, description: str = "Generating") -> None:
        self._bar: tqdm[None] = tqdm(total=max_tokens, desc=description, unit="token")

    def on_token(self, token: str) -> None:
        """Advance by one token."""
        self._bar.update(1)

    def on_complete(self) -> None:
        """Leave the finished bar on the terminal."""
        self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
