"""Attention: decode by bandwidth, prefill by TFLOP/s, beside torch's own attention on a gathered cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from gpu.measure import copy_bandwidth, microseconds, relative_error, require, write
from inferneo_kernels.attention import attention, attention_workspace
from torch import Tensor

NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE = 32, 8, 16


def paged(num_seqs: int, seq_len: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """k and v caches, and block tables that scatter the sequences over them."""
    per_seq = -(-seq_len // BLOCK_SIZE)
    shape = (num_seqs * per_seq, NUM_KV_HEADS, BLOCK_SIZE, head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    order = torch.randperm(num_seqs * per_seq, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    return k, v, order.to(torch.int32).view(num_seqs, per_seq)


def gathered(side: Tensor, tables: Tensor, seq_len: int) -> Tensor:
    """[num_seqs, num_heads, seq_len, head_dim]"""
    pages = side[tables.long()].transpose(1, 2).flatten(2, 3)[:, :, :seq_len]
    return pages.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 1).contiguous()


def measure(num_seqs: int, query_len: int, seq_len: int, head_dim: int, bandwidth: float) -> dict[str, Any]:
    k, v, tables = paged(num_seqs, seq_len, head_dim)
    q = torch.randn(num_seqs * query_len, NUM_HEADS, head_dim, device="cuda", dtype=torch.bfloat16)
    starts = torch.arange(0, num_seqs * query_len + 1, query_len, dtype=torch.int32, device="cuda")
    lens = torch.full((num_seqs,), seq_len, dtype=torch.int32, device="cuda")
    workspace = attention_workspace(num_seqs, NUM_HEADS, q.device)

    def run() -> Tensor:
        return attention(q, k, v, starts, lens, tables, query_len, seq_len, workspace=workspace)

    dense_q = q.view(num_seqs, query_len, NUM_HEADS, head_dim).transpose(1, 2).contiguous()
    dense_k, dense_v = (gathered(side, tables, seq_len) for side in (k, v))

    def torch_attention() -> Tensor:
        return F.scaled_dot_product_attention(dense_q, dense_k, dense_v, is_causal=query_len > 1)

    expected = torch_attention().transpose(1, 2).reshape(num_seqs * query_len, -1)
    error = relative_error(run(), expected)
    require(error < 1e-2, f"{num_seqs} x {query_len} of {seq_len}: it differs from torch's by {error:.1e}")
    ours, theirs = microseconds(run), microseconds(torch_attention)
    result: dict[str, Any] = {"num_seqs": num_seqs, "query_len": query_len, "seq_len": seq_len, "head_dim": head_dim}
    result |= {"us": round(ours, 2), "torch_sdpa_us": round(theirs, 2)}
    if query_len == 1:
        gb_s = 2 * num_seqs * seq_len * NUM_KV_HEADS * head_dim * 2 / ours / 1e3
        return {**result, "gb_s": round(gb_s, 1), "share_of_floor": round(gb_s / bandwidth, 3)}
    flop = 4 * num_seqs * query_len * (seq_len - query_len / 2) * head_dim * NUM_HEADS
    return {**result, "tflop_s": round(flop / ours / 1e6, 1), "torch_sdpa_tflop_s": round(flop / theirs / 1e6, 1)}


def main() -> None:
    bandwidth = copy_bandwidth()
    cases = [
        (1, 1, 1024),
        (1, 1, 8192),
        (32, 1, 4096),
        (64, 1, 1024),
        (1, 2048, 2048),
        (1, 8192, 8192),
        (4, 2048, 2048),
    ]
    rows = [measure(*case, head_dim, bandwidth) for head_dim in (64, 128) for case in cases]
    write(copy_gb_s=round(bandwidth, 1), rows=rows)


if __name__ == "__main__":
    main()
