"""`advance` moves every running row on by one token, and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
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


BIAS_STEPS = [5, 6, 2**31 - 1, 4, 5, 5]  # the last of them is no bias of this state
MAX_BIASES = 3072  # a multiple of what the kernel looks at together, so that mistakes stay inside the tensors


def make_state(device: torch.device, module: ModuleType) -> Any:
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
        token_counts=token_counts,
        bias_start=torch.tensor([0, 2, 2, 4, 4, 5, 5], dtype=torch.int32),
        bias_values=torch.arange(1.0, MAX_BIASES + 1),
        bias_steps=torch.tensor(BIAS_STEPS + [0] * (MAX_BIASES - len(BIAS_STEPS)), dtype=torch.int32),
        ring=torch.full((RING_SIZE, num_seqs), -9),
        step=torch.tensor([4]),
    )
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    return module.DecodeState(**{name: value.to(device) for name, value in values.items()})


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
    before["bias_values"][[0, 3, 4]] = 0.0  # five steps have been taken
    assert torch.equal(state.bias_values, before["bias_values"])
    for name in ("block_tables", "bias_start", "bias_steps"):
        assert torch.equal(getattr(state, name), before[name]), name


def test_advance_moves_every_running_row_on(device: torch.device) -> None:
    check(advance, device)


def check_many_biases(module: ModuleType, device: torch.device) -> None:
    """More than a program looks at together."""
    state = make_state(device, module)
    starts = torch.tensor([0, 2500, 2500, 2500, 2900, 2900, 2900], dtype=torch.int32, device=device)
    steps = torch.full((MAX_BIASES,), 6, dtype=torch.int32, device=device)
    ending = [0, 1023, 1024, 2047, 2048, 2899]
    steps[[*ending, 2900]] = 5
    state = replace(state, bias_start=starts, bias_steps=steps)
    module.advance(torch.tensor(SAMPLED, device=device), state, BLOCK_SIZE)
    assert (state.bias_values == 0).nonzero().flatten().tolist() == ending


def test_advance_looks_at_every_bias(device: torch.device) -> None:
    check_many_biases(advance, device)


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
    ("advance", "<= step + 1", "<= step"),
    ("advance", "exists & has_run_out", "has_run_out"),
    ("advance", "bias_start_ptr + num_seqs", "bias_start_ptr + num_seqs - 2"),
    ("advance", "bias = start + ", "bias = "),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_advance_mutation_is_caught(mutation: Any, assert_caught: Callable[..., None], device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("a mutated kernel may write outside its tensors; the interpreter run covers it")

    def checks(module: ModuleType) -> None:
        check(module, device)
        check_many_biases(module, device)

    assert_caught("advance", mutation, checks)
