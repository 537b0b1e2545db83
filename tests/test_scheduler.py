"""Scheduler: the policy of a step, case by case. test_scheduler_properties.py holds it under random traffic."""

from __future__ import annotations

from collections import abc
from typing import Any

import pytest

from inferneo_core.block_manager import BlockManager
from inferneo_core.outputs import FinishReason
from inferneo_core.sampling_params import SamplingParams
from inferneo_core.scheduler import ScheduledBatch, Scheduler
from inferneo_core.sequence import Sequence, SequenceStatus

TOKEN = 1000  # what the model of these tests always draws
STOP = 1001


def make_scheduler(
    num_blocks: int = 100, block_size: int = 4, max_num_seqs: int = 8, max_num_batched_tokens: int = 64
) -> Scheduler:
    manager = BlockManager(num_blocks, block_size)
    return Scheduler(manager, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)


def add(scheduler: Scheduler, seq_id: int, num_tokens: int, max_tokens: int = 20, **params: Any) -> Sequence:
    """Queue a sequence whose prompt is like no other's."""
    return add_prompt(scheduler, seq_id, [100 * seq_id + n for n in range(num_tokens)], max_tokens, **params)


def add_prompt(
    scheduler: Scheduler, seq_id: int, prompt: abc.Sequence[int], max_tokens: int = 20, **params: Any
) -> Sequence:
    stop_ids = frozenset({STOP})
    seq = Sequence(seq_id, prompt, SamplingParams(**params), max_tokens=max_tokens, seed=0, stop_ids=stop_ids)
    scheduler.add(seq)
    return seq


def step(scheduler: Scheduler, token_id: int = TOKEN) -> list[tuple[int, int, int, bool]]:
    """Run one step; returns (seq_id, start, num_tokens, samples) of each share."""
    batch = scheduler.schedule()
    scheduler.update(batch, [token_id] * sum(share.samples for share in batch.sequences))
    return shares(batch)


def shares(batch: ScheduledBatch) -> list[tuple[int, int, int, bool]]:
    return [(seq.seq_id, start, num_tokens, samples) for seq, start, num_tokens, samples in batch.sequences]


def test_schedule_of_nothing_is_false() -> None:
    batch = make_scheduler().schedule()
    assert not batch
    assert (batch.sequences, batch.num_tokens) == ((), 0)


def test_step_prefills_then_decodes_to_the_end() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 0, 5, max_tokens=3)
    assert step(scheduler) == [(0, 0, 5, True)]
    assert step(scheduler) == [(0, 5, 1, True)]
    assert step(scheduler) == [(0, 6, 1, True)]
    assert (seq.finish_reason, seq.output_token_ids) == ("length", [TOKEN] * 3)
    assert not scheduler.schedule()
    assert scheduler.block_manager.free_blocks + scheduler.block_manager.cached_blocks == 100


def test_step_ends_a_sequence_at_a_stop_token() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 0, 5)
    step(scheduler)
    step(scheduler, STOP)
    assert (seq.is_finished, seq.finish_reason, seq.output_token_ids) == (True, "stop", [TOKEN, STOP])
    assert (scheduler.num_running, seq.block_table) == (0, [])


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 64])
def test_prefill_in_chunks_draws_after_the_last_one_only(chunk: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=chunk)
    seq = add(scheduler, 0, 13)
    seen = []
    while seq.num_output_tokens == 0:
        seen += step(scheduler)
    assert seen == [(0, s, min(chunk, 13 - s), s + chunk >= 13) for s in range(0, 13, chunk)]


def test_schedule_puts_decodes_first_and_fills_the_budget_with_prompts() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add(scheduler, 0, 3)
    step(scheduler)
    add(scheduler, 1, 12)
    add(scheduler, 2, 30)
    batch = scheduler.schedule()
    assert (shares(batch), batch.num_tokens) == ([(0, 3, 1, True), (1, 0, 9, False)], 10)
    scheduler.update(batch, [TOKEN])
    assert step(scheduler) == [(0, 4, 1, True), (1, 9, 3, True), (2, 0, 6, False)]
    assert step(scheduler) == [(0, 5, 1, True), (1, 12, 1, True), (2, 6, 8, False)]


