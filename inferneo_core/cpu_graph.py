"""CpuGraph: a whole step, or several, in one call from Python into C++.

At batch 1 a token of a small model takes some 3 ms, and 150 calls from Python would cost a quarter of that again. So
the forward pass is recorded once, as `model.py` writes it, and the tape is replayed for every step: prefill, decode and
both together, for any number of tokens, output head and sampler included.

A step leaves nothing of Python in the caches: what takes 20 us when it is warm takes 200 after 97 MB of weights. So
where a sequence's next step needs nobody, it follows in the same call (a burst).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inferneo_core.batch import AttentionMetadata, ModelInput, SampleOutput, SamplingBatch
from inferneo_core.kv_cache import KVCache
from inferneo_core.model import Llama
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.cpu_tape import TapeRecorder, sequence_tensors, typed

# How much a burst may read: 15 ms on two cores that read 33 GB/s. For so long a stream's tokens wait for one another,
# and a new request for its first step. Counted, not timed, so that the same requests make the same steps.
BURST_BYTES = 500_000_000
MAX_BURST = 4  # steps; at 4, what lies between two calls is under 2% of a step of the default model
TOKENS_A_READ = 4  # multiplying a weight with so many tokens takes as long as reading it


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
        self._last: tuple[ModelInput, int, SampleOutput] | None = None
        layers = (weight for layer in model.layers for weight in (layer.qkv, layer.out, layer.gate_up, layer.down))
        self._weight_bytes = sum(weight.weight.nbytes for weight in (*layers, model.head))
        self._token_bytes = cache.num_bytes // (cache.layers[0].k.shape[0] * cache.block_size)

    def burst_size(self, seq_lens: Sequence[int]) -> int:
        """How many steps to run in one call where sequences of these lengths decode."""
        num_reads = -(-len(seq_lens) // TOKENS_A_READ)
        step_bytes = num_reads * self._weight_bytes + sum(seq_lens) * self._token_bytes
        return max(1, min(MAX_BURST, BURST_BYTES // step_bytes))

    def launch(self, inputs: ModelInput, sampling: SamplingBatch | None, num_steps: int = 1) -> SampleOutput | None:
        """Run a step, or one of decodes and those after it, each of the tokens that the one before has drawn.

        Returns:
            What the rows draw, step by step; None, without `sampling`, where none does.
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
                num_steps,
            )
        except RuntimeError as error:
            raise typed(error) from None
        if not outputs:
            return None
        output = SampleOutput(*outputs)
        if num_logprobs < 0:
            self._last = inputs, num_steps, output
        return output

    def holds(self, inputs: ModelInput, num_steps: int) -> bool:
        """Whether the last launch was of these tensors and as many steps, so that it can be run again."""
        return self._last is not None and self._last[0] is inputs and self._last[1] == num_steps

    def again(self) -> SampleOutput:
        """Run the last launch again, with what its tensors hold now: its sampler's, too.

        Returns:
            The output that `launch` gave, overwritten.
        Raises:
            ShapeError: as `launch` does.
        """
        assert self._last is not None, "there is no launch to run again"
        try:
            self._again(self._tape, self._team)
        except RuntimeError as error:
            raise typed(error) from None
        return self._last[2]

    def time_verbs(self, on: bool) -> None:
        """Whether each verb of the steps to come is timed, inside C++: one look at the clock a verb."""
        torch.ops.inferneo.tape_time(self._tape, on)

    def verb_times(self) -> list[tuple[str, float]]:
        """(verb, seconds) since the times were last read, over all steps, in order; the sampler's last."""
        nanoseconds: list[int] = torch.ops.inferneo.tape_times(self._tape).tolist()
        return [(verb, time * 1e-9) for verb, time in zip(self._verbs, nanoseconds, strict=True)]


def _sampling_tensors(batch: SamplingBatch) -> tuple[torch.Tensor | None, ...]:
    return batch.floats, batch.ints, batch.token_counts, batch.bias_start, batch.bias_ids, batch.bias_values


def _any_input() -> ModelInput:
    """What stands for a step's tensors while the forward pass is recorded."""
    empty = torch.empty(0, dtype=torch.int64)
    return ModelInput(empty, empty, empty, AttentionMetadata(empty, empty, empty, 0, 0), empty)
