"""Steps that are launched before the tokens of those before them are known: schedule_ahead, and extend's bursts."""

from __future__ import annotations

import random

import pytest

from inferneo_core.block_manager import BlockManager
from inferneo_core.sampling_params import SamplingParams
from inferneo_core.scheduler import ScheduledBatch, Scheduler
from inferneo_core.sequence import Sequence

TOKEN, STOP = 1000, 1001
BLOCK_SIZE = 4


def make_scheduler(num_blocks: int = 100, max_num_seqs: int = 8, max_num_batched_tokens: int = 64) -> Scheduler:
    manager = BlockManager(num_blocks, BLOCK_SIZE)
    return Scheduler(manager, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)


def add(scheduler: Scheduler, seq_id: int, num_tokens: int, max_tokens: int = 40) -> Sequence:
    prompt = [100 * seq_id + n for n in range(num_tokens)]
    seq = Sequence(seq_id, prompt, SamplingParams(), max_tokens=max_tokens, seed=0, stop_ids=frozenset({STOP}))
    scheduler.add(seq)
    return seq


def update(scheduler: Scheduler, batch: ScheduledBatch, token_id: int = TOKEN) -> None:
    scheduler.update(batch, [token_id] * sum(share.samples for share in batch.sequences))


def decoding(scheduler: Scheduler) -> ScheduledBatch:
    """The first step in which every sequence decodes."""
    batch = scheduler.schedule()
    while any(share.num_tokens > 1 for share in batch.sequences):
        update(scheduler, batch)
        batch = scheduler.schedule()
    return batch


def test_ahead_is_the_same_sequences_one_token_further() -> None:
    scheduler = make_scheduler()
    first, second = add(scheduler, 0, 5), add(scheduler, 1, 2)
    batch = decoding(scheduler)
    ahead = scheduler.schedule_ahead(batch)
    assert ahead is not None
    assert [(share.sequence, share.start, share.num_tokens, share.samples) for share in ahead.sequences] == [
        (first, 6, 1, True),
        (second, 3, 1, True),
    ]
    assert ahead.num_tokens == 2


def test_ahead_steps_end_up_where_single_steps_do() -> None:
    """Over several blocks, each step launched before the one before it is counted."""
    scheduler, plain = make_scheduler(), make_scheduler()
    seq, expected = add(scheduler, 0, 5, max_tokens=20), add(plain, 0, 5, max_tokens=20)
    batch = decoding(scheduler)
    num_ahead = 0
    while not seq.is_finished:
        ahead = scheduler.schedule_ahead(batch)
        assert ahead is None or len(seq.block_table) * BLOCK_SIZE > ahead.sequences[0].start + 1
        update(scheduler, batch)
        num_ahead += ahead is not None
        batch = ahead or scheduler.schedule()
    while not expected.is_finished:
        update(plain, plain.schedule())
    assert seq.token_ids == expected.token_ids
    assert num_ahead >= 15
    assert scheduler.block_manager.free_blocks == plain.block_manager.free_blocks
    assert scheduler.block_manager.cached_blocks == plain.block_manager.cached_blocks


def test_no_step_goes_ahead_of_a_prefill() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    add(scheduler, 0, 9)
    batch = scheduler.schedule()
    assert scheduler.schedule_ahead(batch) is None


def test_no_step_goes_ahead_where_a_request_waits_that_could_run() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, 5)
    batch = decoding(scheduler)
    add(scheduler, 1, 5)
    assert scheduler.schedule_ahead(batch) is None


def test_step_goes_ahead_where_the_waiting_have_no_place() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, 0, 5)
    batch = decoding(scheduler)
    add(scheduler, 1, 5)
    assert scheduler.schedule_ahead(batch) is not None


def test_no_step_goes_ahead_of_a_last_token() -> None:
    scheduler = make_scheduler()
    seq = add(scheduler, 0, 5, max_tokens=3)
    batch = decoding(scheduler)  # draws the second
    ahead = scheduler.schedule_ahead(batch)
    assert ahead is not None  # draws the third
    update(scheduler, batch)
    assert scheduler.schedule_ahead(ahead) is None
    update(scheduler, ahead)
    assert seq.finish_reason == "length"


def test_no_step_goes_ahead_of_a_paused_or_another_sequence() -> None:
    scheduler = make_scheduler()
    first, _ = add(scheduler, 0, 5), add(scheduler, 1, 5)
    batch = decoding(scheduler)
    scheduler.pause(first)
    assert scheduler.schedule_ahead(batch) is None
    scheduler.resume(first)
    assert scheduler.schedule_ahead(batch) is not None