def test_running_streams_get_a_token_each_step_while_long_prompts_keep_arriving() -> None:
    scheduler = make_scheduler(num_blocks=400, max_num_seqs=16, max_num_batched_tokens=24)
    streams = [add(scheduler, seq_id, 3, max_tokens=200) for seq_id in range(8)]
    step(scheduler)
    finished = 0
    prompts = []
    for n in range(150):
        prompts.append(add(scheduler, 8 + n, 90, max_tokens=2))
        before = [seq.num_output_tokens for seq in streams]
        step(scheduler)
        assert [seq.num_output_tokens for seq in streams] == [count + 1 for count in before]
        finished = sum(prompt.is_finished for prompt in prompts)
    assert finished > 20  # and the prompts get what the streams leave


def test_admission_is_first_come_first_served() -> None:
    scheduler = make_scheduler(num_blocks=12)
    add(scheduler, 0, 24)
    step(scheduler)
    add(scheduler, 1, 24)
    add(scheduler, 2, 1, max_tokens=1)  # would fit, and does not jump the queue
    assert step(scheduler) == [(0, 24, 1, True)]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)


def test_admission_stops_at_max_num_seqs() -> None:
    scheduler = make_scheduler(max_num_seqs=3)
    for seq_id in range(5):
        add(scheduler, seq_id, 2)
    assert [share[0] for share in step(scheduler)] == [0, 1, 2]
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 2)


def test_admission_stops_where_one_step_could_not_serve_all() -> None:
    scheduler = make_scheduler(max_num_seqs=8, max_num_batched_tokens=3)
    streams = [add(scheduler, seq_id, 1, max_tokens=4) for seq_id in range(5)]
    for _ in range(3):
        assert [share[0] for share in step(scheduler)] == [0, 1, 2]
    while not streams[-1].is_finished:
        assert len(step(scheduler)) <= 3


def test_admission_leaves_each_running_sequence_a_block_to_grow_into() -> None:
    scheduler = make_scheduler(num_blocks=6)
    running = add(scheduler, 0, 11, max_tokens=5)  # 3 blocks, later 4
    step(scheduler)
    waiting = add(scheduler, 1, 8, max_tokens=5)  # 2 blocks, 3 with its next token: all that are left
    while not running.is_finished:
        assert [share[0] for share in step(scheduler)] == [0]
    assert waiting.status is SequenceStatus.WAITING
    assert step(scheduler) == [(1, 0, 8, True)]
    assert scheduler.num_preemptions == 0


def test_admission_of_a_lone_sequence_may_fill_the_cache() -> None:
    scheduler = make_scheduler(num_blocks=3)
    seq = add(scheduler, 0, 11, max_tokens=1)
    step(scheduler)
    assert seq.is_finished


def test_add_refuses_what_could_never_fit() -> None:
    with pytest.raises(AssertionError):
        add(make_scheduler(num_blocks=3), 0, 11, max_tokens=2)


def test_preemption_takes_the_youngest_and_recomputes_its_output() -> None:
    scheduler = make_scheduler(num_blocks=8)
    old, young = add(scheduler, 0, 8, max_tokens=23), add(scheduler, 1, 7, max_tokens=16)
    late = add(scheduler, 2, 4, max_tokens=1)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert (old.status, young.status) == (SequenceStatus.RUNNING, SequenceStatus.WAITING)
    assert (young.block_table, young.num_computed_tokens) == ([], 0)
    num_drawn = young.num_output_tokens
    assert 0 < num_drawn < 16
    seen = []
    while not (young.is_finished and late.is_finished):
        seen += [share for share in step(scheduler) if share[0] != 0]
    seq_id, start, num_tokens, samples = seen[0]
    assert seq_id == 1  # back at the front of the queue, before the later arrival
    assert (start + num_tokens, num_tokens > 1, samples) == (7 + num_drawn, True, True)  # its output is recomputed
    assert young.output_token_ids == [TOKEN] * 16
    assert scheduler.num_preemptions == 1


def test_preempted_sequence_finds_its_cached_blocks_again() -> None:
    scheduler = make_scheduler(num_blocks=6)
    old, young = add(scheduler, 0, 3, max_tokens=8), add(scheduler, 1, 9, max_tokens=8)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert (young.num_tokens, young.num_computed_tokens) == (15, 0)
    while not old.is_finished:
        assert [share[0] for share in step(scheduler)] == [0]
    assert step(scheduler) == [(1, 12, 3, True)]  # of 4 blocks, only the partly filled one went to the old sequence
    assert young.num_cached_tokens == 0
    assert (scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens) == (12, 0)


