"""BlockManager: references, the prefix cache, and what is forgotten first."""

from __future__ import annotations

import itertools
from collections import abc

import pytest

from inferneo_core.block_manager import BlockManager
from inferneo_core.sampling_params import SamplingParams
from inferneo_core.sequence import Sequence

_ids = itertools.count()


def make_sequence(tokens: abc.Sequence[int], prompt_logprobs: int | None = None) -> Sequence:
    return Sequence(next(_ids), tokens, SamplingParams(prompt_logprobs=prompt_logprobs), max_tokens=100, seed=0)


def computed(manager: BlockManager, tokens: abc.Sequence[int]) -> Sequence:
    """A sequence that holds blocks, all its tokens computed and accepted."""
    seq = make_sequence(tokens)
    assert manager.allocate(seq, len(tokens))
    manager.commit(seq, len(tokens))
    return seq


def counts(manager: BlockManager) -> tuple[int, int]:
    return manager.free_blocks, manager.cached_blocks


@pytest.mark.parametrize(
    ("num_tokens", "block_size", "expected"),
    [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (7, 1, 7), (33, 16, 3)],
)
def test_blocks_for_rounds_up(num_tokens: int, block_size: int, expected: int) -> None:
    assert BlockManager(8, block_size).blocks_for(num_tokens) == expected


def test_allocate_grows_only_when_the_last_block_is_full() -> None:
    manager, seq = BlockManager(5, 3), make_sequence([1, 2, 3, 4])
    sizes = []
    for num_tokens in range(1, 8):
        assert manager.allocate(seq, num_tokens)
        sizes.append(len(seq.block_table))
    assert sizes == [1, 1, 1, 2, 2, 2, 3]
    assert len(set(seq.block_table)) == 3
    assert counts(manager) == (2, 0)


def test_allocate_changes_nothing_when_it_fails() -> None:
    manager = BlockManager(4, 2)
    manager.free(computed(manager, [1, 2, 3, 4]))
    before = counts(manager)
    seq = make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert not manager.allocate(seq, 9)
    assert (seq.block_table, seq.num_computed_tokens) == ([], 0)
    assert counts(manager) == before == (2, 2)
    assert len(manager.match_prefix(seq)) == 2


def test_allocate_leaves_the_headroom() -> None:
    manager, seq = BlockManager(5, 2), make_sequence([1, 2, 3])
    assert not manager.allocate(seq, 3, headroom=4)
    assert manager.allocate(seq, 3, headroom=3)


def test_allocate_counts_revived_blocks_against_the_headroom() -> None:
    manager = BlockManager(3, 2)
    manager.free(computed(manager, [1, 2, 3, 4]))
    seq = make_sequence([1, 2, 3, 4, 5])  # two revived, one new: nothing is left
    assert not manager.allocate(seq, 5, headroom=1)
    assert manager.allocate(seq, 5)


def test_slot_follows_the_block_table() -> None:
    manager, seq = BlockManager(9, 4), make_sequence(range(11))
    assert manager.allocate(seq, 11)
    slots = [manager.slot(seq, position) for position in range(11)]
    assert slots == [block * 4 + offset for block in seq.block_table for offset in range(4)][:11]
    assert len(set(slots)) == 11


def test_match_prefix_shares_full_blocks_of_a_running_sequence() -> None:
    manager = BlockManager(10, 4)
    first = computed(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 5, 5])
    assert manager.allocate(second, 10)
    assert second.num_computed_tokens == 8
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] not in first.block_table
    assert counts(manager) == (6, 0)


def test_match_prefix_leaves_a_token_to_compute() -> None:
    manager = BlockManager(10, 4)
    manager.free(computed(manager, range(8)))
    assert len(manager.match_prefix(make_sequence(range(8)))) == 1
    assert len(manager.match_prefix(make_sequence(range(9)))) == 2


def test_match_prefix_needs_the_whole_prefix_equal() -> None:
    manager = BlockManager(10, 2)
    manager.free(computed(manager, [1, 2, 3, 4, 5, 6]))
    assert manager.match_prefix(make_sequence([9, 9, 3, 4, 5, 6, 7])) == []  # equal blocks behind another beginning
    assert manager.match_prefix(make_sequence([3, 4, 5, 6, 7])) == []  # equal blocks in another place
    assert len(manager.match_prefix(make_sequence([1, 2, 3, 9, 5, 6, 7]))) == 1


def test_match_prefix_sees_nothing_before_commit() -> None:
    manager = BlockManager(10, 2)
    writer, reader = make_sequence([1, 2, 3, 4]), make_sequence([1, 2, 3, 4])
    assert manager.allocate(writer, 4)
    assert manager.match_prefix(reader) == []
    manager.commit(writer, 3)
    assert manager.match_prefix(reader) == writer.block_table[:1]


def test_match_prefix_finds_generated_tokens() -> None:
    manager, seq = BlockManager(10, 2), make_sequence([1, 2, 3])
    assert manager.allocate(seq, 5)
    manager.commit(seq, 3)
    seq.append(4)
    manager.commit(seq, 4)
    assert manager.match_prefix(make_sequence([1, 2, 3, 4, 5])) == seq.block_table[:2]


