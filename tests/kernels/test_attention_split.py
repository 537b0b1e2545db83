"""How decode attention hands out its slots: every split of every sequence once, however the lengths are mixed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from inferneo_kernels.attention_decode import split_plan
from inferneo_kernels.attention_split import find_split


@triton.jit
def _list_splits(
    out_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    num_seqs,
    num_extra,
    CHUNK: tl.constexpr,
    FIXED: tl.constexpr,
    SEQ_TILE: tl.constexpr,
):
    slot = tl.program_id(0)
    seq, first_slot, chunk = find_split(
        slot, query_start_loc_ptr, seq_lens_ptr, num_seqs, num_extra, CHUNK, FIXED, 16, SEQ_TILE
    )
    tl.store(out_ptr + 3 * slot, seq)
    tl.store(out_ptr + 3 * slot + 1, slot - first_slot)
    tl.store(out_ptr + 3 * slot + 2, chunk)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("num_seqs", [1, 8, 9, 19])
def test_slots_hold_every_split_once(num_seqs: int, fixed: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(num_seqs)
    seq_lens = torch.randint(0, 100, (num_seqs,), generator=generator).int()
    query_lens = torch.randint(0, 3, (num_seqs,), generator=generator).int()
    seq_lens[0], query_lens[0] = 200, 1  # one long sequence among short ones
    starts = F.pad(query_lens.cumsum(0), (1, 0)).int()
    num_extra = 0 if fixed else 5
    num_slots = num_seqs * -(-200 // 32) if fixed else num_seqs + num_extra
    out = torch.empty(num_slots, 3, dtype=torch.int32, device=device)
    _list_splits[(num_slots,)](
        out, starts.to(device), seq_lens.to(device), num_seqs, num_extra, CHUNK=32, FIXED=fixed, SEQ_TILE=8
    )
    chunk = int(out[0, 2])
    assert chunk % 16 == 0 and (out[:, 2] == chunk).all()
    assert chunk == 32 or not fixed
    expected = [
        [seq, split]
        for seq, seq_len in enumerate(seq_lens.tolist())
        if query_lens[seq] == 1
        for split in range(max(1, -(-seq_len // chunk)))
    ]
    found = out[:, :2].tolist()
    assert found[: len(expected)] == expected
    assert all(seq == num_seqs for seq, _ in found[len(expected) :])


def test_split_plan_fills_the_chip_and_bounds_the_grid() -> None:
    one = split_plan(1, 1000, 8, 132, fixed=False)
    assert (one.num_slots, one.num_extra, one.chunk) == (8, 33, 128)  # 8 splits of 128 tokens; never more
    many = split_plan(32, 4096, 8, 132, fixed=False)
    assert (many.num_slots, many.num_extra) == (32 + 132, 132)
    assert split_plan(3, 1000, 8, 132, fixed=True).num_slots == 3 * 4
    assert split_plan(3, 0, 8, 132, fixed=True).num_slots == 3
