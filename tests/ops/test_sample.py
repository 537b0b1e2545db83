"""`Ops.sample`: what every backend must do with one row, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inferneo_core.batch import (
    COUNT_ROW,
    FREQUENCY,
    PRESENCE,
    PROMPT_BIT,
    REPETITION,
    SamplingBatch,
    empty_sampling_batch,
)
from inferneo_core.errors import ShapeError
from inferneo_core.ops import torch_sampling
from inferneo_core.ops.torch_ops import TorchOps

MakeBatch = Callable[..., SamplingBatch]
INF, NAN = float("inf"), float("nan")


def with_biases(batch: SamplingBatch, rows: list[dict[int, float]]) -> SamplingBatch:
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    return replace(
        batch,
        bias_start=torch.tensor(starts, dtype=torch.int32),
        bias_ids=torch.tensor([i for row in rows for i in row], dtype=torch.int32),
        bias_values=torch.tensor([v for row in rows for v in row.values()], dtype=torch.float32),
    )


def penalised_batch(counts: Tensor, repetition: float, presence: float, frequency: float) -> SamplingBatch:
    batch = empty_sampling_batch(1)
    batch.ints[0, COUNT_ROW] = counts.shape[0] - 1
    batch.floats[0, [REPETITION, PRESENCE, FREQUENCY]] = torch.tensor([repetition, presence, frequency])
    return replace(batch, token_counts=counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_largest_and_of_equals_the_lowest(ops: TorchOps, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [-0.0, 0.0, -1.0, 0.0], [-INF, -INF, -5.0, -INF]], dtype=dtype)
    assert ops.sample(logits, empty_sampling_batch(3)).token_ids.tolist() == [1, 0, 2]


def test_infinite_logits_are_legal(ops: TorchOps, make_batch: MakeBatch) -> None:
    logits = torch.tensor([[0.0, INF, -INF, INF]])
    for settings in ({"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"typical_p": 0.5}):
        for seed in range(5):
            assert ops.sample(logits, make_batch(1, seed=seed, **settings)).token_ids.tolist() == [1]


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_k": 2, "top_p": 0.9}, {"typical_p": 0.5}])
def test_a_nan_or_an_all_forbidden_row_has_no_token(ops: TorchOps, make_batch: MakeBatch, settings: dict) -> None:
    logits = torch.tensor([[0.0, NAN, 1.0], [-INF, -INF, -INF], [0.0, -NAN, INF], [0.0, 1.0, 2.0]])
    batch = make_batch(4, **settings, num_logprobs=1)
    out = ops.sample(logits, batch)
    assert out.token_ids[:3].tolist() == [-1, -1, -1]
    assert out.token_ids[3] >= 0
    assert out.ranks is not None
    assert out.logprobs is not None
    assert out.ranks[:3].tolist() == [0, 0, 0]
    assert out.logprobs[:3].isnan().all()
    assert out.logprobs[3].isfinite()


def test_penalties_follow_their_formulas(ops: TorchOps) -> None:
    #                        unseen  prompt  output twice  both, negative
    logits = torch.tensor([[2.0, 4.0, 6.0, -1.0]])
    counts = torch.tensor([[7, 7, 7, 7], [0, PROMPT_BIT, 2, PROMPT_BIT + 1]], dtype=torch.int32)
    batch = penalised_batch(counts, repetition=2.0, presence=0.5, frequency=0.25)
    expected = torch.tensor([[2.0, 2.0, 3.0 - 1.0, -2.0 - 0.75]])
    assert torch.equal(torch_sampling.adjusted_logits(logits, batch), expected)
    for forbidden, winner in (([], 0), ([0], 1), ([0, 1], 2), ([0, 1, 2], 3)):  # the order that the formulas give
        barred = with_biases(batch, [dict.fromkeys(forbidden, -INF)])
        assert ops.sample(logits, barred).token_ids.tolist() == [winner]


def test_biases_add_and_minus_infinity_forbids(ops: TorchOps) -> None:
    logits = torch.tensor([[0.0, 1.0, INF], [0.0, 1.0, 2.0]])
    batch = with_biases(empty_sampling_batch(2), [{2: -INF}, {0: 1.5, 2: -0.6}])
    assert ops.sample(logits, batch).token_ids.tolist() == [1, 0]
    twice = replace(
        batch, bias_ids=torch.tensor([2, 0, 0], dtype=torch.int32), bias_values=torch.tensor([-INF, 1.1, 1.0])
    )
    assert ops.sample(logits, twice).token_ids.tolist() == [1, 0]


def test_logits_are_left_as_they_were(ops: TorchOps) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    ops.sample(logits, with_biases(empty_sampling_batch(1), [{1: 5.0}]))
    assert logits.tolist() == [[0.0, 1.0, 2.0]]


def test_no_rows_give_no_tokens(ops: TorchOps) -> None:
    assert ops.sample(torch.empty(0, 5), empty_sampling_batch(0)).token_ids.shape == (0,)
    assert ops.score(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 2).top_ids.shape == (0, 2)  # type: ignore[union-attr]


def test_strided_logits_are_sampled_as_their_copy(ops: TorchOps, make_batch: MakeBatch) -> None:
    wide = torch.randn(6, 123, generator=torch.Generator().manual_seed(0))
    view, batch = wide[::2, 3:100], make_batch(3)
    assert torch.equal(ops.sample(view, batch).token_ids, ops.sample(view.contiguous(), batch).token_ids)


GOOD = with_biases(
    replace(empty_sampling_batch(2), token_counts=torch.zeros(1, 5, dtype=torch.int32)), [{1: 1.0}, {4: 2.0}]
)


def test_the_batch_that_the_hostile_ones_vary_is_good(ops: TorchOps) -> None:
    assert ops.sample(torch.zeros(2, 5), GOOD).token_ids.tolist() == [1, 4]


def ints_with(column: int, value: int) -> Tensor:
    ints = GOOD.ints.clone()
    ints[1, column] = value
    return ints


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"floats": torch.zeros(3, 7)}, "floats"),
        ({"ints": torch.zeros(2, 4, dtype=torch.int64)}, "ints"),
        ({"token_counts": torch.zeros(1, 6, dtype=torch.int32)}, "token_counts"),
        ({"ints": ints_with(COUNT_ROW, 1)}, "count_row"),
        ({"ints": ints_with(COUNT_ROW, 2**62), "token_counts": None}, "count_row"),
        ({"bias_ids": torch.tensor([1, 5], dtype=torch.int32)}, "bias_ids"),
        ({"bias_ids": torch.tensor([-1, 0], dtype=torch.int32)}, "bias_ids"),
        ({"bias_start": torch.tensor([0, 2, 1], dtype=torch.int32)}, "bias_start"),
        ({"bias_start": torch.tensor([0, 1, 9], dtype=torch.int32)}, "bias_start"),
        ({"bias_start": torch.tensor([-5, 1, 2], dtype=torch.int32)}, "bias_start"),
        ({"bias_values": torch.tensor([1.0, NAN])}, "bias_values"),
        ({"bias_values": torch.tensor([1.0])}, "bias_values"),
        ({"bias_values": None}, "together"),
        ({"num_logprobs": 6}, "num_logprobs"),
    ],
)
def test_sample_refuses_a_hostile_batch(ops: TorchOps, changes: dict, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        ops.sample(torch.zeros(2, 5), replace(GOOD, **changes))


@pytest.mark.parametrize(
    "logits", [torch.zeros(2, 5, dtype=torch.float64), torch.zeros(10), torch.zeros(2, 0), torch.zeros(3, 5)]
)
def test_sample_refuses_logits_of_another_shape_or_dtype(ops: TorchOps, logits: Tensor) -> None:
    with pytest.raises(ShapeError):
        ops.sample(logits, GOOD)


@pytest.mark.parametrize("column", range(7))
@pytest.mark.parametrize("value", [NAN, INF, -INF, -1.0, 0.0, 1e38])
def test_impossible_parameters_neither_crash_nor_leave_the_vocabulary(ops: TorchOps, column: int, value: float) -> None:
    logits = torch.randn(1, 123, generator=torch.Generator().manual_seed(3))
    for top_k in (-(2**63), 0, 5, 2**63 - 1):
        batch = penalised_batch(torch.ones(1, 123, dtype=torch.int32), 1.2, 0.1, 0.1)
        batch.floats[0, :4] = torch.tensor([1.0, 0.9, 0.05, 0.9])
        batch.floats[0, column] = value
        batch.ints[0, 0] = top_k
        assert -1 <= int(ops.sample(logits, batch).token_ids[0]) < 123
