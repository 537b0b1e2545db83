"""The C++ sampler gives the reference's bits: any filter, vocabulary, instruction set, thread count and batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inferneo_core.batch import COUNT_ROW, FREQUENCY, PRESENCE, PROMPT_BIT, REPETITION, SampleOutput, SamplingBatch
from inferneo_core.errors import BackendUnavailable, ConfigError
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.torch_ops import TorchOps

MakeBatch = Callable[..., SamplingBatch]
MakeLogits = Callable[..., Tensor]

SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 7},
    "wide_top_k": {"top_k": 600},
    "top_p": {"top_p": 0.9},
    "tiny_top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.07},
    "tiny_min_p": {"min_p": 3e-11},
    "typical": {"typical_p": 0.8},
    "usual": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "all": {"temperature": 1.3, "top_k": 40, "typical_p": 0.95, "top_p": 0.9, "min_p": 0.01},
}


def assert_same(actual: SampleOutput, expected: SampleOutput) -> None:
    for name in ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        assert theirs is None or torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_rows", "vocab_size"), [(4, 1), (5, 2), (6, 5), (5, 123), (7, 1000), (2, 49152), (1, 128256)]
)
def test_every_setting_agrees_at_every_size(
    make_batch: MakeBatch, make_logits: MakeLogits, isa: str, dtype: torch.dtype, num_rows: int, vocab_size: int
) -> None:
    for ties in (False, True):
        logits = make_logits(num_rows, vocab_size, seed=vocab_size, ties=ties).to(dtype)
        for settings in SETTINGS.values():
            batch = make_batch(num_rows, **settings, num_logprobs=min(vocab_size, 3))
            assert_same(CpuOps().sample(logits, batch), TorchOps().sample(logits, batch))


@pytest.mark.parametrize("scale", [0.0, 0.05, 40.0, 1e9, 1e38])
def test_flat_steep_and_huge_logits_agree(
    make_batch: MakeBatch, make_logits: MakeLogits, isa: str, scale: float
) -> None:
    logits = make_logits(3, 2000, scale=scale)
    logits[:, ::7] = -torch.inf
    for settings in SETTINGS.values():
        batch = make_batch(3, **settings, num_logprobs=20)
        assert_same(CpuOps().sample(logits, batch), TorchOps().sample(logits, batch))


@pytest.mark.parametrize("vocab_size", [5, 123, 1000])
def test_penalties_and_biases_agree(make_batch: MakeBatch, make_logits: MakeLogits, isa: str, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    batch = make_batch(6, top_p=0.95)
    batch.floats[:, [REPETITION, PRESENCE, FREQUENCY]] = torch.tensor([1.3, 0.4, -0.3])
    batch.ints[:, COUNT_ROW] = torch.tensor([2, -1, 0, 1, 0, -1])
    counts = torch.randint(4, (3, vocab_size), generator=generator, dtype=torch.int32)
    counts += PROMPT_BIT * torch.randint(2, (3, vocab_size), generator=generator, dtype=torch.int32)
    ids = torch.randint(vocab_size, (40,), generator=generator, dtype=torch.int32)
    values = torch.randn(40, generator=generator) * 3
    values[::5] = -torch.inf
    batch = replace(
        batch,
        token_counts=counts,
        bias_start=torch.tensor([0, 3, 3, 20, 31, 40, 40], dtype=torch.int32),
        bias_ids=ids,
        bias_values=values,
    )
    logits = make_logits(6, vocab_size)
    for x in (logits, logits.bfloat16()):
        assert_same(CpuOps().sample(x, batch), TorchOps().sample(x, batch))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_million_draws_agree(make_batch: MakeBatch, make_logits: MakeLogits, name: str) -> None:
    num_draws = 1_000_000 // len(SETTINGS) + 1
    logits, batch = make_logits(num_draws, 29, seed=1), make_batch(num_draws, **SETTINGS[name], seed=5)
    different = CpuOps().sample(logits, batch).token_ids != TorchOps().sample(logits, batch).token_ids
    assert int(different.sum()) == 0


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 49152), (2, 40000), (9, 1000)])
@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_changes_nothing(
    make_batch: MakeBatch, make_logits: MakeLogits, num_rows: int, vocab_size: int
) -> None:
    logits = make_logits(num_rows, vocab_size)
    for settings in SETTINGS.values():
        batch = make_batch(num_rows, **settings, num_logprobs=5)
        assert_same(CpuOps(num_threads=2).sample(logits, batch), CpuOps(num_threads=1).sample(logits, batch))


def test_batch_mates_change_nothing(ops: TorchOps, make_batch: MakeBatch, make_logits: MakeLogits) -> None:
    logits, batch = make_logits(12, 123), make_batch(12)
    for row, settings in enumerate(SETTINGS.values()):
        batch.floats[row], batch.ints[row, 0] = (one := make_batch(1, **settings)).floats[0], one.ints[0, 0]
    together = ops.sample(logits, batch).token_ids
    for row in range(12):
        alone = replace(batch, floats=batch.floats[row : row + 1], ints=batch.ints[row : row + 1])
        assert ops.sample(logits[row : row + 1], alone).token_ids[0] == together[row]


@pytest.mark.parametrize("column", [1, 2, 3])  # seed, position, choice
def test_seed_position_and_choice_each_change_the_draw(ops: TorchOps, make_batch: MakeBatch, column: int) -> None:
    batch = make_batch(64)
    batch.ints[:, 1:4] = torch.tensor([11, 5, 0])
    assert len(set(ops.sample(torch.zeros(64, 1000), batch).token_ids.tolist())) == 1
    batch.ints[:, column] = torch.arange(64)
    assert len(set(ops.sample(torch.zeros(64, 1000), batch).token_ids.tolist())) > 50


@pytest.mark.parametrize("value", ["sse9", "AVX2"])
def test_an_unknown_instruction_set_is_refused(
    monkeypatch: pytest.MonkeyPatch, make_batch: MakeBatch, value: str
) -> None:
    ops = CpuOps()
    monkeypatch.setenv("INFERNEO_CPU_ISA", value)
    with pytest.raises(BackendUnavailable, match="it is scalar"):
        CpuOps()
    with pytest.raises(BackendUnavailable, match=value):
        ops.sample(torch.zeros(1, 5), make_batch(1))


def test_cpu_ops_refuses_no_threads() -> None:
    with pytest.raises(ConfigError, match="num_threads"):
        CpuOps(num_threads=0)
