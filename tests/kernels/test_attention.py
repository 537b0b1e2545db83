"""Attention over the paged cache: the prefill and the decode kernel against SDPA in fp64 and against TorchOps.

The cache of every case is full of NaN but for the tokens that its sequences hold, and their blocks are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inferneo_kernels import attention as dispatch, attention_decode as decode, attention_prefill as prefill
from torch import Tensor

from inferneo_core.batch import AttentionMetadata
from inferneo_core.ops.base import CacheLayer
from inferneo_core.ops.torch_ops import TorchOps

NAN = float("nan")
SMALL_TILE = prefill.PrefillConfig(block_m=16, block_n=16, num_warps=4, num_stages=2)
SMALL_DECODE = decode.DecodeConfig(block_n=16, num_warps=4, num_stages=2, seq_tile=2)
HEADS = {"mha": (2, 2), "gqa": (4, 2), "gqa3": (9, 3), "mqa": (5, 1), "mqa20": (20, 1)}  # 20 do not fit in 16 rows


@dataclass(frozen=True)
class Case:
    """A batch: what the kernels are given, in their order."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.query_start_loc, self.seq_lens, self.block_tables

    @property
    def query_lens(self) -> Tensor:
        return self.query_start_loc.diff()

    @property
    def bounds(self) -> tuple[int, int]:
        return int(self.query_lens.max()), int(self.seq_lens.max())

    def empty_out(self) -> Tensor:
        return torch.full_like(self.q.flatten(1), NAN)


