"""The scheduler and its blocks under random traffic: nothing leaks, starves, or reads what it did not write.

A `PagedMemory` stands in for the model. Where the real cache holds a key and a value, it holds what they depend on: all
tokens up to that position. So a read that finds anything else is a read of somebody else's, or of stale, memory.
"""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inferneo_core.block_manager import BlockManager
from inferneo_core.sampling_params import SamplingParams
from inferneo_core.scheduler import ScheduledBatch, ScheduledSequence, Scheduler
from inferneo_core.sequence import Sequence, SequenceStatus

STOP = 0
BOOK = random.Random(0).choices((1, 2), k=12)  # prompts are its first pages, and a few words of their own
prompts = st.builds(
    lambda n, own: BOOK[:n] + own, st.integers(0, 12), st.lists(st.integers(1, 2), min_size=1, max_size=3)
)


class PagedMemory:
    """What each slot of the cache holds: the tokens up to, and with, the one whose key and value stand there."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.slots: dict[int, tuple[int, ...]] = {}

    def write(self, shares: tuple[ScheduledSequence, ...], num_references: Counter[int]) -> None:
        """Store the tokens of one step. No two go to one slot, and none into a block that two sequences hold."""
        written: set[int] = set()
        for seq, start, num_tokens, _ in shares:
            for position in range(start, start + num_tokens):
                slot = self.manager.slot(seq, position)
                assert slot not in written
                assert num_references[slot // self.manager.block_size] == 1
                written.add(slot)
                self.slots[slot] = tuple(seq.token_ids[: position + 1])

    def check(self, seq: Sequence, num_tokens: int) -> None:
        """The first num_tokens tokens of the sequence are where its block table says."""
        for position in range(num_tokens):
            assert self.slots.get(self.manager.slot(seq, position)) == tuple(seq.token_ids[: position + 1])


class RecordingScheduler(Scheduler):
    """A Scheduler that notes whose blocks it takes."""

    victims: list[Sequence]

    def _preempt(self, seq: Sequence) -> None:
        self.victims.append(seq)
        super()._preempt(seq)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, go, pause and fail around a cache too small for them."""

    @initialize(
        num_blocks=st.integers(4, 16),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(1, 16),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(
        self, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, caching: bool
    ) -> None:
        self.manager = BlockManager(num_blocks, block_size, caching)
        self.scheduler = RecordingScheduler(
            self.manager, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self.scheduler.victims = []
        self.memory = PagedMemory(self.manager)
        self.sequences: list[Sequence] = []

    @property
    def alive(self) -> list[Sequence]:
        return [seq for seq in self.sequences if not seq.is_finished]

    # -- what may happen ----------------------------------------------------------------------------------------------

    @rule(
        prompts=st.lists(prompts, min_size=1, max_size=4),
        max_tokens=st.sampled_from([1, 12, 20, 30]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        stops=st.booleans(),
    )
    def add(self, prompts: list[list[int]], max_tokens: int, prompt_logprobs: int | None, stops: bool) -> None:
        room = self.manager.total_blocks * self.manager.block_size
        for prompt in prompts:
            seq = Sequence(
                len(self.sequences),
                prompt[: room - 1],
                SamplingParams(prompt_logprobs=prompt_logprobs),
                max_tokens=min(max_tokens, room - len(prompt[: room - 1])),
                seed=0,
                stop_ids=frozenset({STOP}) if stops else frozenset(),
            )
            self.sequences.append(seq)
            self.scheduler.add(seq)

    @rule(num_steps=st.integers(1, 12), seed=st.integers(0, 2**16))
    def step(self, num_steps: int, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(num_steps):
            batch = self.schedule()
            self.memory.write(batch.sequences, self.references())
            self.update(batch, rng)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), seed=st.integers(0, 2**16))
    def step_after_one_that_fell_through(self, data: st.DataObject, seed: int) -> None:
        first = self.schedule()
        done = first.sequences[: data.draw(st.integers(0, len(first.sequences)))]
        self.memory.write(done, self.references())
        tables = {share.sequence: list(share.sequence.block_table) for share in first.sequences}
        again = self.schedule()
        for seq, table in tables.items():
            assert seq.block_table == table
        self.memory.write(again.sequences, self.references())
        self.update(again, random.Random(seed))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), seed=st.integers(0, 2**16), event=st.sampled_from(["pause", "finish", "fail"]))
    def step_during_which(self, data: st.DataObject, seed: int, event: str) -> None:
        batch = self.schedule()
        self.memory.write(batch.sequences, self.references())
        if event == "fail":
            for share in batch.sequences:
                self.scheduler.finish(share.sequence, "abort")
            return
        seq = data.draw(st.sampled_from(self.alive))
        num_tokens = seq.num_tokens
        if event == "pause":
            self.scheduler.pause(seq)
        else:
            self.scheduler.finish(seq, "abort")
        self.update(batch, random.Random(seed))
        if event == "finish":
            assert (seq.num_tokens, seq.finish_reason) == (num_tokens, "abort")

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.sequences))
        reason = seq.finish_reason
        self.scheduler.finish(seq, "abort")
        assert seq.finish_reason == (reason or "abort")

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.sequences))
        table = list(seq.block_table)
        self.scheduler.pause(seq)
        assert seq.block_table == table

    @precondition(lambda self: self.scheduler.num_paused)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        paused = [seq for seq in self.alive if seq.status is SequenceStatus.PAUSED]
        self.scheduler.resume(data.draw(st.sampled_from(paused)))

    # -- what must hold -----------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch:
        """Schedule a step, and hold it to the policy."""
        before = [seq for seq in self.alive if seq.status is SequenceStatus.RUNNING]
        decoding = [seq for seq in before if seq.num_computed_tokens == seq.num_tokens - 1]
        tables = {seq: list(seq.block_table) for seq in before}
        enough_blocks = self.has_blocks_for_every_decode(decoding)
        self.scheduler.victims.clear()
        batch = self.scheduler.schedule()
        running = [seq for seq in self.alive if seq.status is SequenceStatus.RUNNING]
        scheduled = [share.sequence for share in batch.sequences]
        victims = [seq for seq in before if seq in self.scheduler.victims]

        assert batch.num_tokens == sum(share.num_tokens for share in batch.sequences)
        assert batch.num_tokens <= self.scheduler.max_num_batched_tokens
        assert bool(batch) == bool(running) == bool(self.scheduler.num_running + self.scheduler.num_waiting)
        assert len(set(scheduled)) == len(scheduled) <= self.scheduler.max_num_running
        for seq, start, num_tokens, samples in batch.sequences:
            assert seq.status is SequenceStatus.RUNNING
            assert start == seq.num_computed_tokens
            assert num_tokens >= 1
            assert samples == (start + num_tokens == seq.num_tokens)

        # Running sequences lose their blocks only for one another, the youngest first, the oldest never.
        assert victims == before[len(before) - len(victims) :]
        assert not (victims and enough_blocks)
        undisturbed = before[: len(before) - len(victims)]
        assert bool(undisturbed) == bool(before)
        for seq in undisturbed:
            assert seq.block_table[: len(tables[seq])] == tables[seq]
        # Who can draw a token does, and comes first. Who has run longest always gets on.
        decoding = [seq for seq in decoding if seq in undisturbed]
        assert scheduled[: len(decoding)] == decoding
        assert before[:1] == [seq for seq in before[:1] if seq in scheduled]
        # Nobody overtakes in the queue.
        admitted = [seq.seq_id for seq in running if seq not in undisturbed]
        waiting = [seq.seq_id for seq in self.alive if seq.status is SequenceStatus.WAITING]
        assert max(admitted, default=-1) < min(waiting, default=len(self.sequences))
        return batch

    def has_blocks_for_every_decode(self, decoding: list[Sequence]) -> bool:
        """Whether free, cached and paused blocks suffice for what the running sequences need now."""
        size = self.manager.block_size
        num_needed = sum(seq.num_computed_tokens == len(seq.block_table) * size for seq in decoding)
        held = {b for seq in self.alive if seq.status is SequenceStatus.RUNNING for b in seq.block_table}
        return num_needed <= self.manager.total_blocks - len(held)

    def update(self, batch: ScheduledBatch, rng: random.Random) -> None:
        """Let every share read what it attends to, then draw its token."""
        for seq, start, num_tokens, _ in batch.sequences:
            if seq.block_table:
                self.memory.check(seq, start + num_tokens)
        self.scheduler.update(batch, [rng.choice((STOP, *[1, 2] * 10)) for share in batch.sequences if share.samples])

    def references(self) -> Counter[int]:
        return Counter(block for seq in self.sequences for block in seq.block_table)

    @invariant()
    def every_block_is_referenced_or_cached_or_free(self) -> None:
        if not hasattr(self, "manager"):
            return
        manager, references = self.manager, self.references()
        everything = sorted([*references, *manager._free, *manager._cached])
        assert everything == list(range(manager.total_blocks))
        assert [references[block] for block in range(manager.total_blocks)] == manager._num_references
        assert manager._blocks == {h: block for block, h in enumerate(manager._hashes) if h is not None}
        assert all(manager._hashes[block] is None for block in manager._free)
        assert all(manager._hashes[block] is not None for block in manager._cached)

    @invariant()
    def every_sequence_finds_its_tokens_in_its_blocks(self) -> None:
        for seq in getattr(self, "sequences", ()):
            self.memory.check(seq, seq.num_computed_tokens)
            assert len(set(seq.block_table)) == len(seq.block_table)
            assert seq.num_computed_tokens < seq.num_tokens
            assert seq.num_output_tokens <= seq.max_tokens
            if seq.is_finished or seq.status is SequenceStatus.WAITING:
                assert seq.block_table == []

    @invariant()
    def every_cached_block_holds_what_its_hash_promises(self) -> None:
        if not hasattr(self, "manager"):
            return
        size = self.manager.block_size
        for block in self.manager._blocks.values():
            tokens = self.memory.slots[(block + 1) * size - 1]
            probe = Sequence(0, [*tokens, 1], SamplingParams(), max_tokens=1, seed=0)
            assert self.manager._hash_of(probe, len(tokens) // size - 1) == self.manager._hashes[block]
            assert all(self.memory.slots[block * size + i] == tokens[: len(tokens) - size + 1 + i] for i in range(size))

    @invariant()
    def every_sequence_stands_in_the_list_of_its_status(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        for status, queue in (
            (SequenceStatus.WAITING, scheduler._waiting),
            (SequenceStatus.RUNNING, scheduler._running),
            (SequenceStatus.PAUSED, scheduler._paused),
        ):
            assert queue == [seq for seq in self.sequences if seq.status is status]
        assert scheduler.num_running <= scheduler.max_num_running

    def teardown(self) -> None:
        """Once nobody new comes, every sequence ends, and every block comes back."""
        if not hasattr(self, "scheduler"):
            return
        for seq in self.alive:
            self.scheduler.resume(seq)
        # Each step brings the oldest running sequence on; an older one that is admitted later costs it its work once.
        num_tokens = sum(seq.num_prompt_tokens + seq.max_tokens for seq in self.alive)
        for _ in range(num_tokens * (1 + len(self.alive))):
            if not self.alive:
                break
            self.step(1, 0)
        assert not self.alive
        assert self.manager.free_blocks + self.manager.cached_blocks == self.manager.total_blocks


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
)
