"""Log-probabilities on the device have the reference's bits."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from inferneo_kernels import scoring
from torch import Tensor

from inferneo_core.ops import torch_sampling as reference

NAN, INF = float("nan"), float("inf")


def check(module: ModuleType, logits: Tensor, targets: Tensor, num_logprobs: int, device: torch.device) -> None:
    expected = reference.score(logits, targets, num_logprobs)
    actual = module.score(logits.to(device), targets.to(device), num_logprobs)
    for name, ours in zip(("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs"), actual, strict=True):
        torch.testing.assert_close(ours.cpu(), getattr(expected, name), rtol=0, atol=0, equal_nan=True, msg=name)


def make_logits(num_rows: int, vocab_size: int, ties: bool = False) -> Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 3
    return (logits * 2).round() / 2 if ties else logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "num_logprobs"), [(1, 1), (2, 2), (5, 0), (123, 20), (2500, 20)])
def test_scores_agree(device: torch.device, dtype: torch.dtype, vocab_size: int, num_logprobs: int) -> None:
    logits = make_logits(5, vocab_size, ties=vocab_size == 123).to(dtype)
    logits[4, vocab_size // 3] = NAN
    targets = torch.tensor([0, vocab_size - 1, vocab_size // 2, -1, 0])
    check(scoring, logits, targets, num_logprobs, device)


def test_infinite_logits_are_scored(device: torch.device) -> None:
    rows = torch.tensor([[0.0, INF, -INF, INF], [-INF] * 4, [-INF, 1.0, -INF, -0.0], [0.0, -0.0, 0.0, -0.0]])
    for target in range(4):
        check(scoring, rows, torch.full((4,), target), 4, device)


def test_strided_rows_are_scored_as_their_copy(device: torch.device) -> None:
    view = make_logits(4, 123)[::2, 3:100]
    check(scoring, view, torch.tensor([3, 96]), 2, device)


def test_no_rows_have_no_scores(device: torch.device) -> None:
    nothing = torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device)
    assert [tuple(field.shape) for field in scoring.score(*nothing, 2)] == [(0,), (0,), (0,), (0, 2), (0, 2)]


def check_all(module: ModuleType, device: torch.device) -> None:
    logits = make_logits(4, 1100, ties=True)
    logits[3, 1090] = NAN
    check(module, logits, torch.tensor([1099, 5, -1, 3]), 3, device)
    check(module, torch.full((1, 5), -INF), torch.tensor([2]), 3, device)


MUTATIONS = [
    ("scoring", "x != x, NAN_TOKEN, pack_token(x, ids)", "x != x, NO_TOKEN, pack_token(x, ids)"),
    ("scoring", "tl.where(tokens == best, NO_TOKEN, tokens)", "tokens"),
    ("scoring", "mass = tl.sum(tl.where(inside, ", "mass = tl.sum(tl.where(ids >= 0, "),
    ("scoring", "pack_token(x, ids) > scored", "pack_token(x, ids) >= scored"),
    ("scoring", "tokens < previous, tokens", "tokens <= previous, tokens"),
    ("scoring", "tl.float32) * 2.0**-40)", "tl.float32) * 2.0**-39)"),
]


def test_scoring_passes_the_check_of_its_mutations(device: torch.device) -> None:
    check_all(scoring, device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mistake may make NaN, and the check must see it
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_scoring_mutation_is_caught(mutation: Any, assert_caught: Callable[..., None], device: torch.device) -> None:
    assert_caught("scoring", mutation, lambda module: check_all(module, device))
