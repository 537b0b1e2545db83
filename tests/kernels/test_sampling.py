"""The device sampler chooses the reference's tokens: every filter, alone and mixed, ties, penalties, any vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from inferneo_kernels import head_draw, sampling, sampling_select
from inferneo_kernels.quant_layout import dense
from torch import Tensor

from inferneo_core.batch import (
    CHOICE,
    COUNT_ROW,
    FREQUENCY,
    INV_TEMPERATURE,
    MIN_P,
    POSITION,
    PRESENCE,
    PROMPT_BIT,
    REPETITION,
    SEED,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    SampleOutput,
    SamplingBatch,
    empty_sampling_batch,
)
from inferneo_core.ops import torch_sampling as reference

INF, NAN = float("inf"), float("nan")
COLUMNS = {"temperature": INV_TEMPERATURE, "top_p": TOP_P, "min_p": MIN_P, "typical_p": TYPICAL_P}

SETTINGS: list[dict[str, float]] = [
    {"temperature": 0},
    {},
    {"temperature": 2.5},
    {"top_k": 7},
    {"top_k": 600},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.07},
    {"min_p": 3e-11},
    {"typical_p": 0.8},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.3, "top_k": 40, "typical_p": 0.95, "top_p": 0.9, "min_p": 0.01},
]


def make_batch(settings: list[dict[str, float]], num_logprobs: int = -1, seed: int = 0) -> SamplingBatch:
    """One row a setting, each with its own seed, position and choice."""
    batch = empty_sampling_batch(len(settings), num_logprobs)
    rows = torch.arange(len(settings))
    batch.floats[:, INV_TEMPERATURE] = 1.0
    batch.ints[:, SEED] = (rows + seed) * -7046029254386353131  # spreads them over 64 bits
    batch.ints[:, POSITION], batch.ints[:, CHOICE] = rows * 31 % 4096, rows % 3
    for row, setting in enumerate(settings):
        for name, value in setting.items():
            if name == "top_k":
                batch.ints[row, TOP_K] = int(value)
            elif name == "temperature":
                batch.floats[row, INV_TEMPERATURE] = 1 / value if value else 0.0
            else:
                batch.floats[row, COLUMNS[name]] = value
    return batch


def make_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0, ties: bool = False) -> Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    return (logits * 2).round() / 2 if ties else logits


def with_extras(batch: SamplingBatch, vocab_size: int) -> SamplingBatch:
    """Penalties in half of the rows, biases in some, two of them on one token."""
    generator = torch.Generator().manual_seed(vocab_size)
    num_seqs = batch.num_seqs
    batch.floats[:, [REPETITION, PRESENCE, FREQUENCY]] = torch.tensor([1.3, 0.4, -0.3])
    batch.ints[::2, COUNT_ROW] = torch.arange(len(batch.ints[::2])).flip(0)
    counts = torch.randint(4, (num_seqs, vocab_size), generator=generator, dtype=torch.int32)
    counts += PROMPT_BIT * torch.randint(2, (num_seqs, vocab_size), generator=generator, dtype=torch.int32)
    per_row = torch.tensor([3, 0, 5])[torch.arange(num_seqs) % 3]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), per_row.cumsum(0)]).int()
    ids = torch.randint(vocab_size, (int(starts[-1]),), generator=generator, dtype=torch.int32)
    values = torch.randn(len(ids), generator=generator) * 3
    values[::4] = -INF
    ids[1] = ids[2]
    return replace(batch, token_counts=counts, bias_start=starts, bias_ids=ids, bias_values=values)


def run(module: ModuleType, logits: Tensor, batch: SamplingBatch, device: torch.device, **options: Any) -> SampleOutput:
    tensors = (batch.floats, batch.ints, batch.token_counts, batch.bias_start, batch.bias_ids, batch.bias_values)
    moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
    output = module.sample(logits.to(device), *moved, batch.num_logprobs, **options)
    return SampleOutput(*(None if field is None else field.cpu() for field in output))


def assert_same(actual: SampleOutput, expected: SampleOutput) -> None:
    for name in ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        assert theirs is None or torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True), name


def check(module: ModuleType, logits: Tensor, batch: SamplingBatch, device: torch.device) -> None:
    assert_same(run(module, logits, batch, device), reference.sample(logits, batch))


@pytest.mark.parametrize(
    ("vocab_size", "ties", "dtype"),
    [
        (1, False, torch.float32),
        (2, True, torch.float32),
        (5, False, torch.bfloat16),
        (123, True, torch.float32),
        (1000, False, torch.float32),
        (1000, True, torch.bfloat16),
    ],
)
def test_every_setting_agrees_at_every_size(
    device: torch.device, vocab_size: int, ties: bool, dtype: torch.dtype
) -> None:
    logits = make_logits(len(SETTINGS), vocab_size, seed=vocab_size, ties=ties).to(dtype)
    check(sampling, logits, make_batch(SETTINGS, num_logprobs=min(vocab_size, 3)), device)


EDGES = [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.4}, {"typical_p": 0.6}, {"top_k": 6, "typical_p": 0.9, "top_p": 0.7}]


def every_token_wins_once(logits: Tensor, setting: dict[str, float]) -> SamplingBatch:
    """Rows of one setting at whose positions the unfiltered draw from `logits` [vocab_size] takes each token in turn.

    The filtered draw takes it, too, if and only if the filter keeps it.
    """
    plain = make_batch([{}] * 4000)
    plain.ints[:, [SEED, CHOICE]], plain.ints[:, POSITION] = 3, torch.arange(4000)
    winners = reference.choose(logits.expand(4000, -1), plain)
    positions = [int((winners == token).nonzero()[0]) for token in range(len(logits))]
    batch = make_batch([setting] * len(logits))
    batch.ints[:, [SEED, CHOICE]], batch.ints[:, POSITION] = 3, torch.tensor(positions)
    return batch


def check_edges(module: ModuleType, device: torch.device, *settings: dict[str, float]) -> None:
    """Which tokens each filter keeps, to the last."""
    logits = make_logits(1, 9, scale=1.0, ties=True)
    batches = [every_token_wins_once(logits[0], setting) for setting in settings]
    floats, ints = torch.cat([batch.floats for batch in batches]), torch.cat([batch.ints for batch in batches])
    check(module, logits.expand(len(floats), -1), replace(batches[0], floats=floats, ints=ints), device)


def test_filters_keep_the_references_tokens_to_the_last(device: torch.device) -> None:
    check_edges(sampling, device, *EDGES)


@pytest.fixture
def no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves rows that their candidates cannot decide UNDECIDED."""
    candidates = [config for config in sampling_select.SELECT_CONFIGS if not config.whole_row]
    monkeypatch.setattr(sampling_select, "SELECT_CONFIGS", candidates)


