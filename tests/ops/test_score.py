"""`Ops.score`: log-probabilities, ranks and the most likely tokens, against fp64 log_softmax."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inferneo_core.errors import ShapeError
from inferneo_core.ops.torch_ops import TorchOps

MakeLogits = Callable[..., Tensor]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "vocab_size", "num_top"), [(3, 1, 1), (5, 123, 20), (2, 1000, 0), (2, 49152, 20)])
@pytest.mark.parametrize("ties", [False, True])
def test_score_matches_log_softmax(
    ops: TorchOps, make_logits: MakeLogits, dtype: torch.dtype, num_rows: int, vocab_size: int, num_top: int, ties: bool
) -> None:
    logits = make_logits(num_rows, vocab_size, ties=ties).to(dtype)
    targets = torch.randint(vocab_size, (num_rows,), generator=torch.Generator().manual_seed(7))
    out = ops.score(logits, targets, num_top)
    reference = logits.double().log_softmax(dim=1)
    order = logits.float().sort(dim=1, descending=True, stable=True).indices
    assert out.logprobs is not None
    assert out.top_logprobs is not None
    torch.testing.assert_close(out.logprobs.double(), reference.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    assert torch.equal(out.ranks, (order == targets[:, None]).int().argmax(dim=1) + 1)  # type: ignore[arg-type]
    assert torch.equal(out.top_ids, order[:, :num_top])  # type: ignore[arg-type]
    torch.testing.assert_close(out.top_logprobs.double(), reference.gather(1, order[:, :num_top]), rtol=1e-6, atol=1e-6)


def test_sample_reports_the_score_of_its_choice_under_the_raw_logits(
    ops: TorchOps, make_logits: MakeLogits, make_batch: Callable[..., object]
) -> None:
    logits = make_logits(5, 123)
    out = ops.sample(logits, make_batch(5, temperature=0.5, top_k=3, num_logprobs=4))  # type: ignore[arg-type]
    again = ops.score(logits, out.token_ids, 4)
    for name in ("logprobs", "ranks", "top_ids", "top_logprobs"):
        assert torch.equal(getattr(out, name), getattr(again, name))


def test_an_infinite_row_scores_its_infinities(ops: TorchOps) -> None:
    inf = float("inf")
    out = ops.score(torch.tensor([[inf, 0.0, inf], [-inf, -inf, 0.0], [-inf, -inf, -inf]]), torch.tensor([2, 0, 1]), 0)
    torch.testing.assert_close(out.logprobs, torch.tensor([0.5, 0.0, 1 / 3]).log())
    assert out.ranks.tolist() == [2, 2, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize(("targets", "num_logprobs"), [([5], 0), ([-2], 0), ([0, 1], 0), ([0], 6), ([0], -1)])
def test_score_refuses_what_lies_outside_the_vocabulary(ops: TorchOps, targets: list[int], num_logprobs: int) -> None:
    with pytest.raises(ShapeError):
        ops.score(torch.zeros(1, 5), torch.tensor(targets), num_logprobs)
