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
        self._verbs = (*recorder.verbs, "sample")
        self._team = ops.team
        self._step = torch.ops.inferneo.tape_step.default  # bound once: the lookup costs microseconds
        self._again = torch.ops.inferneo.tape_again.default
        self._last: tuple[ModelInput, SampleOutput] | None = None

    def launch(self, inputs: ModelInput, sampling: SamplingBatch | None) -> SampleOutput | None:
        """Run a step. Returns what its rows draw; None, without `sampling`, where none does.

        Raises:
            ShapeError: the step's tensors disagree, or name tokens, positions or blocks that there are not.
        """
        batch = (None,) * 6 if sampling is None else _sampling_tensors(sampling)
        num_logprobs = -1 if sampling is None else sampling.num_logprobs
        self._last = None
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
        if not outputs:
            return None
        output = SampleOutput(*outputs)
        if num_logprobs < 0:
            self._last = inputs, output
        return output

    def holds(self, inputs: ModelInput) -> bool:
        """Whether the last step was one of these tensors, and can be run again with what they hold by now."""
        return self._last is not None and self._last[0] is inputs

    def again(self) -> SampleOutput:
        """Run the last step again, with what its tensors hold now: its sampler's, too.

        Returns:
            The output that `launch` gave, overwritten.
        Raises:
            ShapeError: as `launch` does.
        """
        assert self._last is not None, "no step can be run again"
        try:
            self._again(self._tape, self._team)
        except RuntimeError as error:
            raise typed(error) from None
        return self._last[1]

    def time_verbs(self, on: bool) -> None:
        """Whether each verb of the steps to come is timed, inside C++: one look at the clock a verb."""
        torch.ops.inferneo.tape_time(self._tape, on)

    def verb_times(self) -> list[tuple[str, float]]:
        """(verb, seconds) of the last step that was timed, in order; the sampler's last."""
        nanoseconds: list[int] = torch.ops.inferneo.tape_times(self._tape).tolist()
        return [(verb, time * 1e-9) for verb, time in zip(self._verbs, nanoseconds, strict=True)]


def _sampling_tensors(batch: SamplingBatch) -> tuple[torch.Tensor | None, ...]:
    return batch.floats, batch.ints, batch.token_counts, batch.bias_start, batch.bias_ids, batch.bias_values


def _any_input() -> ModelInput:
    """What stands for a step's tensors while the forward pass is recorded."""
    empty = torch.empty(0, dtype=torch.int64)
    return ModelInput(empty, empty, empty, AttentionMetadata(empty, empty, empty, 0, 0), empty)
