"""CpuOps: the verbs on a CPU, in C++ where there is C++ for them (`csrc/`), otherwise TorchOps."""

from __future__ import annotations

import importlib
from typing import ClassVar

import torch
from torch import Tensor

from inferneo_core import errors
from inferneo_core.batch import SampleOutput, SamplingBatch
from inferneo_core.ops.torch_ops import TorchOps


class CpuOps(TorchOps):
    """The CPU backend. `sample` and `score` run in C++ and give TorchOps' bits, whatever the number of threads.

    The environment variable INFERNEO_CPU_ISA (scalar, avx2 or avx512) overrides the instruction set that is chosen
    for this machine; it is read at every call.

    Args:
        dtype: the model dtype, as in TorchOps.
        num_threads: threads the C++ verbs use, at most torch's own number; None uses all of those.

    Attributes:
        isa: the instruction set that was chosen when this object was made.

    Raises:
        BackendUnavailable: the extension is not built, or INFERNEO_CPU_ISA names what this machine cannot run.
        ConfigError: num_threads is below 1.
    """

    name: ClassVar[str] = "cpu"

    def __init__(self, dtype: torch.dtype = torch.float32, num_threads: int | None = None) -> None:
        super().__init__(dtype)
        if num_threads is not None and num_threads < 1:
            raise errors.ConfigError(f"num_threads is {num_threads}; it is at least 1 (None uses torch's own number)")
        try:
            importlib.import_module("inferneo_core._C")
        except ImportError as error:
            raise errors.BackendUnavailable(
                f"the C++ extension inferneo_core._C cannot be loaded ({error}); build it with "
                "`pip install --no-build-isolation -e .`, or choose Engine(ops='torch')"
            ) from error
        self._num_threads = num_threads or 0
        # Bound once: looking an overload up through torch.ops costs more than a greedy row of 1,000 tokens.
        self._sample = torch.ops.inferneo.sample.default
        self._score = torch.ops.inferneo.score.default
        try:
            self.isa: str = torch.ops.inferneo.cpu_isa()
        except RuntimeError as error:
            raise _typed(error) from None

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        try:
            token_ids = self._sample(
                logits,
                batch.floats,
                batch.ints,
                batch.token_counts,
                batch.bias_start,
                batch.bias_ids,
                batch.bias_values,
                self._num_threads,
            )
        except RuntimeError as error:
            raise _typed(error) from None
        return SampleOutput(token_ids) if batch.num_logprobs < 0 else self.score(logits, token_ids, batch.num_logprobs)

    def score(self, logits: Tensor, targets: Tensor, num_logprobs: int) -> SampleOutput:
        try:
            scores = self._score(logits, targets, num_logprobs, self._num_threads)
        except RuntimeError as error:
            raise _typed(error) from None
        return SampleOutput(targets, *scores)


def _typed(error: RuntimeError) -> Exception:
    """The typed error that a C++ message announces ("ShapeError: ..."); any other error as it is."""
    name, _, message = str(error).partition(": ")
    if name in ("ShapeError", "BackendUnavailable"):
        kind: type[errors.InferneoError] = getattr(errors, name)
        return kind(message)
    return error
