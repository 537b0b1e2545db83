"""CpuOps: the verbs on a CPU, in C++ (`csrc/`)."""

from __future__ import annotations

import importlib
import os
from typing import ClassVar

import torch
from torch import Tensor

from inferneo_core import errors
from inferneo_core.batch import AttentionMetadata, SampleOutput, SamplingBatch
from inferneo_core.config import MAX_THREADS
from inferneo_core.ops.base import CacheLayer, Linear, Norm, check_shape
from inferneo_core.ops.cpu_tape import TapeRecorder, typed
from inferneo_core.ops.packing import WeightArena


class CpuOps:
    """The CPU backend: the verbs of `ops/base.py`, where their contracts stand, in C++.

    Activations are fp32 whatever the checkpoint's dtype; weights stay as they are stored, quantised ones included, and
    are multiplied with activations quantised to int8 in blocks of 32. Over a cache in bf16, attention rounds queries
    and softmax weights to bf16. A token's bits depend neither on its batch, nor on how its prompt was cut, nor on the
    number of threads.

    The environment variable INFERNEO_CPU_ISA (scalar, avx2, avx512 or avx512bf16; on ARM scalar or neon) overrides the
    instruction set that is chosen for this machine; it is read at every call.

    Args:
        num_threads: threads that compute, the caller's among them; None takes the cores that this process may use.

    Attributes:
        isa: the instruction set that was chosen when this object was made.
        team: the threads, as the C++ operators take them; they end with this object.

    Raises:
        BackendUnavailable: the extension is not built, or INFERNEO_CPU_ISA names what this machine cannot run.
        ConfigError: num_threads is out of range.
    """

    name: ClassVar[str] = "cpu"
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, num_threads: int | None = None) -> None:
        if num_threads is None:
            num_threads = min(available_cores(), MAX_THREADS)
        if not 1 <= num_threads <= MAX_THREADS:
            raise errors.ConfigError(
                f"num_threads is {num_threads}; it is in [1, {MAX_THREADS}] (None takes the cores this process may use)"
            )
        try:
            importlib.import_module("inferneo_core._C")
        except ImportError as error:
            raise errors.BackendUnavailable(
                f"the C++ extension inferneo_core._C cannot be loaded ({error}); build it with "
                "`pip install --no-build-isolation -e .`, or choose Engine(ops='torch')"
            ) from error
        # Bound once: looking an overload up through torch.ops costs more than a greedy row of 1,000 tokens.
        self._sample = torch.ops.inferneo.sample.default
        self._score = torch.ops.inferneo.score.default
        try:
            self.isa: str = torch.ops.inferneo.cpu_isa()
        except RuntimeError as error:
            raise typed(error) from None
        self._arena = WeightArena()
        self.team: Tensor = torch.ops.inferneo.make_team(num_threads)

    def prepare(self, linear: Linear, *, keeps_rows: bool = False) -> Linear:
        return linear.with_data(self._arena.pack(linear, keeps_rows=keeps_rows), None)

    def embed(self, ids: Tensor, w: Linear) -> Tensor:
        tape = TapeRecorder()
        tape.embed(ids, w)
        return tape.run(self.team, token_ids=ids)

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
        check_shape("x", x, None, w_qkv.in_features)
        tape = TapeRecorder()
        q = tape.qkv_rope_store(tape.input(x), norm, w_qkv, positions, rope, cache, slot_mapping)
        return tape.run(self.team, positions=positions, slot_mapping=slot_mapping).view(len(x), *q.shape[1:])

    def attention(self, q: Tensor, cache: CacheLayer, metadata: AttentionMetadata) -> Tensor:
        check_shape("q", q, None, None, cache.head_dim)
        tape = TapeRecorder()
        tape.attention(tape.input(q), cache, metadata)
        return tape.run(self.team, attention=metadata)

    def linear_add(self, x: Tensor, w: Linear, residual: Tensor | None) -> Tensor:
        check_shape("x", x, None, w.in_features)
        if residual is not None:
            check_shape("residual", residual, len(x), w.out_features)
        tape = TapeRecorder()
        tape.linear_add(tape.input(x), w, None if residual is None else tape.input(residual))
        return tape.run(self.team)

    def gate_up_silu(self, x: Tensor, norm: Norm, w_gate_up: Linear) -> Tensor:
        check_shape("x", x, None, w_gate_up.in_features)
        tape = TapeRecorder()
        tape.gate_up_silu(tape.input(x), norm, w_gate_up)
        return tape.run(self.team)

    def lm_head(self, x: Tensor, norm: Norm, w_head: Linear) -> Tensor:
        check_shape("x", x, None, w_head.in_features)
        tape = TapeRecorder()
        tape.lm_head(tape.input(x), norm, w_head)
        return tape.run(self.team, rows=torch.arange(len(x)))

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        try:
            token_ids = self._sample(
                self.team,
                logits,
                batch.floats,
                batch.ints,
                batch.token_counts,
                batch.bias_start,
                batch.bias_ids,
                batch.bias_values,
            )
        except RuntimeError as error:
            raise typed(error) from None
        return SampleOutput(token_ids) if batch.num_logprobs < 0 else self.score(logits, token_ids, batch.num_logprobs)

    def score(self, logits: Tensor, targets: Tensor, num_logprobs: int) -> SampleOutput:
        try:
            scores = self._score(self.team, logits, targets, num_logprobs)
        except RuntimeError as error:
            raise typed(error) from None
        return SampleOutput(targets, *scores)

    def next_tokens(self, x: Tensor, norm: Norm, w_head: Linear, rows: Tensor, batch: SamplingBatch) -> SampleOutput:
        return self.sample(self.lm_head(x[rows], norm, w_head), batch)


def available_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
