"""Attention on a GPU beside torch's own: time, TFLOP/s or GB/s, and their share of what this GPU itself reaches.

    pytest benchmarks/bench_attention_peers.py -o python_files='bench_*.py'

Each benchmark first checks its result against torch in fp32. Beside it run torch's attention and FlexAttention over the
cache as one contiguous tensor, gathered beforehand: that costs them nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available():
    pytest.skip("attention is timed on a GPU only, and there is none", allow_module_level=True)

from inferneo_kernels.attention import attention, attention_workspace
from triton.testing import do_bench

BLOCK_SIZE = 16
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Problem:
    """num_seqs sequences alike: query_len new tokens each, seq_len in the cache with them."""

    num_seqs: int
    query_len: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_bytes(self) -> int:
        """Keys and values, read once, and queries and outputs."""
        cache = 2 * self.seq_len * self.num_kv_heads * self.head_dim
        return (cache + 2 * self.query_len * self.num_heads * self.head_dim) * self.num_seqs * DTYPE.itemsize

    @property
    def num_flops(self) -> int:
        """Multiplications and additions of what the causal mask leaves."""
        pairs = self.query_len * self.seq_len - self.query_len * (self.query_len - 1) // 2
        return 4 * pairs * self.head_dim * self.num_heads * self.num_seqs


DECODES = {
    "1x1k_1b": Problem(1, 1, 1024, 32, 8, 64),
    "1x1k_8b": Problem(1, 1, 1024, 32, 8, 128),
    "1x8k_8b": Problem(1, 1, 8192, 32, 8, 128),
    "32x4k_8b": Problem(32, 1, 4096, 32, 8, 128),
    "64x1k_8b": Problem(64, 1, 1024, 32, 8, 128),
    "32x4k_mha": Problem(32, 1, 4096, 32, 32, 128),
}
PREFILLS = {
    "2k_1b": Problem(1, 2048, 2048, 32, 8, 64),
    "2k_8b": Problem(1, 2048, 2048, 32, 8, 128),
    "8k_8b": Problem(1, 8192, 8192, 32, 8, 128),
    "16k_8b": Problem(1, 16384, 16384, 32, 8, 128),
    "chunk_512_of_8k_8b": Problem(1, 512, 8192, 32, 8, 128),
    "8x1k_8b": Problem(8, 1024, 1024, 32, 8, 128),
}


@dataclass(frozen=True)
class Inputs:
    """A problem's tensors: paged as the kernels have them, and gathered as torch wants them."""

    q: Tensor  # [num_tokens, num_heads, head_dim]
    k_cache: Tensor
    v_cache: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    gathered: tuple[Tensor, Tensor, Tensor]  # q, k, v: [num_seqs, heads, tokens, head_dim]


def make_inputs(problem: Problem) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(0)
    num_seqs, max_blocks = problem.num_seqs, -(-problem.seq_len // BLOCK_SIZE)
    options: dict[str, Any] = {"device": "cuda", "dtype": DTYPE, "generator": generator}
    shape = (num_seqs * max_blocks, problem.num_kv_heads, BLOCK_SIZE, problem.head_dim)
    k_cache, v_cache = torch.randn(shape, **options), torch.randn(shape, **options)
    q = torch.randn(num_seqs * problem.query_len, problem.num_heads, problem.head_dim, **options)
    tables = torch.randperm(shape[0], device="cuda", generator=generator).view(num_seqs, max_blocks).int()
    k, v = (
        side[tables].permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, : problem.seq_len].contiguous()
        for side in (k_cache, v_cache)
    )
    starts = torch.arange(num_seqs + 1, device="cuda", dtype=torch.int32) * problem.query_len
    seq_lens = torch.full((num_seqs,), problem.seq_len, device="cuda", dtype=torch.int32)
    queries = q.view(num_seqs, problem.query_len, *q.shape[1:]).transpose(1, 2).contiguous()
    return Inputs(q, k_cache, v_cache, starts, seq_lens, tables, (queries, k, v))


