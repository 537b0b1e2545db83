"""Scheduler: which tokens of which sequences the next step computes.

A step has one token budget, spent in this order:

    1. decodes       every running sequence with one token left to compute gets it: a stream never waits for a prompt
    2. prefills      running sequences whose prompt is partly computed get the rest, oldest first
    3. admissions    waiting sequences start, first come first served

A sequence gets blocks for its whole prompt when it is admitted, so a prefill once begun never waits for memory. A
decode takes a block whenever its last one is full. If none is left, somebody is preempted: the youngest paused
sequence that holds blocks, else the youngest running one. It gives up its blocks and later computes them again, output
included; what is still in the prefix cache by then it finds there. The oldest running sequence is never preempted,
hence always progresses, hence every sequence ends. A running sequence is never preempted for a waiting one.

Sources: iteration-level scheduling as in Orca (OSDI 2022); chunked prefill as in Sarathi-Serve, arXiv 2403.02310.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import abc
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from inferneo_core.block_manager import BlockManager
from inferneo_core.outputs import FinishReason
from inferneo_core.sequence import Sequence, SequenceStatus

_by_arrival = attrgetter("seq_id")


class ScheduledSequence(NamedTuple):
    """One sequence's share of a step: its tokens from position `start` to `start + num_tokens`.

    Attributes:
        sequence: whose they are.
        start: position of the first; the keys and values before it are in the cache.
        num_tokens: how many.
        samples: whether they reach the sequence's end, so that its next token is drawn after them.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step's work, or that of several in a row; false when there is none.

    Attributes:
        sequences: each sequence's share; decodes first.
        num_tokens: tokens to compute, over all of them.
        num_steps: how many steps are launched together. Where it is more than one, every sequence decodes: in each
            later step the token that it drew in the one before.
    """

    sequences: tuple[ScheduledSequence, ...]
    num_tokens: int
    num_steps: int = 1

    def __bool__(self) -> bool:
        return bool(self.sequences)

    def ahead(self, num_tokens: int) -> ScheduledBatch:
        """A step of the same sequences, each so many tokens further."""
        shares = [ScheduledSequence(seq, start + num_tokens, n, samples) for seq, start, n, samples in self.sequences]
        return ScheduledBatch(tuple(shares), self.num_tokens)


class Scheduler:
    """Decides each step, and keeps the books on what came of it.

    `schedule` hands out work and the blocks for it; only `update` counts the work as done. So a step that fell through
    in between is scheduled again, in the same blocks.

    Args:
        block_manager: the blocks to hand out.
        max_num_seqs: sequences that run at once. No more than max_num_batched_tokens ever do, so that one step can
            serve them all, and none has to wait its turn.
        max_num_batched_tokens: tokens a step.

    Attributes:
        num_preemptions: how often a sequence lost its blocks.
        prefix_query_tokens: prompt tokens that were looked up in the prefix cache, each prompt once.
        prefix_hit_tokens: those found there.
    """

    def __init__(self, block_manager: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        assert max_num_seqs >= 1, f"max_num_seqs is {max_num_seqs}"
        assert max_num_batched_tokens >= 1, f"max_num_batched_tokens is {max_num_batched_tokens}"
        self.block_manager = block_manager
        self.max_num_running = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        # Every unfinished sequence stands in the list of its status, in the order of arrival.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._paused: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        """Sequences not yet admitted, or preempted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences admitted, and neither paused nor preempted since."""
        return len(self._running)

    @property
    def num_paused(self) -> int:
        """Sequences that `pause` has set aside."""
        return len(self._paused)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence. The caller has refused those that the whole cache could not hold."""
        assert self.block_manager.blocks_for(seq.num_prompt_tokens + seq.max_tokens) <= self.block_manager.total_blocks
        assert seq.status is SequenceStatus.WAITING, seq
        insort(self._waiting, seq, key=_by_arrival)

    def schedule(self) -> ScheduledBatch:
        """The work of the next step. Admits and preempts sequences, and gives each the blocks it will write."""
        decodes, prefilling = self._schedule_decodes()
        budget = self.max_num_batched_tokens - len(decodes)
        prefills: list[ScheduledSequence] = []
        for seq in prefilling:
            budget -= self._schedule_prefill(seq, budget, prefills)
        while budget and self._waiting and len(self._running) < self.max_num_running and self._admit(self._waiting[0]):
            seq = self._waiting.pop(0)
            self._enter(self._running, seq, SequenceStatus.RUNNING)
            budget -= self._schedule_prefill(seq, budget, prefills)
        return ScheduledBatch((*decodes, *prefills), self.max_num_batched_tokens - budget)

    def schedule_ahead(self, batch: ScheduledBatch) -> ScheduledBatch | None:
        """The step after `batch`, while nobody knows yet which tokens `batch` draws; None where they must be known.

        It is the same sequences, one token further. Each has room for one token more than it computes, since the device
        works out a token's slot while it draws it. A sequence that ends with the token that `batch` draws is in it for
        nothing.
        """
        block_size = self.block_manager.block_size
        if self._num_unseen(batch, 2) < 2:
            return None
        if any(start + 1 >= len(seq.block_table) * block_size for seq, start, _, _ in batch.sequences):
            return None
        if not all(self.block_manager.allocate(share.sequence, share.start + 3) for share in batch.sequences):
            return None
        return batch.ahead(1)

    def extend(self, batch: ScheduledBatch, num_steps: int) -> ScheduledBatch:
        """`batch`, just scheduled, as up to `num_steps` steps that are launched together.

        It stays one step where a sequence draws its first token, or a draw waits for what the host keeps of the last.
        Nobody is preempted for it: where blocks are short, it ends with those that are there. A sequence that ends
        before its last step is in the rest for nothing.
        """
        num_steps = self._num_unseen(batch, num_steps)
        if num_steps < 2 or any(not seq.num_output_tokens or _needs_host(seq) for seq, _, _, _ in batch.sequences):
            return batch
        block_size = self.block_manager.block_size
        for seq, start, _, _ in batch.sequences:
            if start + num_steps > len(seq.block_table) * block_size:
                self.block_manager.allocate(seq, start + num_steps)
                num_steps = min(num_steps, len(seq.block_table) * block_size - start)
        return ScheduledBatch(batch.sequences, batch.num_tokens, num_steps)

    def _num_unseen(self, batch: ScheduledBatch, most: int) -> int:
        """How many tokens each sequence may draw, from `batch` on, before the scheduler must know one; `most` at most.

        One, unless every running sequence decodes and nobody could be admitted; and none that max_tokens forbids.
        """
        if len(batch.sequences) != len(self._running) or (self._waiting and len(self._running) < self.max_num_running):
            return 1
        for seq, start, num_tokens, samples in batch.sequences:
            if not samples or num_tokens != 1 or seq.status is not SequenceStatus.RUNNING:
                return 1
            most = min(most, seq.num_prompt_tokens + seq.max_tokens - start - 1)
        return most

    def update(self, batch: ScheduledBatch, token_ids: abc.Sequence[int]) -> None:
        """Count a step as done: its keys and values are in the cache and its tokens are drawn.

        A sequence that was finished or preempted since it was scheduled has no blocks left; its share is dropped.

        Args:
            batch: what the last `schedule` returned, or the step `ahead` of the batch updated last.
            token_ids: the drawn token of each share that samples, in the order of the batch.
        """
        assert len(token_ids) == sum(share.samples for share in batch.sequences), "one token a share that samples"
        drawn = iter(token_ids)
        for seq, start, num_tokens, samples in batch.sequences:
            token_id = next(drawn) if samples else None
            if not seq.block_table:
                continue
            assert start == seq.num_computed_tokens, f"{seq} was scheduled from {start}"
            self.block_manager.commit(seq, start + num_tokens)
            if token_id is not None:
                reason = seq.append(token_id)
                if reason is not None:
                    self.finish(seq, reason)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence, whatever its state, and release its blocks. One that has ended stays as it is."""
        if seq.is_finished:
            return
        self._leave(seq)
        self.block_manager.free(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason

    def pause(self, seq: Sequence) -> None:
        """Set a sequence aside until `resume`: it keeps its blocks until another needs them."""
        if seq.status in (SequenceStatus.WAITING, SequenceStatus.RUNNING):
            self._leave(seq)
            self._enter(self._paused, seq, SequenceStatus.PAUSED)

    def resume(self, seq: Sequence) -> None:
        """Let a paused sequence go on: at once if it still has its blocks and may run, else from the queue."""
        if seq.status is not SequenceStatus.PAUSED:
            return
        self._leave(seq)
        if seq.block_table and len(self._running) < self.max_num_running:
            self._enter(self._running, seq, SequenceStatus.RUNNING)
        else:
            self.block_manager.free(seq)
            self._enter(self._waiting, seq, SequenceStatus.WAITING)

    def _schedule_decodes(self) -> tuple[list[ScheduledSequence], list[Sequence]]:
        """The decodes of this step, each with the block it needs, and the running sequences with more to compute."""
        block_size = self.block_manager.block_size
        decodes: list[ScheduledSequence] = []
        prefilling: list[Sequence] = []
        for seq in self._running:  # shrinks from its end, as the youngest are preempted; never before `seq`
            start = seq.num_computed_tokens
            if start + 1 < len(seq.token_ids):
                prefilling.append(seq)
            elif start < len(seq.block_table) * block_size or self._grow(seq):
                decodes.append(ScheduledSequence(seq, start, 1, True))
        return decodes, prefilling

    def _schedule_prefill(self, seq: Sequence, budget: int, prefills: list[ScheduledSequence]) -> int:
        """Schedule as much of the sequence as the budget allows; returns how many tokens that is."""
        num_left = seq.num_tokens - seq.num_computed_tokens
        num_tokens = min(num_left, budget)
        if num_tokens:
            prefills.append(ScheduledSequence(seq, seq.num_computed_tokens, num_tokens, num_tokens == num_left))
        return num_tokens

    def _admit(self, seq: Sequence) -> bool:
        """Give a waiting sequence blocks for all its tokens and the one to be drawn.

        One more block must remain for each running sequence. Otherwise one of them would soon be preempted, and that
        is the sequence just admitted: its prefill would be for nothing.
        """
        while not self.block_manager.allocate(seq, seq.num_tokens + 1, headroom=len(self._running)):
            if not self._preempt_paused():
                return False
        if not seq.was_admitted:
            seq.was_admitted = True
            seq.num_cached_tokens = seq.num_computed_tokens
            if self.block_manager.enable_prefix_caching and seq.uses_prefix_cache:
                self.prefix_query_tokens += seq.num_prompt_tokens
                self.prefix_hit_tokens += seq.num_cached_tokens
        return True

    def _grow(self, seq: Sequence) -> bool:
        """Give a running sequence room for its tokens, at the cost of paused and younger ones; False at its own."""
        while not self.block_manager.allocate(seq, seq.num_tokens):
            if self._preempt_paused():
                continue
            youngest = self._running.pop()
            self._preempt(youngest)
            self._enter(self._waiting, youngest, SequenceStatus.WAITING)
            if youngest is seq:
                return False
        return True

    def _preempt_paused(self) -> bool:
        """Take the blocks of the youngest paused sequence that has any; False if none has."""
        for seq in reversed(self._paused):
            if seq.block_table:
                self._preempt(seq)
                return True
        return False

    def _preempt(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        self.num_preemptions += 1

    def _enter(self, queue: list[Sequence], seq: Sequence, status: SequenceStatus) -> None:
        seq.status = status
        insort(queue, seq, key=_by_arrival)

    def _leave(self, seq: Sequence) -> None:
        """Take the sequence out of the list of its status."""
        queues = {
            SequenceStatus.WAITING: self._waiting,
            SequenceStatus.RUNNING: self._running,
            SequenceStatus.PAUSED: self._paused,
        }
        queue = queues[seq.status]
        index = bisect_left(queue, seq.seq_id, key=_by_arrival)
        assert queue[index] is seq, f"{seq} was never added"
        del queue[index]


def _needs_host(seq: Sequence) -> bool:
    """Whether its next draw depends, or reports, on what the host does after each: penalties, min_tokens, logprobs."""
    params = seq.params
    return params.needs_penalties or params.logprobs is not None or params.min_tokens > seq.num_output_tokens
