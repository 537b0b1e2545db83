"""`advance` moves every running row on by one token, and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest
import torch
from inferneo_kernels import advance

from inferneo_core.batch import COUNT_ROW, NUM_INTS, POSITION, PROMPT_BIT

BLOCK_SIZE, MAX_BLOCKS, RING_SIZE, VOCAB_SIZE = 4, 5, 3, 11
# Rows: mid-block; into the next block; padding; without a token; past its last block; alone in its block.
SEQ_LENS = [2, 4, 0, 7, BLOCK_SIZE * MAX_BLOCKS, 1]
SAMPLED = [9, 3, 5, -1, 1, 10]


def make_state(device: torch.device, module: ModuleType, counts: bool = True) -> Any:
    num_seqs = len(SEQ_LENS)
    seq_lens = torch.tensor(SEQ_LENS, dtype=torch.int32)
    ints = torch.arange(num_seqs * NUM_INTS).view(num_seqs, NUM_INTS) * 100
    ints[:, POSITION] = seq_lens
    ints[:, COUNT_ROW] = torch.tensor([2, -1, 1, 0, -1, 3])
    guarded = torch.zeros(5, VOCAB_SIZE, dtype=torch.int32, device=device)  # a row before the first: a guard
    token_counts = guarded[1:]
    token_counts[2, 9], token_counts[3, 10] = PROMPT_BIT, 6
    tables = torch.arange(num_seqs * MAX_BLOCKS, dtype=torch.int32).view(num_seqs, MAX_BLOCKS).flip(0)
    state = module.DecodeState(
        token_ids=torch.full((num_seqs,), 7),
        positions=(seq_lens - 1).clamp(min=0).long(),
        slot_mapping=torch.full((num_seqs,), -1),
        seq_lens=seq_lens,
        block_tables=tables,
        sampling_ints=ints,
        token_counts=token_counts if counts else None,
        ring=torch.full((RING_SIZE, num_seqs), -9),
        step=torch.tensor([4]),
    )
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    return module.DecodeState(**{name: value if value is None else value.to(device) for name, value in values.items()})


def check(module: ModuleType, device: torch.device) -> None:
    state = make_state(device, module)
    before = {field.name: getattr(state, field.name).clone() for field in fields(state)}
    module.advance(torch.tensor(SAMPLED, device=device), state, BLOCK_SIZE)
    tables = before["block_tables"].tolist()
    assert state.token_ids.tolist() == [9, 3, 7, 0, 1, 10]
    assert state.positions.tolist() == [2, 4, 0, 7, 20, 1]
    assert state.seq_lens.tolist() == [3, 5, 0, 8, 21, 2]
    expected_slots = [tables[0][0] * 4 + 2, tables[1][1] * 4, -1, tables[3][1] * 4 + 3, -1, tables[5][0] * 4 + 1]
    assert state.slot_mapping.tolist() == expected_slots
    assert state.ring.tolist() == [[-9] * 6, [9, 3, -1, -1, 1, 10], [-9] * 6]
    assert state.step.tolist() == [5]
    ints = before["sampling_ints"]
    ints[:, POSITION] += torch.tensor([1, 1, 0, 1, 1, 1], device=device)
    assert torch.equal(state.sampling_ints, ints)
    counted = (state.token_counts - before["token_counts"]).nonzero().tolist()
    assert counted == [[2, 9], [3, 10]]
    assert state.token_counts[[2, 3], [9, 10]].tolist() == [PROMPT_BIT + 1, 7]
    assert not state.token_counts._base[0].any()
    assert torch.equal(state.block_tables, before["block_tables"])


def test_advance_moves_every_running_row_on(device: torch.device) -> None:
    check(advance, device)


def test_advance_leaves_counting_to_others_where_there_are_no_counts(device: torch.device) -> None:
    state = make_state(device, advance, counts=False)
    advance.advance(torch.tensor(SAMPLED, device=device), state, BLOCK_SIZE)
    assert state.seq_lens.tolist() == [3, 5, 0, 8, 21, 2]


def test_advance_goes_round_the_ring(device: torch.device) -> None:
    state = make_state(device, advance)
    for step in range(5):
        advance.advance(torch.full((6,), step, device=device), state, BLOCK_SIZE)
    assert state.ring[:, 0].tolist() == [2, 3, 4]  # steps 6, 7 and 8 in rows 0, 1 and 2
    assert state.step.tolist() == [9]


MUTATIONS = [
    ("advance", "live = seq_len > 0", "live = inside"),
    ("advance", "tl.maximum(sampled, 0)", "sampled"),
    ("advance", "step % ring_size * stride_ring", "step % ring_size"),
    ("advance", "page = position // BLOCK_SIZE", "page = (position - 1) // BLOCK_SIZE"),
    ("advance", "live & (page < max_blocks)", "live"),
    ("advance", "(count_row >= 0) & (sampled >= 0)", "sampled >= 0"),
    ("advance", "(count_row >= 0) & (sampled >= 0)", "count_row >= 0"),
    ("advance", "row * NUM_INTS + POSITION", "row + POSITION"),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_advance_mutation_is_caught(mutation: Any, assert_caught: Callable[..., None], device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("a mutated kernel may write outside its tensors; the interpreter run covers it")
    assert_caught("advance", mutation, lambda module: check(module, device))
