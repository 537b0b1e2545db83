"""Where a stream's time goes, verb by verb: Profile, and what notes it down while an engine runs.

Two users look at the verbs: `Engine.profile`, which times them, and torch's profiler, whose trace gets a range a verb.
Both put an ObservedOps in the place of a backend, and only while they look; at all other times nothing of this runs.
On CpuOps `Engine.profile` reads the tape's own clock instead, so that a step runs exactly as it is served.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inferneo_core.batch import AttentionMetadata, SampleOutput, SamplingBatch
from inferneo_core.ops.base import CacheLayer, Linear, Norm, Ops
from inferneo_core.outputs import Completion

Around = Callable[[str], AbstractContextManager[object]]
HEAD_START_CYCLES = 40_000_000  # of a GPU, some 20 ms: the host has launched a whole step before the device begins


@dataclass(frozen=True, slots=True)
class VerbTime:
    """Attributes: verb; num_calls in the step; seconds of all of them together, on the device that computes."""

    verb: str
    num_calls: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """One step of the engine.

    Attributes:
        num_tokens: that it computed, of all sequences.
        num_seqs: sequences in it.
        seconds: wall-clock, scheduling and delivery included.
        verbs: in the order of their first call.
    """

    num_tokens: int
    num_seqs: int
    seconds: float
    verbs: tuple[VerbTime, ...]

    @property
    def kind(self) -> Literal["prefill", "decode"]:
        """A prefill if a sequence computes more than one token, otherwise a decode."""
        return "prefill" if self.num_tokens > self.num_seqs else "decode"


@dataclass(frozen=True, slots=True)
class Profile:
    """What Engine.profile saw. Print it for a table.

    Attributes:
        completion: the answer.
        steps: in order; the prompt's come first.
    """

    completion: Completion
    steps: tuple[StepProfile, ...]

    def of_kind(self, kind: Literal["prefill", "decode"]) -> tuple[StepProfile, ...]:
        """The steps that compute more than one token a sequence, or those that compute one each."""
        return tuple(step for step in self.steps if step.kind == kind)

    def verb_seconds(self, kind: Literal["prefill", "decode"]) -> dict[str, float]:
        """Median seconds a step by verb, over the steps of a kind; {} where there are none."""
        times: dict[str, list[float]] = {}
        for step in self.of_kind(kind):
            for verb in step.verbs:
                times.setdefault(verb.verb, []).append(verb.seconds)
        return {verb: statistics.median(seconds) for verb, seconds in times.items()}

    def __str__(self) -> str:
        return "\n\n".join(_table(self, kind) for kind in ("prefill", "decode") if self.of_kind(kind))


def _table(profile: Profile, kind: Literal["prefill", "decode"]) -> str:
    steps = profile.of_kind(kind)
    whole = statistics.median(step.seconds for step in steps)
    calls = {verb.verb: verb.num_calls for verb in steps[-1].verbs}
    rows = profile.verb_seconds(kind)
    rest = max(whole - sum(rows.values()), 0.0)
    title = f"{kind}: {len(steps)} steps of {steps[-1].num_tokens} tokens, median {whole * 1e3:.3f} ms"
    lines = [f"  {verb:<16}{calls.get(verb, 0):>5} x {s * 1e3:>9.3f} ms {s / whole:>5.0%}" for verb, s in rows.items()]
    return "\n".join([title, *lines, f"  {'everything else':<16}{'':>5}   {rest * 1e3:>9.3f} ms {rest / whole:>5.0%}"])


class StepObserver:
    """Collects the verbs' times of the steps that a runner launches.

    Args:
        device: where the verbs run. A GPU's are timed by events, on its own clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._size: tuple[int, int] | None = None  # tokens and sequences of each step that runs
        self._num_steps = 1  # that run together
        self._times: list[tuple[str, float]] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.steps: list[StepProfile] = []

    def begin_step(self, num_tokens: int, num_seqs: int, num_steps: int = 1) -> None:
        """A step is about to be launched, or several together."""
        self._size, self._num_steps = (num_tokens, num_seqs), num_steps
        self._times, self._events = [], []
        if self._is_gpu:
            # Else short kernels would wait for their launches, and events would time the host.
            torch.cuda._sleep(HEAD_START_CYCLES)

    def add(self, times: Sequence[tuple[str, float]]) -> None:
        """(verb, seconds) of calls that something else has timed; of steps that run together, in all of them."""
        self._times += times

    @contextmanager
    def around(self, verb: str) -> Iterator[None]:
        """Times one call."""
        if self._is_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((verb, start, end))
        else:
            started = time.perf_counter()
            yield
            self._times.append((verb, time.perf_counter() - started))

    def end_step(self, seconds: float) -> None:
        """The step is over; seconds: wall-clock. One that was launched before this observer came is left out.

        Steps that ran together each have an equal part of their time.
        """
        if self._size is None:
            return
        for verb, start, end in self._events:
            end.synchronize()
            self._times.append((verb, start.elapsed_time(end) * 1e-3))
        calls: dict[str, list[float]] = {}
        for verb, spent in self._times:
            calls.setdefault(verb, []).append(spent)
        num_steps = self._num_steps
        verbs = tuple(VerbTime(verb, len(spent), sum(spent) / num_steps) for verb, spent in calls.items())
        self.steps += [StepProfile(*self._size, seconds / num_steps, verbs)] * num_steps
        self._size = None


