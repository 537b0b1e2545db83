"""ModelRunner: one scheduled batch through the network and the sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inferneo_core.batch import SampleOutput
from inferneo_core.batch_builder import BatchBuilder
from inferneo_core.kv_cache import KVCache
from inferneo_core.model import Llama
from inferneo_core.ops.base import Ops
from inferneo_core.outputs import Logprob
from inferneo_core.scheduler import ScheduledBatch, ScheduledSequence
from inferneo_core.sequence import Sequence

SCORE_ROWS = 256  # prompt rows whose logits exist at once: 131 MB at a vocabulary of 128k


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
    """A launched step. On the CPU it is complete; on a GPU `wait` is where the host meets the device."""

    def __init__(self, output: SampleOutput | None, prompt_scores: list[PromptScores]) -> None:
        self._output = output
        self.prompt_scores = prompt_scores

    def wait(self) -> SampleOutput | None:
        """The step's tokens, one a sequence that samples, in batch order; None where none did."""
        return self._output


class ModelRunner:
    """Owns the network, its cache and its backend.

    Args:
        model: the network, its weights prepared by `ops`.
        cache: the paged tensors.
        ops: the backend.
        builder: makes a step's tensors.
    """

    def __init__(self, model: Llama, cache: KVCache, ops: Ops, builder: BatchBuilder) -> None:
        self.model = model
        self.cache = cache
        self.ops = ops
        self._builder = builder

    def release(self) -> None:
        """Drop the weights and the cache; the runner is of no use afterwards."""
        del self.model, self.cache

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> Pending:
        """Start one step. Nothing that a repeated launch of the same batch would change is changed."""
        inputs = self._builder.model_input(batch)
        x = self.model.forward(self.ops, inputs, self.cache)
        prompt_scores = self._score_prompts(batch, x)
        sampled = [share.sequence for share in batch.sequences if share.samples]
        if not sampled:
            return Pending(None, prompt_scores)
        sampling = self._builder.sampling_batch(sampled)
        output = self.ops.next_tokens(x, self.model.norm, self.model.head, inputs.rows, sampling)
        return Pending(output, prompt_scores)

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