def test_match_prefix_skips_a_request_for_prompt_logprobs() -> None:
    manager = BlockManager(10, 2)
    manager.free(computed(manager, [1, 2, 3, 4]))
    seq = make_sequence([1, 2, 3, 4, 5], prompt_logprobs=0)
    assert manager.match_prefix(seq) == []
    assert manager.allocate(seq, 5)
    assert seq.num_computed_tokens == 0


def test_match_prefix_is_off_without_prefix_caching() -> None:
    manager = BlockManager(10, 2, enable_prefix_caching=False)
    manager.free(computed(manager, [1, 2, 3, 4]))
    assert manager.match_prefix(make_sequence([1, 2, 3, 4, 5])) == []
    assert counts(manager) == (10, 0)


def test_free_keeps_full_blocks_and_forgets_the_partial_one() -> None:
    manager = BlockManager(10, 4)
    seq = computed(manager, range(10))
    assert counts(manager) == (7, 0)
    manager.free(seq)
    assert counts(manager) == (8, 2)
    assert (seq.block_table, seq.num_computed_tokens) == ([], 0)
    manager.free(seq)
    assert counts(manager) == (8, 2)


def test_free_releases_a_shared_block_with_its_last_reference() -> None:
    manager = BlockManager(10, 2)
    first = computed(manager, [1, 2, 3])
    second = make_sequence([1, 2, 4])
    assert manager.allocate(second, 3)
    manager.free(first)
    assert counts(manager) == (8, 0)
    manager.free(second)
    assert counts(manager) == (9, 1)


def test_free_remembers_one_of_two_equal_blocks() -> None:
    manager = BlockManager(10, 2)
    first, second = make_sequence([1, 2, 3]), make_sequence([1, 2, 3])
    for seq in (first, second):
        assert manager.allocate(seq, 3)
    for seq in (first, second):
        manager.commit(seq, 3)
    kept = first.block_table[:1]
    manager.free(second)
    manager.free(first)
    assert counts(manager) == (9, 1)
    assert manager.match_prefix(make_sequence([1, 2, 3])) == kept


def test_eviction_takes_free_blocks_before_cached_ones() -> None:
    manager = BlockManager(4, 2)
    manager.free(computed(manager, [1, 2, 3, 4]))
    assert manager.allocate(make_sequence([9, 9, 9, 9]), 4)
    assert counts(manager) == (0, 2)


def test_eviction_forgets_a_tail_before_its_head() -> None:
    manager = BlockManager(4, 2)
    manager.free(computed(manager, [1, 2, 3, 4, 5, 6, 7, 8]))
    probe = make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9])
    lengths = []
    for num_tokens in (2, 4, 6, 8):
        taker = make_sequence([9] * num_tokens)
        assert manager.allocate(taker, num_tokens)
        lengths.append(len(manager.match_prefix(probe)))
        manager.free(taker)
    assert lengths == [3, 2, 1, 0]


def test_eviction_forgets_the_prefix_released_longest_ago() -> None:
    manager = BlockManager(3, 2)
    old, recent = [1, 1], [2, 2]
    manager.free(computed(manager, old))
    manager.free(computed(manager, recent))
    revived = make_sequence([*old, 5])
    assert manager.allocate(revived, 2)
    manager.free(revived)  # now `recent` is the one released longest ago
    assert manager.allocate(make_sequence([9] * 4), 4)
    assert len(manager.match_prefix(make_sequence([*old, 5]))) == 1
    assert manager.match_prefix(make_sequence([*recent, 5])) == []


def test_eviction_spares_the_prefix_being_revived() -> None:
    manager = BlockManager(3, 2)
    manager.free(computed(manager, [1, 2]))  # released longest ago, hence next to go
    manager.free(computed(manager, [7, 7, 8, 8]))
    seq = make_sequence([1, 2, 3, 4, 5])
    assert manager.allocate(seq, 5)
    assert seq.num_computed_tokens == 2
    assert len(set(seq.block_table)) == 3


def test_evicted_block_is_found_again_once_recomputed() -> None:
    manager = BlockManager(2, 2)
    manager.free(computed(manager, [1, 2, 3, 4]))
    manager.free(computed(manager, [9, 9, 9, 9]))
    assert manager.match_prefix(make_sequence([1, 2, 3, 4, 5])) == []
    manager.free(computed(manager, [1, 2, 3, 4]))
    assert len(manager.match_prefix(make_sequence([1, 2, 3, 4, 5]))) == 2


def test_hash_tells_apart_ids_of_the_largest_vocabulary() -> None:
    manager = BlockManager(10, 1)
    manager.free(computed(manager, [2**31 - 1]))
    assert manager.match_prefix(make_sequence([2**31 - 2, 5])) == []
    assert len(manager.match_prefix(make_sequence([2**31 - 1, 5]))) == 1
