"""CpuGraph: a whole step in one call from Python into C++.

At batch 1 a token of a small model takes some 3 ms, and 150 calls from Python would cost a quarter of that again. So
the forward pass is recorded once, as `model.py` writes it, and the tape is replayed for every step: prefill, decode and
both together, for any number of tokens, output head and sampler included.
"""

from __future__ import annotations

import torch

from inferneo_core.batch import AttentionMetadata, ModelInput, SampleOutput, SamplingBatch
from inferneo_core.kv_cache import KVCache
from inferneo_core.model import Llama
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.cpu_tape import TapeRecorder, sequence_tensors, typed


class CpuGraph:
    """Runs the steps of one model on one cache.

    Args:
        model: its weights prepared by `ops`.
        cache, ops: what a step runs on.
    """

    def __init__(self, model: Llama, cache: KVCache, ops: CpuOps) -> None:
        recorder = TapeRecorder()
        x = model.forward(recorder, _any_input(), cache)
        recorder.lm_head(x, model.norm, model.head)
        self._tape = recorder.tape
        self._team = ops.team
        self._step = torch.ops.inferneo.tape_step.default  # bound once: the lookup costs microseconds

    def launch(self, inputs: ModelInput, sampling: SamplingBatch | None) -> SampleOutput | None:
        """Run a step. Returns what its rows draw; None, without `sampling`, where none does.

        Raises:
            ShapeError: the step's tensors disagree, or name tokens, positions or blocks that there are not.
        """
        batch = (None,) * 6 if sampling is None else _sampling_tensors(sampling)
        num_logprobs = -1 if sampling is None else sampling.num_logprobs
        try:
            outputs = self._step(
                self._tape,
                self._team,
                inputs.token_ids,
                inputs.positions,
                inputs.slot_mapping,
                sequence_tensors(inputs.attention),
                inputs.rows,
                *batch,
                num_logprobs,
            )
        except RuntimeError as error:
            raise typed(error) from None
        return SampleOutput(*outputs) if outputs else None


def _sampling_tensors(batch: SamplingBatch) -> tuple[torch.Tensor | None, ...]:
    return batch.floats, batch.ints, batch.token_counts, batch.bias_start, batch.bias_ids, batch.bias_values


def _any_input() -> ModelInput:
    """What stands for a step's tensors while the forward pass is recorded."""
    empty = torch.empty(0, dtype=torch.int64)
    return ModelInput(empty, empty, empty, AttentionMetadata(empty, empty, empty, 0, 0), empty)