def test_preemption_takes_paused_sequences_before_running_ones_and_the_youngest_first() -> None:
    scheduler = make_scheduler(num_blocks=8)
    older, younger, *running = (add(scheduler, seq_id, n) for seq_id, n in enumerate((3, 3, 3, 5)))
    step(scheduler)
    scheduler.pause(older)
    scheduler.pause(younger)
    seen = []
    while scheduler.num_preemptions < 2:
        assert [share[0] for share in step(scheduler)] == [2, 3]
        seen.append((bool(older.block_table), bool(younger.block_table)))
    assert list(dict.fromkeys(seen)) == [(True, True), (True, False), (False, False)]
    assert {seq.status for seq in running} == {SequenceStatus.RUNNING}


def test_waiting_sequence_takes_the_blocks_of_a_paused_one() -> None:
    scheduler = make_scheduler(num_blocks=6)
    paused = add(scheduler, 0, 15, max_tokens=5)
    step(scheduler)
    scheduler.pause(paused)
    waiting = add(scheduler, 1, 15, max_tokens=2)
    assert step(scheduler) == [(1, 0, 15, True)]
    assert (waiting.status, paused.status) == (SequenceStatus.RUNNING, SequenceStatus.PAUSED)
    assert paused.block_table == []


def test_resume_goes_on_where_the_sequence_stood() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 0, 5)
    step(scheduler)
    scheduler.pause(seq)
    assert not scheduler.schedule()
    assert (len(seq.block_table), scheduler.num_paused) == (2, 1)
    scheduler.resume(seq)
    assert step(scheduler) == [(0, 5, 1, True)]


def test_resume_recomputes_what_was_taken() -> None:
    scheduler = make_scheduler(num_blocks=6)
    paused = add(scheduler, 0, 15, max_tokens=5)
    step(scheduler)
    scheduler.pause(paused)
    other = add(scheduler, 1, 15, max_tokens=2)
    step(scheduler)
    scheduler.resume(paused)
    assert paused.status is SequenceStatus.WAITING
    while not other.is_finished:
        step(scheduler)
    [(seq_id, _, num_tokens, samples)] = step(scheduler)
    assert (seq_id, num_tokens > 1, samples) == (0, True, True)
    assert paused.output_token_ids == [TOKEN] * 2


@pytest.mark.parametrize("limits", [{"max_num_seqs": 1}, {"max_num_batched_tokens": 1}])
def test_resume_waits_for_a_place(limits: dict[str, int]) -> None:
    scheduler = make_scheduler(**limits)
    paused = add(scheduler, 0, 5)
    while paused.num_output_tokens == 0:
        step(scheduler)
    scheduler.pause(paused)
    other = add(scheduler, 1, 1, max_tokens=2)
    step(scheduler)
    scheduler.resume(paused)
    assert (paused.status, paused.block_table) == (SequenceStatus.WAITING, [])
    assert step(scheduler) == [(1, 1, 1, True)]
    assert other.is_finished
    [(seq_id, start, _, _)] = step(scheduler)
    assert (seq_id, start) == (0, 4)  # its first block is still cached


def test_pause_and_resume_leave_other_states_alone() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 0, 5)
    scheduler.resume(seq)
    assert seq.status is SequenceStatus.WAITING
    scheduler.pause(seq)
    scheduler.pause(seq)
    assert (seq.status, scheduler.num_waiting, scheduler.num_paused) == (SequenceStatus.PAUSED, 0, 1)
    scheduler.finish(seq, "abort")
    scheduler.pause(seq)
    scheduler.resume(seq)
    assert (seq.status, scheduler.num_paused) == (SequenceStatus.FINISHED, 0)