def make_case(
    lens: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    num_padding: int = 0,
    seed: int = 0,
) -> Case:
    """Sequences of (query_len, seq_len), and tokens that belong to none behind them."""
    generator = torch.Generator().manual_seed(seed)
    (num_heads, num_kv_heads), num_seqs = heads, len(lens)
    num_tokens = sum(query_len for query_len, _ in lens) + num_padding
    max_blocks = max(1, -(-max(seq_len for _, seq_len in lens) // block_size))
    tables = torch.randperm(num_seqs * max_blocks, generator=generator).view(num_seqs, max_blocks).int()
    cache = torch.full((2, num_seqs * max_blocks, num_kv_heads, block_size, head_dim), NAN)
    for table, (_, seq_len) in zip(tables, lens, strict=True):
        slots = torch.arange(seq_len)
        blocks = table[slots // block_size].long()
        cache[:, blocks, :, slots % block_size] = torch.randn(seq_len, 2, num_kv_heads, head_dim, generator=generator)
        table[-(-seq_len // block_size) :] = 0
    starts = torch.tensor([0] + [query_len for query_len, _ in lens]).cumsum(0).int()
    q = 2 * torch.randn(num_tokens, num_heads, head_dim, generator=generator)
    cache = cache.to(cache_dtype or dtype)
    seq_lens = torch.tensor([seq_len for _, seq_len in lens], dtype=torch.int32)
    return Case(*(tensor.to(device) for tensor in (q.to(dtype), cache[0], cache[1], starts, seq_lens, tables)))


def oracle(case: Case) -> Tensor:
    """torch's own attention, in fp64, a sequence at a time; zeros for a sequence without keys, NaN for padding."""
    num_tokens, num_heads, head_dim = case.q.shape
    out = torch.full((num_tokens, num_heads, head_dim), NAN, dtype=torch.float64)
    starts = case.query_start_loc.tolist()
    for seq, seq_len in enumerate(case.seq_lens.tolist()):
        start, end = starts[seq], starts[seq + 1]
        if not seq_len:
            out[start:end] = 0
            continue
        blocks = case.block_tables[seq].long()
        k, v = (
            side[blocks].transpose(0, 1).flatten(1, 2)[:, :seq_len].cpu().double()
            for side in (case.k_cache, case.v_cache)
        )
        visible = torch.arange(seq_len) <= torch.arange(seq_len - (end - start), seq_len)[:, None]
        q = case.q[start:end].transpose(0, 1).cpu().double()
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible, enable_gqa=True)
        out[start:end] = attended[0].transpose(0, 1)
    return out.flatten(1)


def assert_right(out: Tensor, case: Case) -> None:
    """Padding is untouched; fp32 is right to 1e-5, a lower precision to twice the error of TorchOps."""
    expected, out = oracle(case), out.cpu()
    padding = expected.isnan()
    assert torch.equal(out.isnan(), padding)
    expected, out = expected[~padding], out.double()[~padding]
    error = (out - expected).abs().max().item() if len(out) else 0.0
    if case.q.dtype == torch.float32:
        assert error <= 1e-5, error
    else:
        metadata = AttentionMetadata(*case.tensors[3:], *case.bounds)
        reference = TorchOps().attention(case.q, CacheLayer(case.k_cache, case.v_cache), metadata).cpu().double()
        # Triton's interpreter cuts bf16 off where a chip rounds it: a whole unit in the last place, hence the tenth.
        assert error <= 2.1 * (reference[~padding] - expected).abs().max().item(), error


def run_prefill(case: Case, config: prefill.PrefillConfig | None = SMALL_TILE, module: Any = prefill) -> Tensor:
    out = case.empty_out()
    module.attention_prefill(out, *case.tensors, config=config)
    return out


def run_decode(
    case: Case, plan: decode.SplitPlan, config: decode.DecodeConfig = SMALL_DECODE, module: Any = decode
) -> Tensor:
    out = case.empty_out()
    counters = dispatch.attention_workspace(len(case.seq_lens), case.q.shape[1], case.q.device)
    module.attention_decode(out, *case.tensors, counters, plan, config)
    assert not counters.any()  # ready for the next launch
    return out


def extra_plan(num_seqs: int, num_extra: int, chunk: int = 16) -> decode.SplitPlan:
    return decode.SplitPlan(num_seqs + num_extra, num_extra, chunk, fixed=False)


def fixed_plan(case: Case, chunk: int = 32) -> decode.SplitPlan:
    return decode.SplitPlan(len(case.seq_lens) * max(1, -(-case.bounds[1] // chunk)), 0, chunk, fixed=True)


def run(kernel: str, case: Case) -> Tensor:
    """What a kernel makes of a case; decode with both ways to split and to merge."""
    if kernel == "prefill":
        return run_prefill(case)
    out = run_decode(case, extra_plan(len(case.seq_lens), 6))
    assert_right(run_decode(case, fixed_plan(case), replace(SMALL_DECODE, fused_merge=False)), case)
    return out


def lens_for(kernel: str, ragged: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return ragged if kernel == "prefill" else [(1, seq_len) for _, seq_len in ragged]


both_kernels = pytest.mark.parametrize("kernel", ["prefill", "decode"])


@both_kernels
@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
def test_every_head_layout_is_right(heads: tuple[int, int], kernel: str, device: torch.device) -> None:
    prompts_chunks_and_decodes = [(5, 5), (1, 23), (17, 40), (3, 64), (1, 1), (33, 33)]
    case = make_case(lens_for(kernel, prompts_chunks_and_decodes), heads, device=device)
    assert_right(run(kernel, case), case)


@both_kernels
@pytest.mark.parametrize("head_dim", [2, 16, 64, 80, 96, 128, 256])
def test_every_head_dim_is_right(head_dim: int, kernel: str, device: torch.device) -> None:
    case = make_case(lens_for(kernel, [(7, 30), (18, 18)]), head_dim=head_dim, device=device)
    assert_right(run(kernel, case), case)


@both_kernels
@pytest.mark.parametrize("block_size", [1, 3, 16, 32, 1024])
def test_every_block_size_is_right(block_size: int, kernel: str, device: torch.device) -> None:
    case = make_case(lens_for(kernel, [(7, 53), (18, 18)]), block_size=block_size, device=device)
    assert_right(run(kernel, case), case)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
)
@both_kernels
def test_every_dtype_is_right(kernel: str, dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device) -> None:
    lens = lens_for(kernel, [(7, 53), (18, 18)])
    case = make_case(lens, head_dim=64, dtype=dtype, cache_dtype=cache_dtype, device=device)
    assert_right(run(kernel, case), case)


def test_prefill_leaves_padding_alone(device: torch.device) -> None:
    case = make_case([(0, 0), (3, 9), (2, 0), (0, 7), (4, 4), (0, 0)], num_padding=5, device=device)
    assert_right(run_prefill(case), case)


def test_prefill_skips_decodes_when_told(device: torch.device) -> None:
    case = make_case([(1, 9), (3, 9), (1, 4)], device=device)
    out = case.empty_out()
    prefill.attention_prefill(out, *case.tensors, skip_single=True, config=SMALL_TILE)
    assert out.isnan().all(1).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("chip", [80, 90, 120])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_prefill_tiles_are_right_at_their_own_size(chip: int, head_dim: int, device: torch.device) -> None:
    case = make_case([(70, 150)], heads=(3, 1), head_dim=head_dim, block_size=16, device=device)
    assert_right(run_prefill(case, prefill.prefill_config(head_dim, device.type == "cuda", chip)), case)


def test_prefill_does_not_depend_on_chunks_or_neighbours(device: torch.device) -> None:
    whole = make_case([(45, 45)], device=device)
    out = run_prefill(whole)
    part = Case(whole.q[19:], *whole.tensors[1:3], torch.tensor([0, 26]).int().to(device), *whole.tensors[4:])
    assert torch.equal(run_prefill(part), out[19:])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "two_launches"])
def test_decode_leaves_padding_and_prompts_alone(fused: bool, device: torch.device) -> None:
    case = make_case([(0, 0), (1, 50), (1, 0), (0, 7), (1, 4), (0, 0)], num_padding=3, device=device)
    config = replace(SMALL_DECODE, fused_merge=fused)
    assert_right(run_decode(case, extra_plan(6, 3), config), case)
    mixed = make_case([(1, 50), (3, 9), (1, 4)], device=device)
    out = run_decode(mixed, extra_plan(3, 3), config)
    assert out.isnan().all(1).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("head_dim", [16, 128, 256])
def test_decode_tiles_are_right_at_their_own_size(head_dim: int, device: torch.device) -> None:
    case = make_case([(1, 300), (1, 5)], heads=(6, 2), head_dim=head_dim, block_size=16, device=device)
    config = decode.decode_config(head_dim, fp32=device.type == "cuda")
    assert_right(run_decode(case, decode.split_plan(2, 300, 2, 4, fixed=False), config), case)


def test_decode_bits_do_not_depend_on_the_batch_when_invariant(device: torch.device) -> None:
    lens = [(1, 520), (6, 20), (1, 257), (1, 3)]
    case = make_case(lens, device=device)
    out = dispatch.attention(*case.tensors, *case.bounds, batch_invariant=True)
    assert_right(out, case)
    for seq, token in ((0, 0), (2, 7), (3, 8)):
        rows = slice(seq, seq + 1)
        alone = (case.q[token : token + 1], case.k_cache, case.v_cache, torch.tensor([0, 1]).int().to(device))
        single = dispatch.attention(
            *alone, case.seq_lens[rows], case.block_tables[rows], 1, lens[seq][1], batch_invariant=True
        )
        assert torch.equal(single[0], out[token])


def test_attention_chooses_the_kernels_by_query_length(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def spy(name: str) -> None:
        launcher: Callable[..., None] = getattr(dispatch, name)

        def launch(*args: Any, **kwargs: Any) -> None:
            launched.append(name)
            launcher(*args, **kwargs)

        monkeypatch.setattr(dispatch, name, launch)

    spy("attention_prefill")
    spy("attention_decode")
    expected = {
        ((1, 9), (1, 40)): ["attention_decode"],
        ((4, 9), (4, 4)): ["attention_prefill"],
        ((4, 9),): ["attention_prefill"],
        ((4, 9), (1, 40)): ["attention_prefill", "attention_decode"],
    }
    for lens, names in expected.items():
        case = make_case(list(lens), device=device)
        launched.clear()
        assert_right(dispatch.attention(*case.tensors, *case.bounds), case)
        assert launched == names


def test_attention_reads_strided_queries_and_caches(device: torch.device) -> None:
    case = make_case([(1, 19), (5, 30)], device=device)
    q = torch.full((6, 12, 16), NAN, device=device)
    q[:, 3:7] = case.q
    cache = torch.stack([case.k_cache, case.v_cache], dim=1)  # keys and values of a block beside one another
    strided = Case(q[:, 3:7], cache[:, 0], cache[:, 1], *case.tensors[3:])
    assert_right(dispatch.attention(*strided.tensors, *strided.bounds), strided)


@pytest.mark.parametrize("query_len", [1, 5])
def test_attention_reaches_past_two_billion_elements(query_len: int, device: torch.device) -> None:
    case = make_case([(query_len, 35)], block_size=16, dtype=torch.float16, device=device)
    stride = 2**30 + 16  # elements a block: the third begins past 2**31. Only pages that are touched take memory
    far = torch.empty(2 * stride + 2**20, dtype=torch.float16, device=device)
    k_cache, v_cache = (
        far[offset:].as_strided(cache.shape, (stride, *cache.stride()[1:])).copy_(cache)
        for offset, cache in ((0, case.k_cache), (2**19, case.v_cache))
    )
    distant = Case(case.q, k_cache, v_cache, *case.tensors[3:])
    assert_right(dispatch.attention(*distant.tensors, *distant.bounds), distant)


PREFILL_MUTATIONS = [
    ("attention_tile", "tokens[None, :] <= positions[:, None]", "tokens[None, :] < positions[:, None]"),
    ("attention_tile", "tokens[None, :] <= positions[:, None]", "tokens[None, :] <= positions[:, None] + 1"),
    ("attention_tile", "row_sum * rescale +", "row_sum +"),
    ("attention_tile", "acc * rescale[:, None]", "acc"),
    ("attention_tile", "v = load_tile(v_ptr, rows, tokens < seq_len,", "v = load_tile(v_ptr, rows, tokens <= seq_len,"),
    ("attention_tile", "% BLOCK_SIZE\n", "% BLOCK_SIZE * 0\n"),
    ("attention_tile", "block_table_ptr + tokens // BLOCK_SIZE", "block_table_ptr + 0 * tokens // BLOCK_SIZE"),
    ("attention_prefill", "kv_head = (tl.program_id(0) * PACK // GROUP)", "kv_head = (tl.program_id(0) * 0 // GROUP)"),
    ("attention_prefill", "first_position = seq_len - query_len + tile_start", "first_position = tile_start"),
    ("attention_prefill", "tl.maximum(first_position + 1, 0)", "tl.maximum(first_position + BLOCK_N, 0)"),
    ("attention_prefill", "end = tl.minimum(first_position + BLOCK_Q, seq_len)", "end = seq_len - seq_len"),
    ("attention_prefill", "seq.to(tl.int64) * stride_table", "seq.to(tl.int64) * 0"),
    ("attention_prefill", "(query < query_len) & ", ""),
    ("attention_prefill", "LOG2E / math.sqrt(head_dim)", "1 / math.sqrt(head_dim)"),
    ("attention_prefill", "            pages = next_pages\n", ""),
]


@pytest.fixture(scope="module")
def check_prefill(device: torch.device) -> Callable[[Any], None]:
    case = make_case([(5, 5), (1, 23), (17, 40)], num_padding=8, device=device)  # room for a tile that runs over
    return lambda module: assert_right(run_prefill(case, module.PrefillConfig(16, 16, 4, 2), module), case)


def test_prefill_passes_the_check_of_its_mutations(check_prefill: Callable[[Any], None]) -> None:
    check_prefill(prefill)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mistake may make NaN, and the check must see it
@pytest.mark.parametrize("mutation", PREFILL_MUTATIONS, ids=str)
def test_prefill_mutation_is_caught(mutation: Any, assert_caught: Any, check_prefill: Callable[[Any], None]) -> None:
    assert_caught("attention_prefill", mutation, check_prefill)


DECODE_MUTATIONS = [
    ("attention_tile", "tokens[None, :] <= positions[:, None]", "tokens[None, :] < positions[:, None]"),
    ("attention_tile", "row_sum * rescale +", "row_sum +"),
    ("attention_decode", "kv_head = (first_head // GROUP)", "kv_head = (first_head // GROUP * 0)"),
    ("attention_decode", "tl.cdiv(tl.cdiv(seq_len, num_splits), BLOCK_N) * BLOCK_N", "BLOCK_N"),
    ("attention_decode", "cells = slot.to(tl.int64)", "cells = split.to(tl.int64)"),
    (
        "attention_decode",
        "start + (end - start) // BLOCK_N * BLOCK_N",
        "start + tl.cdiv(end - start, BLOCK_N) * BLOCK_N",
    ),
    ("attention_decode", "if arrived == num_splits - 1:", "if arrived == num_splits - 2:"),
    ("attention_decode", "tl.store(counter_ptr, 0)", "tl.store(counter_ptr, 1)"),
    ("attention_decode", "seq * tl.num_programs(1) + tl.program_id(1)", "seq * 0"),
    ("attention_decode", "LOG2E / math.sqrt(head_dim)", "1 / math.sqrt(head_dim)"),
    ("attention_split", "tl.maximum(tl.cdiv(seq_lens, chunk), 1)", "tl.cdiv(seq_lens, chunk)"),
    ("attention_split", "first_slot += ", "first_slot = "),
    ("attention_split", "acc * rescale[:, None] + ", "acc + "),
    ("attention_split", "tl.sum(weights * sums, 0)", "tl.sum(sums, 0)"),
    ("attention_split", "end - begin == 1", "end - begin >= 1"),
]


@pytest.fixture(scope="module")
def check_decode(device: torch.device) -> Callable[[Any], None]:
    case = make_case([(1, 100), (0, 7), (1, 0), (1, 160), (1, 5)], (32, 2), 64, device=device)  # 2 splits a merge
    mixed = make_case([(2, 2), (1, 9)], device=device)

    def check(module: Any) -> None:
        config, plan = module.DecodeConfig(16, 4, 2, seq_tile=2), module.SplitPlan(15, 10, 16, fixed=False)
        assert_right(run_decode(case, plan, config, module), case)
        assert run_decode(mixed, plan, config, module)[:2].isnan().all()

    return check


def test_decode_passes_the_check_of_its_mutations(check_decode: Callable[[Any], None]) -> None:
    check_decode(decode)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutation", DECODE_MUTATIONS, ids=str)
def test_decode_mutation_is_caught(mutation: Any, assert_caught: Any, check_decode: Callable[[Any], None]) -> None:
    assert_caught("attention_decode", mutation, check_decode)