def test_no_step_goes_ahead_without_blocks_for_it() -> None:
    scheduler = make_scheduler(num_blocks=5)
    seq, other = add(scheduler, 0, 4, max_tokens=12), add(make_scheduler(), 1, 1)
    batch = decoding(scheduler)
    while scheduler.block_manager.free_blocks:
        assert scheduler.block_manager.allocate(other, (len(other.block_table) + 1) * BLOCK_SIZE)
    starts = []
    while (ahead := scheduler.schedule_ahead(batch)) is not None:
        update(scheduler, batch)
        batch = ahead
        starts.append(batch.sequences[0].start)
    assert starts == [5, 6]  # the slot of token 8 would have to be known as token 7 is computed, and has no block
    assert len(seq.block_table) == 2


# Bursts


def update_burst(scheduler: Scheduler, batch: ScheduledBatch, token_id: int = TOKEN) -> None:
    for index in range(batch.num_steps):
        update(scheduler, batch.ahead(index), token_id)


def test_burst_ends_up_where_single_steps_do() -> None:
    scheduler, plain = make_scheduler(), make_scheduler()
    seqs = [add(scheduler, 0, 5, max_tokens=20), add(scheduler, 1, 3, max_tokens=9)]
    expected = [add(plain, 0, 5, max_tokens=20), add(plain, 1, 3, max_tokens=9)]
    lengths = []
    while batch := scheduler.schedule():
        batch = scheduler.extend(batch, 4)
        lengths.append(batch.num_steps)
        assert batch.sequences[0].start + batch.num_steps <= len(batch.sequences[0].sequence.block_table) * BLOCK_SIZE
        update_burst(scheduler, batch)
    while batch := plain.schedule():
        update(plain, batch)
    assert [seq.token_ids for seq in seqs] == [seq.token_ids for seq in expected]
    assert lengths == [1, 4, 4, 4, 4, 3]  # the prompts; the second sequence's 8 others; the first one's 11
    assert scheduler.block_manager.free_blocks == plain.block_manager.free_blocks
    assert scheduler.block_manager.cached_blocks == plain.block_manager.cached_blocks


def test_burst_never_passes_what_a_sequence_may_still_draw() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, 5, max_tokens=30), add(scheduler, 1, 5, max_tokens=4)
    batch = scheduler.extend(decoding(scheduler), 10)
    assert batch.num_steps == 3  # one of the four came with the prompt
    update_burst(scheduler, batch)
    assert scheduler.extend(scheduler.schedule(), 10).num_steps == 10


def test_no_burst_where_a_prompt_is_computed_or_a_request_could_run() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4, max_num_seqs=2)
    add(scheduler, 0, 9)
    batch = scheduler.schedule()
    assert scheduler.extend(batch, 4) is batch
    batch = decoding(scheduler)
    add(scheduler, 1, 2)
    assert scheduler.extend(batch, 4) is batch
    update(scheduler, batch)
    batch = scheduler.schedule()  # a decode and a prompt
    assert scheduler.extend(batch, 4) is batch
    update(scheduler, batch)
    add(scheduler, 2, 2)  # has no place
    assert scheduler.extend(scheduler.schedule(), 4).num_steps == 4


def test_first_token_does_not_wait_for_others() -> None:
    """A prompt of one token looks like a decode."""
    scheduler = make_scheduler()
    add(scheduler, 0, 1)
    batch = scheduler.schedule()
    assert scheduler.extend(batch, 4) is batch
    update(scheduler, batch)
    assert scheduler.extend(scheduler.schedule(), 4).num_steps == 4