@pytest.mark.usefixtures("no_walk")
def test_candidates_decide_for_a_row_that_does_not_fit(device: torch.device) -> None:
    settings = [{"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.3}, {"top_k": 300, "typical_p": 0.5}]
    check(sampling, make_logits(len(settings), 9000), make_batch(settings), device)


UNDECIDED = [{"top_p": 0.999}, {"top_k": 110}, {"min_p": 1e-9}, {"typical_p": 0.97}, {"typical_p": 0.95, "top_p": 0.99}]


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what reaches the eighth largest block maximum becomes a candidate."""
    monkeypatch.setattr(sampling, "bound_rank", lambda vocab_size: 8)


@pytest.mark.usefixtures("few_candidates")
def test_a_row_that_its_candidates_cannot_decide_is_walked_over(device: torch.device) -> None:
    settings = [SETTINGS[1], SETTINGS[10], *UNDECIDED]
    check(sampling, make_logits(len(settings), 123, ties=True), make_batch(settings), device)


@pytest.mark.usefixtures("few_candidates", "no_walk")
def test_candidates_never_decide_wrongly(device: torch.device) -> None:
    settings = [*SETTINGS, *UNDECIDED]
    logits, batch = make_logits(len(settings), 123), make_batch(settings)
    token_ids = run(sampling, logits, batch, device).token_ids
    decided = token_ids != sampling_select.UNDECIDED.value
    assert torch.equal(token_ids[decided], reference.sample(logits, batch).token_ids[decided])
    assert decided[: len(SETTINGS)].sum() >= 7
    assert not decided[-len(UNDECIDED) :].any()


def test_the_walk_over_a_row_crosses_its_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_select, "SELECT_CONFIGS", [sampling_select.SelectConfig(64, True, 3, 4)])
    settings = [SETTINGS[3], SETTINGS[11], UNDECIDED[4]]
    check(sampling, make_logits(len(settings), 123), make_batch(settings), device)


def test_more_candidates_than_fit_are_walked_over(device: torch.device) -> None:
    flat = torch.zeros(2, 4500)
    flat[:, ::3] = 0.25
    check(sampling, flat, make_batch([{"top_p": 0.9}, {"top_k": 20}]), device)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(5, torch.float32), (123, torch.bfloat16), (1000, torch.float32)])
def test_penalties_and_biases_agree(device: torch.device, vocab_size: int, dtype: torch.dtype) -> None:
    settings = [SETTINGS[i] for i in (0, 1, 3, 5, 0, 2, 10)]
    batch = with_extras(make_batch(settings, num_logprobs=1), vocab_size)
    check(sampling, make_logits(len(settings), vocab_size).to(dtype), batch, device)


@pytest.mark.parametrize("ties", [False, True])
def test_thousands_of_plain_draws_agree(device: torch.device, ties: bool) -> None:
    num_rows, vocab_size = 1024, 29
    logits, batch = make_logits(num_rows, vocab_size, ties=ties), make_batch([{}] * num_rows)
    identity = torch.eye(vocab_size)  # as head it gives the logits as they are, and a program draws for many rows
    on_device = [tensor.to(device) for tensor in (logits, identity, batch.floats, batch.ints)]
    tokens = head_draw.head_draw(on_device[0], dense(on_device[1]), None, *on_device[2:])
    assert torch.equal(tokens.cpu(), reference.sample(logits, batch).token_ids)


def test_has_filters_false_changes_no_plain_draw(device: torch.device) -> None:
    batch = with_extras(make_batch([{}, {"temperature": 0}, {"temperature": 2.0}]), 123)
    logits = make_logits(3, 123)
    assert_same(run(sampling, logits, batch, device, has_filters=False), reference.sample(logits, batch))


@pytest.mark.parametrize("scale", [0.0, 40.0, 1e38])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # to infinity, as the reference
def test_flat_steep_and_huge_logits_agree(device: torch.device, scale: float) -> None:
    settings = [SETTINGS[i] for i in (0, 2, 4, 5, 7, 9, 11)]
    logits = make_logits(len(settings), 200, scale=scale)
    logits[:, ::7] = -INF
    check(sampling, logits, make_batch(settings, num_logprobs=20), device)


def test_infinite_logits_are_legal_and_nan_or_nothing_gives_no_token(device: torch.device) -> None:
    rows = [[0.0, INF, -INF, INF], [-INF] * 4, [0.0, NAN, 1.0, 2.0], [0.0, -NAN, INF, 1.0], [-0.0, 0.0, -1.0, 0.0]]
    for setting in ({"temperature": 0}, {}, {"top_k": 3, "typical_p": 0.9, "top_p": 0.5, "min_p": 0.5}):
        batch = make_batch([setting] * len(rows), num_logprobs=2)
        logits = torch.tensor(rows)
        check(sampling, logits, batch, device)
        assert run(sampling, logits, batch, device).token_ids[:4].tolist() == [1, -1, -1, -1]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's view of what these values do
def test_impossible_parameters_neither_crash_nor_leave_the_vocabulary(device: torch.device) -> None:
    values = torch.tensor([NAN, -INF, 1e38])
    batch = make_batch([{"top_k": 5, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.9}] * 12)
    batch.floats[torch.arange(12), torch.arange(12) % 4] = values.repeat_interleave(4)
    batch.ints[:, TOP_K] = torch.tensor([-(2**63), 2**63 - 1, 0]).repeat(4)
    token_ids = run(sampling, make_logits(12, 33), batch, device).token_ids
    assert ((token_ids >= -1) & (token_ids < 33)).all()


def test_strided_logits_are_sampled_as_their_copy_and_left_alone(device: torch.device) -> None:
    wide = make_logits(4, 123)
    view, batch = wide[::2, 3:100], make_batch([{"top_p": 0.9}, {}], num_logprobs=2)
    before = wide.clone()
    check(sampling, view, batch, device)
    assert torch.equal(wide, before)


def test_no_rows_give_no_tokens(device: torch.device) -> None:
    empty = torch.empty(0, 5)
    assert run(sampling, empty, make_batch([]), device).token_ids.shape == (0,)


def check_filters(module: ModuleType, device: torch.device) -> None:
    """Small rows on which every part of the sampler decides: filters, ties, penalties, log-probabilities."""
    logits = make_logits(7, 123, ties=True)
    settings = [SETTINGS[i] for i in (3, 5, 7, 9, 11, 2, 0)]
    check(module, logits, with_extras(make_batch(settings, num_logprobs=3), 123), device)
    check(module, logits + 40.0, make_batch(settings, seed=5), device)


def check_wide(module: ModuleType, device: torch.device) -> None:
    """Rows of several tiles, with a NaN in one."""
    logits = make_logits(4, 2300)
    logits[3, 2200] = NAN
    check(module, logits, make_batch([{}, {"top_k": 30}, {"temperature": 0}, {}], num_logprobs=3), device)


def check_ties(module: ModuleType, device: torch.device) -> None:
    """Equal values, of which the lowest id wins; -0 equals +0."""
    rows = torch.tensor([[-1.0, -0.0, 0.0, -0.0], [1.0, 2.0, 2.0, 2.0], [-INF, -INF, 3.0, 3.0]])
    check(module, rows, make_batch([{"temperature": 0}] * 3), device)
    check(module, rows, make_batch([{"top_k": 1}] * 3), device)


def edges(index: int) -> Callable[[ModuleType, torch.device], None]:
    return lambda module, device: check_edges(module, device, EDGES[index])


MUTATIONS: dict[tuple[str, str, str], Callable[[ModuleType, torch.device], None]] = {
    ("sampling_math", "tl.where(x == 0.0, 0.0, x)", "x"): check_ties,
    ("sampling_math", "x - (presence + frequency", "x + (presence + frequency"): check_filters,
    ("sampling_math", "tl.interleave(w0, w2), tl.interleave(w1, w3)", "tl.interleave(w0, w1), tl.interleave(w2, w3)"): (
        check_wide
    ),
    ("sampling_math", "(ids ^ ID_MASK)", "ids"): check_ties,
    ("sampling", "inside & (z != z), NAN_TOKEN, tokens", "inside & (z != z), NO_TOKEN, tokens"): check_wide,
    ("sampling", "ids = tile * TILE", "ids = tile * (TILE // 2)"): check_wide,
    ("sampling_filters", "tl.sum(weight(d), axis=0)", "tl.sum(weight(d), axis=0) // 2"): edges(1),
    ("sampling_filters", "axis=0) - 1", "axis=0)"): edges(0),
    ("sampling_select", "-d - mean", "d - mean"): edges(3),
    ("sampling_select", "reached >= remaining", "reached > remaining"): edges(0),
    ("sampling_select", "lanes > chosen, reached", "lanes >= chosen, reached"): edges(1),
    ("sampling_select", "tl.where(share >= 1.0, share, 1.0)", "tl.where(share >= 1.0, share * 0.5, 1.0)"): edges(1),
    ("sampling_select", "(weight(d) >= floor)", "(weight(d) >= floor * 2)"): edges(2),
    ("sampling_select", "(tokens >= cut)", "(tokens > cut)"): edges(0),
    ("sampling_select", "(typical_order >= typical_cut)", "(typical_order >= 0)"): edges(3),
}


@pytest.mark.parametrize("checked", [check_filters, check_wide, check_ties])
def test_sampler_passes_the_checks_of_its_mutations(device: torch.device, checked: Callable[..., None]) -> None:
    checked(sampling, device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mistake may make NaN, and the check must see it
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_sampler_mutation_is_caught(mutation: Any, assert_caught: Callable[..., None], device: torch.device) -> None:
    checked = MUTATIONS[mutation]
    assert_caught("sampling", mutation, lambda module: checked(module, device))