class ObservedOps:
    """A backend whose verbs each run inside a context of that name.

    Args:
        ops: the backend; contracts stand in `ops/base.py`.
        around: around(verb) gives the context.
    """

    name: ClassVar[str] = "observed"

    def __init__(self, ops: Ops, around: Around) -> None:
        self._ops = ops
        self._around = around
        self.dtype = ops.dtype
        self.device = ops.device

    def prepare(self, linear: Linear, *, keeps_rows: bool = False) -> Linear:
        return self._ops.prepare(linear, keeps_rows=keeps_rows)

    def embed(self, ids: Tensor, w: Linear) -> Tensor:
        with self._around("embed"):
            return self._ops.embed(ids, w)

    def qkv_rope_store(
        self,
        x: Tensor,
        norm: Norm,
        w_qkv: Linear,
        positions: Tensor,
        rope: Tensor,
        cache: CacheLayer,
        slot_mapping: Tensor,
    ) -> Tensor:
        with self._around("qkv_rope_store"):
            return self._ops.qkv_rope_store(x, norm, w_qkv, positions, rope, cache, slot_mapping)

    def attention(self, q: Tensor, cache: CacheLayer, metadata: AttentionMetadata) -> Tensor:
        with self._around("attention"):
            return self._ops.attention(q, cache, metadata)

    def linear_add(self, x: Tensor, w: Linear, residual: Tensor | None) -> Tensor:
        with self._around("linear_add"):
            return self._ops.linear_add(x, w, residual)

    def gate_up_silu(self, x: Tensor, norm: Norm, w_gate_up: Linear) -> Tensor:
        with self._around("gate_up_silu"):
            return self._ops.gate_up_silu(x, norm, w_gate_up)

    def lm_head(self, x: Tensor, norm: Norm, w_head: Linear) -> Tensor:
        with self._around("lm_head"):
            return self._ops.lm_head(x, norm, w_head)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        with self._around("sample"):
            return self._ops.sample(logits, batch)

    def score(self, logits: Tensor, targets: Tensor, num_logprobs: int) -> SampleOutput:
        with self._around("score"):
            return self._ops.score(logits, targets, num_logprobs)

    def next_tokens(self, x: Tensor, norm: Norm, w_head: Linear, rows: Tensor, batch: SamplingBatch) -> SampleOutput:
        with self._around("next_tokens"):
            return self._ops.next_tokens(x, norm, w_head, rows, batch)


def trace_ranges() -> Around | None:
    """What opens a range of a running torch.profiler; None while none runs."""
    return torch.profiler.record_function if torch.autograd.profiler._is_profiler_enabled else None
