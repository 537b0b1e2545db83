"""Output head and draw in one kernel: the reference's tokens for dense and quantised heads, any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from inferneo_kernels import head_draw
from inferneo_kernels.quant_layout import FORMATS, Weight, dense, repack
from torch import Tensor

from inferneo_core.batch import (
    CHOICE,
    COUNT_ROW,
    FREQUENCY,
    INV_TEMPERATURE,
    POSITION,
    PRESENCE,
    PROMPT_BIT,
    REPETITION,
    SEED,
    SamplingBatch,
    empty_sampling_batch,
)
from inferneo_core.ops import torch_sampling as reference
from inferneo_core.ops.base import Linear, Norm, Segment
from inferneo_core.ops.torch_ops import TorchOps
from inferneo_core.ops.triton_ops import TritonOps
from inferneo_core.weights.dequant import dequantize

INF, NAN = float("inf"), float("nan")


def make_batch(num_seqs: int, vocab_size: int, extras: bool) -> SamplingBatch:
    """Rows that are greedy, plain and hot in turn; if `extras`, every other one with penalties, some with biases."""
    batch, rows = empty_sampling_batch(num_seqs), torch.arange(num_seqs)
    batch.floats[:, INV_TEMPERATURE] = torch.tensor([0.0, 1.0, 0.4])[rows % 3]
    batch.ints[:, SEED] = (rows + 1) * -7046029254386353131  # spreads them over 64 bits
    batch.ints[:, POSITION], batch.ints[:, CHOICE] = rows * 31 % 4096, rows % 3
    if not extras:
        return batch
    generator = torch.Generator().manual_seed(vocab_size)
    batch.floats[:, [REPETITION, PRESENCE, FREQUENCY]] = torch.tensor([2.0, 0.5, -0.25])
    batch.ints[::2, COUNT_ROW] = torch.arange(len(batch.ints[::2])).flip(0)
    counts = torch.randint(-3, 3, (num_seqs + 1, vocab_size), generator=generator, dtype=torch.int32).clamp(min=0)
    counts += PROMPT_BIT * (torch.rand(counts.shape, generator=generator) < 0.2).int()
    per_row = torch.tensor([9, 0, 12])[rows % 3]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), per_row.cumsum(0)]).int()
    ids = torch.randint(vocab_size, (int(starts[-1]),), generator=generator, dtype=torch.int32)
    values = torch.randint(-8, 17, (len(ids),), generator=generator) / 2
    values[::4], ids[1] = -INF, ids[2]
    # Counts from the second row on: a row without penalties that reads them finds the first.
    return replace(batch, token_counts=counts[1:], bias_start=starts, bias_ids=ids, bias_values=values)


def draw(
    module: ModuleType, x: Tensor, weight: Weight, bias: Tensor | None, batch: SamplingBatch, device: torch.device
) -> Tensor:
    tensors = (batch.floats, batch.ints, batch.token_counts, batch.bias_start, batch.bias_ids, batch.bias_values)
    moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
    tokens: Tensor = module.head_draw(x.to(device), weight, None if bias is None else bias.to(device), *moved)
    return tokens.cpu()


def check_dense(
    module: ModuleType, device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, extras: bool
) -> None:
    """Against the reference on the same product in fp64, whose scores are too far apart for rounding to matter."""
    num_seqs, vocab_size, hidden_size = shape
    generator = torch.Generator().manual_seed(vocab_size)
    x = torch.randn(num_seqs, hidden_size, generator=generator).to(dtype)
    weight = (torch.randn(vocab_size, hidden_size, generator=generator) * 0.4).to(dtype)
    bias = torch.randn(vocab_size, generator=generator).to(dtype) if extras else None
    batch = make_batch(num_seqs, vocab_size, extras)
    logits = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    expected = reference.sample(logits.float(), batch).token_ids
    assert torch.equal(draw(module, x, dense(weight.to(device)), bias, batch, device), expected)


@pytest.mark.parametrize(
    ("dtype", "extras"), [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("shape", [(1, 300, 48), (5, 123, 80), (33, 130, 64), (70, 9, 16)], ids=str)
def test_dense_head_draws_the_references_tokens(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, extras: bool
) -> None:
    check_dense(head_draw, device, shape, dtype, extras)


# Where a block's fp16 scales stand, and a power of two for them that makes logits of ordinary size.
SCALES = {
    "Q4_0": ([0], 2.0**-6),
    "Q4_1": ([0, 2], 2.0**-6),
    "Q5_0": ([0], 2.0**-7),
    "Q5_1": ([0, 2], 2.0**-7),
    "Q8_0": ([0], 2.0**-10),
    "Q4_K": ([0, 2], 2.0**-11),
    "Q5_K": ([0, 2], 2.0**-12),
    "Q6_K": ([208], 2.0**-14),
}


def exact_rows(quant_type: str, num_rows: int, in_features: int, generator: torch.Generator) -> Tensor:
    """Rows of random codes [num_rows, bytes] uint8 under scales that are powers of two: every product with small
    integers is exact in fp32, and so is their sum in any order. The second half of the rows repeats the first."""
    layout = FORMATS[quant_type]
    shape = (num_rows, in_features // layout.block_size, layout.type_size)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    offsets, size = SCALES[quant_type]
    for offset in offsets:
        signs = torch.randint(0, 2, (*shape[:2], 1), generator=generator) * 2 - 1
        blocks[:, :, offset : offset + 2] = (signs * size).half().view(torch.uint8)
    half = num_rows // 2
    blocks[num_rows - half :] = blocks[:half]
    return blocks.view(num_rows, -1)


def check_quantised(
    module: ModuleType, device: torch.device, quant_type: str, num_seqs: int, extras: bool = True
) -> None:
    """Logits that are equal to the bit, many of them to one another: the draw has no excuse."""
    for seed in range(4 if num_seqs == 1 else 2 if num_seqs < 16 else 1):
        check_seed(module, device, quant_type, num_seqs, extras, seed)


def check_seed(
    module: ModuleType, device: torch.device, quant_type: str, num_seqs: int, extras: bool, seed: int
) -> None:
    vocab_size, in_features = 75, 256
    generator = torch.Generator().manual_seed(seed)
    rows = exact_rows(quant_type, vocab_size, in_features, generator)
    x = torch.randint(-2, 3, (num_seqs, in_features), generator=generator).float()
    bias = torch.randint(-4, 5, (vocab_size,), generator=generator) / 2 if extras else None
    batch = make_batch(num_seqs, vocab_size, extras)
    logits = x.double() @ dequantize(rows, quant_type).double().T + (0.0 if bias is None else bias.double())
    assert torch.equal(logits, logits.float().double())
    expected = reference.sample(logits.float(), batch).token_ids
    assert torch.equal(draw(module, x, repack(rows.to(device), quant_type), bias, batch, device), expected)


@pytest.mark.parametrize(("num_seqs", "extras"), [(1, False), (5, True), (18, False)])
@pytest.mark.parametrize("quant_type", FORMATS)
def test_quantised_head_draws_the_references_tokens(
    device: torch.device, quant_type: str, num_seqs: int, extras: bool
) -> None:
    check_quantised(head_draw, device, quant_type, num_seqs, extras)


@pytest.mark.parametrize("quant_type", ["Q4_K", "Q6_K"])
def test_quantised_head_draws_for_more_rows_than_a_program_holds(device: torch.device, quant_type: str) -> None:
    check_quantised(head_draw, device, quant_type, 70)


@pytest.mark.parametrize("num_seqs", [1, 3])
@pytest.mark.parametrize("quant_type", ["", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_ties_go_to_the_lowest_id(device: torch.device, quant_type: str, num_seqs: int) -> None:
    """Every row of the head is the same, so every logit is."""
    generator = torch.Generator().manual_seed(5)
    row = exact_rows(quant_type, 1, 256, generator) if quant_type else torch.ones(1, 256)
    rows = row.expand(75, -1).contiguous().to(device)
    weight = repack(rows, quant_type) if quant_type else dense(rows)
    x = torch.randint(-2, 3, (num_seqs, 256), generator=generator).float()
    assert draw(head_draw, x, weight, None, empty_sampling_batch(num_seqs), device).tolist() == [0] * num_seqs
    forbidden = replace(
        empty_sampling_batch(num_seqs),
        bias_start=torch.arange(num_seqs + 1, dtype=torch.int32) * 64,
        bias_ids=torch.arange(64, dtype=torch.int32).repeat(num_seqs),
        bias_values=torch.full((64 * num_seqs,), -INF),
    )
    assert draw(head_draw, x, weight, None, forbidden, device).tolist() == [64] * num_seqs


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of a NaN
def test_nan_or_nothing_to_draw_gives_no_token(device: torch.device) -> None:
    x = torch.tensor([[1.0] * 16, [NAN] + [0.0] * 15, [1.0] * 16])
    batch = make_batch(3, 9, extras=False)
    bias = torch.full((9,), -INF)
    weight = dense(torch.ones(9, 16, device=device))
    assert draw(head_draw, x, weight, bias, batch, device).tolist() == [-1, -1, -1]
    assert draw(head_draw, x, weight, None, batch, device).tolist()[1] == -1
    assert draw(head_draw, x[:0], weight, None, make_batch(0, 9, extras=False), device).tolist() == []


@pytest.mark.parametrize("num_seqs", [1, 3])
@pytest.mark.parametrize("quant_type", ["", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_verb_writes_no_logits_of_plain_rows(
    device: torch.device, quant_type: str, num_seqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither half of `next_tokens`, with the logits between them, is called."""
    generator = torch.Generator().manual_seed(3)
    columns = 256
    dense_rows = torch.randn(61, columns, generator=generator) * 0.1
    rows = exact_rows(quant_type, 61, columns, generator) if quant_type else dense_rows
    head, norm = Linear((Segment(rows.to(device), quant_type),), columns), Norm(torch.ones(columns).to(device), 1e-5)
    x = torch.randn(5, columns, generator=generator).to(device)
    chosen, batch = torch.tensor([4, 1, 3][:num_seqs], device=device), make_batch(num_seqs, 61, extras=False)
    batch = replace(batch, has_filters=False).to(device)
    torch_ops, triton_ops = TorchOps(torch.float32, device), TritonOps(torch.float32, device)
    expected = torch_ops.next_tokens(x, norm, torch_ops.prepare(head), chosen, batch).token_ids
    prepared = triton_ops.prepare(head)
    for half in ("lm_head", "sample"):
        monkeypatch.delattr(TritonOps, half)
    assert torch.equal(triton_ops.next_tokens(x, norm, prepared, chosen, batch).token_ids, expected)