def run_triton(problem: Problem, inputs: Inputs, **options: Any) -> Callable[[], Tensor]:
    workspace = attention_workspace(problem.num_seqs, problem.num_heads, inputs.q.device)
    tensors = (inputs.q, inputs.k_cache, inputs.v_cache, inputs.query_start_loc, inputs.seq_lens, inputs.block_tables)
    return lambda: attention(*tensors, problem.query_len, problem.seq_len, workspace=workspace, **options)


def run_invariant(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    return run_triton(problem, inputs, batch_invariant=True)


def run_sdpa(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    whole = problem.query_len == problem.seq_len
    mask = None if whole or problem.query_len == 1 else causal_lower_right(problem.query_len, problem.seq_len)
    return lambda: F.scaled_dot_product_attention(*inputs.gathered, attn_mask=mask, is_causal=whole, enable_gqa=True)


def run_flex(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="this torch has no FlexAttention")
    offset = problem.seq_len - problem.query_len

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + offset >= key

    mask = flex.create_block_mask(visible, None, None, problem.query_len, problem.seq_len, device="cuda")
    compiled = torch.compile(flex.flex_attention)
    return lambda: compiled(*inputs.gathered, block_mask=mask, enable_gqa=True)


def assert_right(out: Tensor, problem: Problem, inputs: Inputs) -> None:
    """The last query of every sequence, which sees all keys, against a softmax in fp32."""
    q, k, v = (tensor.float() for tensor in inputs.gathered)
    group = problem.num_heads // problem.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhd,bhtd->bht", q[:, :, -1], k) / math.sqrt(problem.head_dim)
    expected = torch.einsum("bht,bhtd->bhd", scores.softmax(-1), v)
    if out.dim() == 4:  # torch's layout: [num_seqs, num_heads, query_len, head_dim]
        found = out[:, :, -1]
    else:
        found = out.view(problem.num_seqs, problem.query_len, problem.num_heads, problem.head_dim)[:, -1]
    torch.testing.assert_close(found.float(), expected, atol=0.01, rtol=0.02)


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)


@pytest.fixture(scope="session")
def matrix_peak() -> float:
    """FLOP a second of a product of two 8192 x 8192 matrices in bf16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    return 2 * 8192**3 / (do_bench(lambda: a @ b, return_mode="median") * 1e-3)


def in_graph(call: Callable[[], Tensor]) -> Callable[[], None]:
    """The call as a CUDA graph's replay, as the engine runs it: without the launch's time on the host."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(benchmark: Any, call: Callable[[], object]) -> float:
    """Seconds on the GPU, the median with a cold L2 cache; pytest-benchmark's own figure counts the host too."""

    def synchronised() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=20, warmup_rounds=3)
    seconds = do_bench(call, return_mode="median") * 1e-3
    benchmark.extra_info["gpu_us"] = round(seconds * 1e6, 2)
    return float(seconds)


@pytest.mark.parametrize("backend", [run_triton, run_invariant, run_sdpa, run_flex])
@pytest.mark.parametrize("name", DECODES)
def test_decode(benchmark: Any, copy_bandwidth: float, name: str, backend: Any) -> None:
    problem = DECODES[name]
    inputs = make_inputs(problem)
    call = backend(problem, inputs)
    assert_right(call(), problem, inputs)
    rate = problem.num_bytes / measure(benchmark, call if backend is run_flex else in_graph(call))
    benchmark.extra_info["GB/s"] = round(rate / 1e9, 1)
    benchmark.extra_info["share of copy bandwidth"] = round(rate / copy_bandwidth, 3)
    print(f"\n{name} {backend.__name__}: {benchmark.extra_info}")


@pytest.mark.parametrize("backend", [run_triton, run_sdpa, run_flex])
@pytest.mark.parametrize("name", PREFILLS)
def test_prefill(benchmark: Any, matrix_peak: float, name: str, backend: Any) -> None:
    problem = PREFILLS[name]
    inputs = make_inputs(problem)
    call = backend(problem, inputs)
    assert_right(call(), problem, inputs)
    rate = problem.num_flops / measure(benchmark, call)
    benchmark.extra_info["TFLOP/s"] = round(rate / 1e12, 1)
    benchmark.extra_info["share of matrix peak"] = round(rate / matrix_peak, 3)
    print(f"\n{name} {backend.__name__}: {benchmark.extra_info}")