@pytest.mark.parametrize("state", ["waiting", "mid-prefill", "decoding", "preempted", "paused", "finished"])
def test_finish_releases_everything_in_any_state(state: str) -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=4)
    other = add(scheduler, 0, 3, max_tokens=20)
    step(scheduler)
    seq = add(scheduler, 1, 7, max_tokens=20)
    expected: FinishReason = "abort"
    if state == "mid-prefill":
        step(scheduler)
        assert 0 < seq.num_computed_tokens < 7
    elif state in ("decoding", "paused", "finished"):
        while seq.num_output_tokens < 2:
            step(scheduler)
        if state == "paused":
            scheduler.pause(seq)
        elif state == "finished":
            scheduler.finish(seq, "stop")
            expected = "stop"
    elif state == "preempted":
        while not scheduler.num_preemptions:
            step(scheduler)
        assert seq.status is SequenceStatus.WAITING
    scheduler.finish(seq, "abort")
    scheduler.finish(seq, "length")
    assert (seq.status, seq.finish_reason, seq.block_table) == (SequenceStatus.FINISHED, expected, [])
    while not other.is_finished:
        assert [share[0] for share in step(scheduler)] == [0]
    assert scheduler.block_manager.free_blocks + scheduler.block_manager.cached_blocks == 8


def test_schedule_repeats_a_step_that_fell_through() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=12)
    running = add(scheduler, 0, 4)
    step(scheduler)
    add(scheduler, 1, 5)
    add(scheduler, 2, 30)
    first = scheduler.schedule()
    tables = [list(share.sequence.block_table) for share in first.sequences]
    again = scheduler.schedule()
    assert shares(again) == shares(first) == [(0, 4, 1, True), (1, 0, 5, True), (2, 0, 6, False)]
    assert [list(share.sequence.block_table) for share in again.sequences] == tables
    assert (running.num_computed_tokens, running.num_output_tokens) == (4, 1)


def test_update_drops_the_share_of_a_sequence_finished_meanwhile() -> None:
    scheduler = make_scheduler()
    first, second = add(scheduler, 0, 5), add(scheduler, 1, 5)
    batch = scheduler.schedule()
    scheduler.finish(first, "abort")
    scheduler.update(batch, [7, 8])
    assert (first.output_token_ids, first.finish_reason) == ([], "abort")
    assert second.output_token_ids == [8]


def test_update_counts_the_share_of_a_sequence_paused_meanwhile() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 0, 5, max_tokens=1)
    batch = scheduler.schedule()
    scheduler.pause(seq)
    scheduler.update(batch, [7])
    assert (seq.output_token_ids, seq.finish_reason, scheduler.num_paused) == ([7], "length", 0)


@pytest.mark.parametrize("token_ids", [[], [7], [7, 8, 9]])
def test_update_refuses_another_number_of_tokens_and_changes_nothing(token_ids: list[int]) -> None:
    scheduler = make_scheduler()
    seqs = [add(scheduler, seq_id, 5) for seq_id in range(2)]
    batch = scheduler.schedule()
    with pytest.raises(AssertionError):
        scheduler.update(batch, token_ids)
    assert [seq.num_computed_tokens for seq in seqs] == [0, 0]


def test_update_takes_a_batch_once() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 0, 5)
    batch = scheduler.schedule()
    scheduler.update(batch, [7])
    with pytest.raises(AssertionError):
        scheduler.update(batch, [7])
    assert seq.output_token_ids == [7]


def test_batch_still_says_who_sampled_after_update() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, 5)
    batch = scheduler.schedule()
    scheduler.update(batch, [7])
    assert [share.samples for share in batch.sequences] == [True]


def test_prefix_counters_count_each_prompt_once() -> None:
    scheduler = make_scheduler()
    prompt = list(range(10))
    first = add_prompt(scheduler, 0, prompt)
    step(scheduler)
    second = add_prompt(scheduler, 1, [*prompt, 5])
    assert step(scheduler) == [(0, 10, 1, True), (1, 8, 3, True)]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    assert (scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens) == (21, 8)


def test_prefix_counters_leave_out_prompts_that_are_not_looked_up() -> None:
    scheduler = make_scheduler()
    prompt = list(range(10))
    add_prompt(scheduler, 0, prompt)
    step(scheduler)
    seq = add_prompt(scheduler, 1, prompt, prompt_logprobs=0)
    assert step(scheduler)[1] == (1, 0, 10, True)
    assert seq.num_cached_tokens == 0
    assert (scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens) == (10, 0)