# A mistake, and the head (format, number of rows) whose check must see it.
MUTATIONS: dict[tuple[str, str, str], tuple[str, int]] = {
    ("head_draw", "(tile * STEPS + step) * BLOCK_N", "(tile + step) * BLOCK_N"): ("Q4_K", 1),
    ("head_draw", "tl.maximum(best, best_token(z, scores, ids, inside))", "best_token(z, scores, ids, inside)"): (
        ("Q6_K", 1)
    ),
    ("head_draw", "first_id // 4 + ", "0 + "): ("Q4_K", 5),
    ("head_draw", "tl.where(row == seq, ids, -1)", "tl.where(row >= seq, ids, -1)"): ("Q8_0", 5),
    ("head_draw", "tl.minimum(first_seq + BLOCK_M, num_seqs)", "tl.minimum(BLOCK_M, num_seqs)"): ("Q4_K", 70),
    ("head_draw", "inside & (count_row >= 0)", "inside"): ("Q4_0", 5),
    ("head_draw", "% seq_tiles * BLOCK_M", "% seq_tiles"): ("Q4_0", 70),
    ("quant_decode", "words >> (LOW_BITS * INDEX - PLACE)", "words >> (LOW_BITS * INDEX)"): ("Q4_0", 1),
    ("quant_decode", "half_of(pair, False), half_of(pair, True)", "half_of(pair, True), half_of(pair, False)"): (
        ("Q4_1", 5)
    ),
    ("quant_decode", "blocks * 2 + PART", "blocks * 2"): ("Q6_K", 1),
    ("quant_decode", "quads // 2 if BITS == 8 else quads", "quads"): ("Q8_0", 1),
    ("quant_decode", "shift = -half_of(pair, True)", "shift = half_of(pair, True)"): ("Q4_K", 1),
    ("linear_tile", "shift * tl.sum(sums, axis=2)", "shift * 2.0 * tl.sum(sums, axis=2)"): ("Q4_1", 1),
}


@pytest.mark.parametrize(("quant_type", "num_seqs"), sorted(set(MUTATIONS.values())))
def test_head_draw_passes_the_checks_of_its_mutations(device: torch.device, quant_type: str, num_seqs: int) -> None:
    check_quantised(head_draw, device, quant_type, num_seqs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mistake may make NaN, and the check must see it
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_head_draw_mutation_is_caught(mutation: Any, assert_caught: Callable[..., None], device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("a mutated kernel may read outside its tensors; the interpreter run covers it")
    quant_type, num_seqs = MUTATIONS[mutation]
    assert_caught("head_draw", mutation, lambda module: check_quantised(module, device, quant_type, num_seqs))
