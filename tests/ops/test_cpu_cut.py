"""What the CPU graph leaves out of a prompt's last layer: the same bits, and nothing that no token is drawn after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from inferneo_core import Engine
from inferneo_core.batch import AttentionMetadata, ModelInput
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.cpu_tape import TapeRecorder

QUERY_LENS = (5, 1, 40)
LAST = (4, 5, 45)  # tokens of the sequences
BLOCK_SIZE = 16


def prompts(rows: Sequence[int]) -> ModelInput:
    """A step of three prompts, each in blocks of its own, of whose tokens `rows` are drawn after."""
    starts = torch.tensor([0, *QUERY_LENS]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in QUERY_LENS])
    tables = torch.arange(9).view(3, 3)
    owners = torch.repeat_interleave(torch.arange(3), torch.tensor(QUERY_LENS))
    slots = tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    attention = AttentionMetadata(starts.int(), torch.tensor(QUERY_LENS).int(), tables.int(), 40, 40)
    return ModelInput(torch.arange(46) + 3, positions, slots, attention, torch.tensor(rows, dtype=torch.int64))


def logits(engine: Engine, rows: Sequence[int]) -> Tensor:
    """[len(rows), vocab_size], as a tape of the engine's model gives them."""
    runner, inputs = engine._runner, prompts(rows)
    assert isinstance(runner.ops, CpuOps)
    tape = TapeRecorder()
    tape.lm_head(runner.model.forward(tape, inputs, runner.cache), runner.model.norm, runner.model.head)
    return tape.run(
        runner.ops.team,
        token_ids=inputs.token_ids,
        positions=inputs.positions,
        slot_mapping=inputs.slot_mapping,
        attention=inputs.attention,
        rows=inputs.rows,
    )


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(
    "rows",
    [LAST, (4, 45), (5,), (45,), (3,), (0, 4), (2, 45), (45, 4), (4, 4), range(45), ()],
    ids=["all last", "some last", "one token", "the longest", "not last", "two of one", "one not last", "unordered",
         "twice", "all but one", "none"],
)  # fmt: skip
def test_rows_have_the_bits_that_they_have_among_all(rows: Sequence[int], num_threads: int, tiny_engine: Any) -> None:
    engine = tiny_engine(block_size=BLOCK_SIZE, num_threads=num_threads)
    whole = logits(engine, range(46))
    assert torch.equal(logits(engine, rows), whole[list(rows)])


def test_nothing_runs_behind_the_last_store_where_nothing_is_drawn(tiny_engine: Any) -> None:
    graph = tiny_engine(block_size=BLOCK_SIZE)._runner._tape
    assert graph is not None
    graph.time_verbs(True)
    graph.launch(prompts(()), None)
    times = graph.verb_times()
    last_store = max(i for i, (verb, _) in enumerate(times) if verb == "qkv_rope_store")
    assert all(seconds > 0.0 for _, seconds in times[: last_store + 1])
    assert all(seconds == 0.0 for _, seconds in times[last_store + 1 :])