@pytest.mark.parametrize(
    ("params", "num_steps"),
    [
        ({"repetition_penalty": 1.1}, 1),
        ({"presence_penalty": 0.5}, 1),
        ({"frequency_penalty": 0.5}, 1),
        ({"logprobs": 0}, 1),
        ({"min_tokens": 3}, 1),
        ({"min_tokens": 1}, 4),  # it has one
        ({"logit_bias": {3: 1.0}}, 4),
        ({"top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9}, 4),
    ],
    ids=str,
)
def test_no_burst_where_a_draw_needs_the_host(params: dict[str, object], num_steps: int) -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, 5)
    seq = Sequence(1, [7, 8], SamplingParams(**params), max_tokens=20, seed=0)  # type: ignore[arg-type]
    scheduler.add(seq)
    assert scheduler.extend(decoding(scheduler), 4).num_steps == num_steps


def test_burst_ends_with_the_blocks_and_preempts_nobody() -> None:
    scheduler = make_scheduler(num_blocks=5)
    older, younger = add(scheduler, 0, 6, max_tokens=10), add(scheduler, 1, 6, max_tokens=10)
    batch = scheduler.extend(decoding(scheduler), 9)
    assert batch.num_steps == 2  # 8 tokens in two blocks each; for 9 steps there are not enough
    assert (len(older.block_table), len(younger.block_table)) == (2, 2)
    assert scheduler.num_preemptions == 0
    update_burst(scheduler, batch)
    scheduler.schedule()
    assert scheduler.num_preemptions == 1 and not younger.block_table


def test_tokens_of_a_burst_past_a_stop_are_dropped() -> None:
    scheduler = make_scheduler()
    first, second = add(scheduler, 0, 6), add(scheduler, 1, 5)
    batch = scheduler.extend(decoding(scheduler), 4)
    for index, drawn in enumerate([[TOKEN, TOKEN], [STOP, TOKEN], [5, TOKEN], [6, TOKEN]]):
        scheduler.update(batch.ahead(index), drawn)
    assert first.finish_reason == "stop" and first.output_token_ids == [TOKEN, TOKEN, STOP]
    assert first.block_table == [] and len(first.block_hashes) == 2  # 8 computed and accepted, of 10 computed
    assert second.output_token_ids == [TOKEN] * 5


@pytest.mark.parametrize("how", ["stop", "abort", "pause"])
def test_share_of_a_sequence_that_ended_is_dropped(how: str) -> None:
    scheduler = make_scheduler()
    first, second = add(scheduler, 0, 5), add(scheduler, 1, 5)
    batch = decoding(scheduler)
    ahead = scheduler.schedule_ahead(batch)
    assert ahead is not None
    scheduler.update(batch, [STOP if how == "stop" else TOKEN, TOKEN])
    if how == "abort":
        scheduler.finish(first, "abort")
    if how == "pause":
        scheduler.pause(first)  # it keeps its blocks, so the token in flight counts
    length = first.num_tokens
    update(scheduler, ahead)
    assert first.num_tokens == length + (how == "pause")
    assert second.num_tokens == 8
    assert scheduler.schedule().sequences[0].sequence is second


@pytest.mark.parametrize("seed", range(4))
def test_blocks_come_back_from_random_bursts(seed: int) -> None:
    source = random.Random(seed)
    scheduler = make_scheduler(num_blocks=24, max_num_seqs=4, max_num_batched_tokens=8)
    alive: list[Sequence] = []
    lengths = set()
    for number in range(600):
        if len(alive) < 6 and source.random() < 0.2 and number < 500:
            alive.append(add(scheduler, number, source.randint(1, 12), max_tokens=source.randint(1, 25)))
        if alive and source.random() < 0.02:
            scheduler.finish(source.choice(alive), "abort")
        if batch := scheduler.schedule():
            batch = scheduler.extend(batch, source.randint(1, 6))
            lengths.add(batch.num_steps)
            for index in range(batch.num_steps):
                step = batch.ahead(index)
                scheduler.update(
                    step, [source.choice([TOKEN] * 30 + [STOP]) for share in step.sequences if share.samples]
                )
        alive = [seq for seq in alive if not seq.is_finished]
    assert not alive
    assert lengths == {1, 2, 3, 4, 5, 6}
    manager = scheduler.block_manager
    assert manager.free_blocks + manager.cached_blocks == manager.total_blocks


def test_blocks_come_back_from_random_traffic() -> None:
    """Whatever stops, is aborted or runs out of blocks while a step is in flight."""
    source = random.Random(0)
    scheduler = make_scheduler(num_blocks=24, max_num_seqs=4, max_num_batched_tokens=8)
    alive: list[Sequence] = []
    in_flight: ScheduledBatch | None = None
    num_ahead = 0
    for step in range(600):
        if len(alive) < 6 and source.random() < 0.2 and step < 500:
            alive.append(add(scheduler, step, source.randint(1, 12), max_tokens=source.randint(1, 25)))
        if alive and source.random() < 0.02:
            scheduler.finish(source.choice(alive), "abort")
        batch = in_flight or scheduler.schedule()
        in_flight = None
        if batch:
            in_flight = scheduler.schedule_ahead(batch)
            num_ahead += in_flight is not None
            scheduler.update(
                batch, [source.choice([TOKEN] * 30 + [STOP]) for share in batch.sequences if share.samples]
            )
        alive = [seq for seq in alive if not seq.is_finished]
    assert not alive
    assert num_ahead > 50
    manager = scheduler.block_manager
    assert manager.free_blocks + manager.cached_blocks == manager.total_blocks
