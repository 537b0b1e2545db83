"""Philox4x32-10 against the known answers that Random123 publishes (kat_vectors), and the noise made from it."""

import math

import pytest
import torch

from inferneo_core.batch import NUM_INTS
from inferneo_core.ops import torch_sampling

# counter 0-3, key 0-1, output 0-3
KNOWN_ANSWERS = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]


@pytest.mark.parametrize("line", KNOWN_ANSWERS)
def test_philox_matches_the_published_vectors(line: str) -> None:
    words = [int(word, 16) for word in line.split()]
    c0, c1, c2, c3 = (torch.tensor([word]) for word in words[:4])
    key = words[4] | words[5] << 32
    key = torch.tensor([key - 2**64 if key >= 2**63 else key])
    assert [int(word) for word in torch_sampling.philox4x32((c0, c1, c2, c3), key)] == words[6:]


def test_philox_ignores_all_but_32_bits_of_a_counter() -> None:
    low, wide = torch.tensor([7]), torch.tensor([7 + 2**40])
    key = torch.tensor([123])
    assert torch_sampling.philox4x32((low,) * 4, key) == torch_sampling.philox4x32((wide,) * 4, key)


def test_noise_of_a_token_is_its_word_of_the_counter_block() -> None:
    ints = torch.zeros(1, NUM_INTS, dtype=torch.int64)
    ints[0, 1:4] = torch.tensor([99, 17, 3])  # seed, position, choice
    noise = torch_sampling.gumbel_exponentials(ints, 11)[0]
    for token_id in range(11):
        counter = tuple(torch.tensor([c]) for c in (17, token_id // 4, 3, 0))
        x = int(torch_sampling.philox4x32(counter, torch.tensor([99]))[token_id % 4])  # type: ignore[arg-type]
        assert float(noise[token_id]) == pytest.approx(-math.log((x + 0.5) * 2.0**-32), rel=1e-6)


def test_exp_and_log_are_accurate_to_a_tenth_of_a_millionth() -> None:
    d = -torch.rand(100_001, generator=torch.Generator().manual_seed(1)) * 28
    assert ((torch_sampling.exp(d).double() / d.double().exp()) - 1).abs().max() < 1e-7
    v = torch.exp2(torch.rand(100_001, generator=torch.Generator().manual_seed(2)) * 38 - 33)
    assert (
        (torch_sampling.log(v).double() - v.double().log()) / v.double().log().abs().clamp(min=1e-9)
    ).abs().max() < 1e-7


def test_noise_keeps_its_resolution_at_both_ends() -> None:
    ends = torch.tensor([0.5 * 2.0**-32])
    near_zero = -torch_sampling.log1p_scaled(-ends, torch.zeros(1))  # the largest word: v = 1 - 2**-33
    assert float(near_zero) == 2.0**-33
    assert float(-torch_sampling.log(ends)) == pytest.approx(33 * math.log(2), rel=1e-7)
