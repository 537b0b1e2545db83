"""The distribution of the draws, by chi-square against probabilities that are worked out here by hand.

The seeds are fixed, so a test passes or fails always. A bound of five standard deviations leaves a right sampler far
inside it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from inferneo_core.batch import SamplingBatch
from inferneo_core.ops.torch_ops import TorchOps

MakeBatch = Callable[..., SamplingBatch]

NUM_DRAWS = 40_000
PROBABILITIES = [0.30, 0.05, 0.22, 0.02, 0.18, 0.13, 0.10]  # of tokens 0 to 6
# Each filter's survivors. Entropy is 1.76 nats and the surprises are 1.20, 3.00, 1.51, 3.91, 1.71, 2.04, 2.30: nearest
# to it are tokens 4 (0.05 away), 2 (0.24), 5 (0.28), 6 (0.55), 0 (0.55).
CASES: dict[str, tuple[dict[str, float], list[int]]] = {
    "none": ({}, [0, 1, 2, 3, 4, 5, 6]),
    "top_k": ({"top_k": 3}, [0, 2, 4]),
    "top_p": ({"top_p": 0.72}, [0, 2, 4, 5]),  # 0.30 + 0.22 + 0.18 = 0.70 is not enough
    "min_p": ({"min_p": 0.4}, [0, 2, 4, 5]),  # at least 0.12
    "typical": ({"typical_p": 0.45}, [2, 4, 5]),  # 0.18 + 0.22 = 0.40 is not enough
    "top_k_then_top_p": ({"top_k": 4, "top_p": 0.80}, [0, 2, 4]),  # 0.70 / 0.83 = 0.843, 0.52 / 0.83 = 0.627
    "top_p_then_min_p": ({"top_p": 0.80, "min_p": 0.5}, [0, 2, 4]),
    "typical_then_min_p": ({"typical_p": 0.45, "min_p": 0.7}, [2, 4]),  # 0.13 < 0.7 * 0.22 <= 0.18
    "all": ({"top_k": 5, "typical_p": 0.9, "top_p": 0.95, "min_p": 0.5}, [0, 2, 4]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_filtered_distribution(
    ops: TorchOps, make_batch: MakeBatch, name: str, temperature: float
) -> None:
    settings, kept = CASES[name]
    logits = (torch.tensor(PROBABILITIES).log() * temperature).expand(NUM_DRAWS, -1)  # the temperature divides it out
    batch = make_batch(NUM_DRAWS, **settings, temperature=temperature, seed=11)
    counts = ops.sample(logits, batch).token_ids.bincount(minlength=7).double()
    assert counts.nonzero().flatten().tolist() == kept
    expected = torch.tensor(PROBABILITIES, dtype=torch.float64)[kept]
    assert chi_square_deviations(counts[kept], expected / expected.sum()) < 5


def test_a_flat_vocabulary_of_128_thousand_is_drawn_evenly(make_batch: MakeBatch) -> None:
    cpu_ops = pytest.importorskip("inferneo_core.ops.cpu_ops")  # the reference needs minutes for this
    counts = torch.zeros(128_256, dtype=torch.int64)
    for seed in range(250):
        ids = cpu_ops.CpuOps().sample(torch.zeros(1, 128_256).expand(16, -1), make_batch(16, seed=16 * seed)).token_ids
        counts += ids.bincount(minlength=128_256)
    sixteenths = counts.view(16, -1).sum(1).double()
    by_word = counts.view(-1, 4).sum(0).double()
    assert chi_square_deviations(sixteenths, torch.full((16,), 1 / 16, dtype=torch.float64)) < 5
    assert chi_square_deviations(by_word, torch.full((4,), 1 / 4, dtype=torch.float64)) < 5
    assert int((counts > 0).sum()) > 3_900  # 4,000 draws of 128,256 meet about 62 times; ties would make them meet more


def chi_square_deviations(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """How many standard deviations the chi-square statistic lies above its mean."""
    expected = probabilities * counts.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5 if freedom else 0.0
