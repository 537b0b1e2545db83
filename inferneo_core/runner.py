"""ModelRunner: one scheduled batch through the network and the sampler."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from inferneo_core.batch import ModelInput, SampleOutput, SamplingBatch
from inferneo_core.batch_builder import BatchBuilder
from inferneo_core.cpu_graph import CpuGraph
from inferneo_core.cuda_graphs import DecodeGraphs
from inferneo_core.kv_cache import SCORE_ROWS, KVCache
from inferneo_core.model import Llama
from inferneo_core.ops.base import Ops
from inferneo_core.outputs import Logprob
from inferneo_core.profile import ObservedOps, StepObserver, trace_ranges
from inferneo_core.scheduler import ScheduledBatch, ScheduledSequence
from inferneo_core.sequence import Sequence
from inferneo_core.warm_up import warm_up


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of some consecutive prompt tokens of one sequence.

    Attributes:
        sequence: whose prompt.
        start: place in the prompt of the first of them.
        logprobs: one Logprob a token.
    """

    sequence: Sequence
    start: int
    logprobs: list[Logprob]


class Pending:
    """A launched step. On the CPU it is complete; on a GPU `wait` is where the host meets the device.

    Attributes:
        prompt_scores: log-probabilities of the prompt tokens that the step computed.
        can_go_on: whether the step after it can be launched before its tokens are known.
    """

    def __init__(
        self, output: SampleOutput | None, prompt_scores: list[PromptScores], *, can_go_on: bool = False
    ) -> None:
        self._output = output
        self._source: SampleOutput | None = None  # what is being copied to the host
        self._arrived: torch.cuda.Event | None = None
        self.prompt_scores = prompt_scores
        self.can_go_on = can_go_on

    def copy_to_host(self, stream: torch.cuda.Stream) -> None:
        """Start the copy of a GPU's output into pinned memory, beside whatever is launched next."""
        if self._output is None:
            return
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            host = self._output.to_host()
            arrived = torch.cuda.Event()
            arrived.record(stream)
        if self._output.logprobs is not None:  # the next replay overwrites them; the token ids stand in a ring
            current.wait_event(arrived)
        self._source, self._output, self._arrived = self._output, host, arrived

    def wait(self) -> SampleOutput | None:
        """The tokens, one a sequence that samples, in batch order, step by step; None where none did."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._source = None
        return self._output


class ModelRunner:
    """Owns the network, its cache and its backend.

    Args:
        model: the network, its weights prepared by `ops`.
        cache: the paged tensors.
        ops: the backend.
        builder: makes a step's tensors.
        graphs: runs the steps that only decode; None runs them as all others.
        tape: runs all steps but those that score prompts; None runs them verb by verb.
    """

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        ops: Ops,
        builder: BatchBuilder,
        graphs: DecodeGraphs | None = None,
        tape: CpuGraph | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.ops = ops
        self._builder = builder
        self._graphs = graphs
        self._tape = tape
        self._copies = torch.cuda.Stream(ops.device) if ops.device.type == "cuda" else None
        self._observer: StepObserver | None = None

    def release(self) -> None:
        """Drop the weights and the cache; the runner is of no use afterwards."""
        del self.model, self.cache, self.ops, self._graphs, self._tape

    def warm_up(self, *, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int) -> None:
        """Compile and capture what serving within these limits launches, so that no stream waits for a compiler."""
        limits = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len}
        with self._on_device():
            warm_up(self.model, self.cache, self.ops, max_num_batched_tokens=max_num_batched_tokens, **limits)
            if self._graphs is not None:
                self._graphs.warm_up()

    def _on_device(self) -> AbstractContextManager[object]:
        """Makes the runner's GPU the current one, where Triton launches; whichever thread comes here."""
        return torch.cuda.device(self.ops.device) if self.ops.device.type == "cuda" else nullcontext()

    def observe(self, observer: StepObserver | None) -> None:
        """Have the verbs of every later step timed; None ends it."""
        self._observer = observer
        if self._tape is not None:
            self._tape.time_verbs(observer is not None)

    def num_steps(self, batch: ScheduledBatch) -> int:
        """How many steps of a batch that decodes are worth launching together."""
        if self._tape is None or trace_ranges() is not None:
            return 1
        return self._tape.burst_size([share.start for share in batch.sequences])

    def launch(self, batch: ScheduledBatch) -> Pending:
        """Start a batch. Nothing that a repeated launch of the same batch would change is changed."""
        around = trace_ranges()
        if self._observer is not None:
            self._observer.begin_step(batch.num_tokens, len(batch.sequences), batch.num_steps)
        # A tracer that came since several steps were scheduled sees those after them.
        tape = self._tape if around is None or batch.num_steps > 1 else None
        if tape is not None:
            again = self._builder.next_decode(batch)
            if again is not None and tape.holds(again, batch.num_steps):
                return self._taped(tape, tape.again())
        inputs = self._builder.model_input(batch)
        sampled = [share.sequence for share in batch.sequences if share.samples]
        sampling = self._builder.sampling_batch(sampled) if sampled else None
        if tape is not None and not any(map(_scores_its_prompt, batch.sequences)):
            return self._taped(tape, tape.launch(inputs, sampling, batch.num_steps))
        if self._observer is not None:
            around = self._observer.around
        ops: Ops = self.ops if around is None else ObservedOps(self.ops, around)
        with torch.inference_mode(), self._on_device():
            if (
                around is None
                and self._graphs is not None
                and sampling is not None
                and self._graphs.takes(inputs, sampling)
            ):
                self._builder.device_counts(sampled)
                return self._pending(self._graphs.launch(inputs, sampling), [], can_go_on=True)
            return self._launch(batch, inputs, sampling, ops)

    def _taped(self, tape: CpuGraph, output: SampleOutput | None) -> Pending:
        """Steps that the tape has run."""
        if self._observer is not None:
            self._observer.add(tape.verb_times())
        return Pending(output, [])

    def _launch(self, batch: ScheduledBatch, inputs: ModelInput, sampling: SamplingBatch | None, ops: Ops) -> Pending:
        """A step as calls of the verbs."""
        inputs = inputs.to(self.ops.device)
        x = self.model.forward(ops, inputs, self.cache)
        prompt_scores = self._score_prompts(batch, x)
        if sampling is None:
            return Pending(None, prompt_scores)
        sampling = sampling.to(self.ops.device)
        output = ops.next_tokens(x, self.model.norm, self.model.head, inputs.rows, sampling)
        return self._pending(output, prompt_scores)

    def launch_ahead(self, batch: ScheduledBatch) -> Pending:
        """Start the step after the one launched last, which could go on; its tokens are on the device alone.

        Args:
            batch: the same sequences as the last one's, each one token further.
        """
        assert self._graphs is not None, "only a graph's step can go on"
        block_size = self.cache.block_size
        new_blocks = [
            (row, (share.start + 1) // block_size, share.sequence.block_table[(share.start + 1) // block_size])
            for row, share in enumerate(batch.sequences)
            if (share.start + 1) % block_size == 0
        ]
        self._builder.device_counts(share.sequence for share in batch.sequences)
        with torch.inference_mode(), self._on_device():
            return self._pending(self._graphs.launch_ahead(new_blocks), [], can_go_on=True)

    def _pending(self, output: SampleOutput, prompt_scores: list[PromptScores], *, can_go_on: bool = False) -> Pending:
        pending = Pending(output, prompt_scores, can_go_on=can_go_on)
        if self._copies is not None:
            pending.copy_to_host(self._copies)
        return pending

    def _score_prompts(self, batch: ScheduledBatch, x: Tensor) -> list[PromptScores]:
        scores = []
        row = 0
        for share in batch.sequences:
            if share.sequence.params.prompt_logprobs is not None:
                scores += self._score_prompt(share, x, row, share.sequence.params.prompt_logprobs)
            row += share.num_tokens
        return scores

    def _score_prompt(self, share: ScheduledSequence, x: Tensor, row: int, num_logprobs: int) -> list[PromptScores]:
        """Score the prompt tokens that follow this chunk's, in slabs of rows."""
        sequence = share.sequence
        end = min(share.start + share.num_tokens, sequence.num_prompt_tokens - 1)
        scores = []
        for start in range(share.start, end, SCORE_ROWS):
            stop = min(start + SCORE_ROWS, end)
            hidden = x[row + start - share.start : row + stop - share.start]
            logits = self.ops.lm_head(hidden, self.model.norm, self.model.head)
            targets = torch.tensor(sequence.token_ids[start + 1 : stop + 1], device=x.device)
            scored = self.ops.score(logits, targets, num_logprobs)
            scores.append(PromptScores(sequence, start + 1, logprobs_of(scored)))
        return scores


def _scores_its_prompt(share: ScheduledSequence) -> bool:
    sequence = share.sequence
    return sequence.params.prompt_logprobs is not None and share.start + 1 < sequence.num_prompt_tokens


def logprobs_of(output: SampleOutput) -> list[Logprob]:
    """One Logprob a row of an output that carries log-probabilities."""
    assert output.logprobs is not None and output.ranks is not None
    assert output.top_ids is not None and output.top_logprobs is not None
    rows = zip(
        output.token_ids.tolist(),
        output.logprobs.tolist(),
        output.ranks.tolist(),
        output.top_ids.tolist(),
        output.top_logprobs.tolist(),
        strict=True,
    )
    return [
        Logprob(token_id, logprob, rank, tuple(zip(top_ids, top_logprobs, strict=True)))
        for token_id, logprob, rank, top_ids, top_logprobs in rows
    ]
