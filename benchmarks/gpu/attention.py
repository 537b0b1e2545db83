"""Attention: decode by bandwidth, prefill by TFLOP/s, beside torch's own attention and FlexAttention.

The peers read the cache as one contiguous tensor, gathered beforehand: that costs them nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from inferneo_benchmarks.gpu.measure import copy_bandwidth, microseconds, relative_error, require, write
from inferneo_kernels.attention import attention, attention_workspace
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Problem:
    """num_seqs sequences alike: query_len new tokens each, seq_len in the cache with them."""

    num_seqs: int
    query_len: int
    seq_len: int
    head_dim: int
    num_kv_heads: int = 8
    num_heads: int = 32

    @property
    def num_bytes(self) -> int:
        """Keys and values in bf16, read once."""
        return 2 * 2 * self.num_seqs * self.seq_len * self.num_kv_heads * self.head_dim

    @property
    def num_flops(self) -> int:
        """Multiplications and additions of what the causal mask leaves."""
        pairs = self.query_len * self.seq_len - self.query_len * (self.query_len - 1) // 2
        return 4 * self.num_seqs * pairs * self.head_dim * self.num_heads


SIZES = ((1, 1, 1024), (1, 1, 8192), (32, 1, 4096), (64, 1, 1024), (1, 2048, 2048), (1, 8192, 8192), (4, 2048, 2048))
PROBLEMS = (
    *(Problem(*size, head_dim) for head_dim in (64, 128) for size in SIZES),
    Problem(1, 16384, 16384, 128),
    Problem(1, 512, 8192, 128),  # a chunk of a long prompt
    Problem(32, 1, 4096, 128, num_kv_heads=32),  # MHA
)


class Inputs:
    """A problem's tensors: paged and scattered as the kernels have them, and gathered as torch wants them."""

    def __init__(self, problem: Problem) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        options: dict[str, Any] = {"device": "cuda", "generator": generator}
        num_seqs, per_seq = problem.num_seqs, -(-problem.seq_len // BLOCK_SIZE)
        shape = (num_seqs * per_seq, problem.num_kv_heads, BLOCK_SIZE, problem.head_dim)
        self.k, self.v = (torch.randn(shape, dtype=torch.bfloat16, **options) for _ in range(2))
        self.tables = torch.randperm(shape[0], **options).to(torch.int32).view(num_seqs, per_seq)
        heads = (num_seqs * problem.query_len, problem.num_heads, problem.head_dim)
        self.q = torch.randn(heads, dtype=torch.bfloat16, **options)
        self.starts = torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda") * problem.query_len
        self.lens = torch.full((num_seqs,), problem.seq_len, dtype=torch.int32, device="cuda")
        queries = self.q.view(num_seqs, problem.query_len, *heads[1:]).transpose(1, 2).contiguous()
        keys, values = (
            side[self.tables.long()].transpose(1, 2).flatten(2, 3)[:, :, : problem.seq_len].contiguous()
            for side in (self.k, self.v)
        )
        self.gathered = queries, keys, values  # [num_seqs, heads, tokens, head_dim]


def ours(problem: Problem, inputs: Inputs, *, batch_invariant: bool = False) -> Callable[[], Tensor]:
    workspace = attention_workspace(problem.num_seqs, problem.num_heads, inputs.q.device)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.starts, inputs.lens, inputs.tables)
    sizes = (problem.query_len, problem.seq_len)
    return lambda: attention(*tensors, *sizes, workspace=workspace, batch_invariant=batch_invariant)


def torch_sdpa(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    whole = problem.query_len == problem.seq_len
    mask = None if whole or problem.query_len == 1 else causal_lower_right(problem.query_len, problem.seq_len)
    return lambda: F.scaled_dot_product_attention(*inputs.gathered, attn_mask=mask, is_causal=whole, enable_gqa=True)


def torch_flex(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    offset = problem.seq_len - problem.query_len

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + offset >= key

    mask = create_block_mask(visible, None, None, problem.query_len, problem.seq_len, device="cuda")
    compiled: Any = torch.compile(flex_attention)
    return lambda: compiled(*inputs.gathered, block_mask=mask, enable_gqa=True)


def flex_microseconds(problem: Problem, inputs: Inputs) -> float | str:
    """Time of FlexAttention, or why it did not run: what a peer cannot do is a fact about the peer."""
    try:
        return round(microseconds(torch_flex(problem, inputs)), 2)
    except Exception as error:
        return f"did not run: {type(error).__name__}: {error}"[:200]


def measure(problem: Problem, bandwidth: float) -> dict[str, Any]:
    inputs = Inputs(problem)
    run, run_torch = ours(problem, inputs), torch_sdpa(problem, inputs)
    expected = run_torch().transpose(1, 2).reshape(len(inputs.q), -1)
    error = relative_error(run(), expected)
    require(error < 1e-2, f"{problem}: it differs from torch's by {error:.1e}")
    own, sdpa, flex = microseconds(run), microseconds(run_torch), flex_microseconds(problem, inputs)
    result = {**asdict(problem), "us": round(own, 2), "torch_sdpa_us": round(sdpa, 2), "torch_flex_us": flex}
    if problem.query_len > 1:
        rate, sdpa_rate = (round(problem.num_flops / time / 1e6, 1) for time in (own, sdpa))
        return {**result, "tflop_s": rate, "torch_sdpa_tflop_s": sdpa_rate}
    gb_s = problem.num_bytes / own / 1e3
    invariant = microseconds(ours(problem, inputs, batch_invariant=True))
    result |= {"invariant_us": round(invariant, 2), "gb_s": round(gb_s, 1)}
    return {**result, "share_of_floor": round(gb_s / bandwidth, 3)}


def main() -> None:
    bandwidth = copy_bandwidth()
    rows = []
    for problem in PROBLEMS:
        rows.append(measure(problem, bandwidth))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    write(copy_gb_s=round(bandwidth, 1), rows=rows)


if __name__ == "__main__":
    main()
