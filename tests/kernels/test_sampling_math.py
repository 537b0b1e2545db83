"""The sampler's arithmetic on the device has the reference's bits: thousands of values a function."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from inferneo_kernels import sampling_math
from torch import Tensor

from inferneo_core import batch
from inferneo_core.ops import torch_sampling as reference

N = 4096
INF = float("inf")

exp, log, weight, surprise = sampling_math.exp, sampling_math.log, sampling_math.weight, sampling_math.surprise
gumbel_at, gumbel_tile = sampling_math.gumbel_at, sampling_math.gumbel_tile
value_key, key_value = sampling_math.value_key, sampling_math.key_value
pack_token, token_id, token_key = sampling_math.pack_token, sampling_math.token_id, sampling_math.token_key


@triton.jit
def exp_kernel(exp_ptr, weight_ptr, surprise_ptr, d_ptr, N: tl.constexpr):
    index = tl.program_id(0) * N + tl.arange(0, N)
    d = tl.load(d_ptr + index)
    tl.store(exp_ptr + index, exp(d))
    tl.store(weight_ptr + index, weight(d))
    tl.store(surprise_ptr + index, surprise(d))


@triton.jit
def log_kernel(out_ptr, v_ptr, N: tl.constexpr):
    index = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + index, log(tl.load(v_ptr + index)))


@triton.jit
def gumbel_kernel(at_ptr, tile_ptr, ints_ptr, N: tl.constexpr):
    start = tl.program_id(0) * N
    ids = start + tl.arange(0, N)
    tl.store(at_ptr + ids, gumbel_at(ints_ptr, ids))
    tl.store(tile_ptr + ids, gumbel_tile(ints_ptr, start // 4 + tl.arange(0, N // 4)))


@triton.jit
def token_kernel(token_ptr, key_ptr, value_ptr, id_ptr, x_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    tokens = pack_token(tl.load(x_ptr + index), index)
    tl.store(token_ptr + index, tokens)
    tl.store(key_ptr + index, token_key(tokens))
    tl.store(value_ptr + index, key_value(token_key(tokens)))
    tl.store(id_ptr + index, token_id(tokens))


def run(kernel: Any, num_programs: int, *args: Tensor) -> None:
    kernel[(num_programs,)](*args, N=N, num_warps=4, enable_fp_fusion=False)


def test_columns_are_those_of_the_batch() -> None:
    names = ("INV_TEMPERATURE", "TOP_P", "MIN_P", "TYPICAL_P", "REPETITION", "PRESENCE", "FREQUENCY", "NUM_FLOATS")
    for name in (*names, "TOP_K", "SEED", "POSITION", "CHOICE", "COUNT_ROW", "NUM_INTS", "PROMPT_BIT"):
        assert getattr(sampling_math, name).value == getattr(batch, name), name
    assert 2**sampling_math.ID_BITS.value == reference.MAX_VOCAB_SIZE


def test_exp_weights_and_surprises_have_the_references_bits(device: torch.device, generator: torch.Generator) -> None:
    d = -torch.rand(4 * N, generator=generator) * 30
    d[:6] = torch.tensor([0.0, -0.0, -1e-30, -28.0, -1e30, -INF])
    e, w, s = torch.empty_like(d), torch.empty(4 * N, dtype=torch.int64), torch.empty(4 * N, dtype=torch.int64)
    out = [tensor.to(device) for tensor in (e, w, s)]
    run(exp_kernel, 4, *out, d.to(device))
    assert torch.equal(out[0].cpu(), reference.exp(d))
    weights = reference.weights(d)
    assert torch.equal(out[1].cpu(), weights)
    surprises = (torch.where(weights > 0, reference.exp(d) * -d, 0.0) * 2.0**40).long()
    assert torch.equal(out[2].cpu(), surprises)


def test_log_has_the_references_bits(device: torch.device, generator: torch.Generator) -> None:
    v = torch.cat([torch.rand(N, generator=generator), torch.exp2(torch.rand(3 * N, generator=generator) * 80 - 40)])
    v[0], out = 1.0, torch.empty(4 * N, device=device)
    run(log_kernel, 4, out, v.to(device))
    assert torch.equal(out.cpu(), reference.log(v))


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 0x0123456789ABCDEF])
def test_gumbel_variates_have_the_references_bits(device: torch.device, seed: int) -> None:
    ints = torch.tensor([[0, seed, 2**31 + 7, 3, -1]])
    expected = -reference.log(reference.gumbel_exponentials(ints, 2 * N))[0]
    at, tile = torch.empty(2 * N, device=device), torch.empty(2 * N, device=device)
    run(gumbel_kernel, 2, at, tile, ints.to(device))
    assert torch.equal(at.cpu(), expected)
    assert torch.equal(tile.cpu(), expected)


def test_tokens_order_by_value_then_by_lowest_id(device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(N, generator=generator).mul(4).round() / 4
    x[:8] = torch.tensor([INF, -INF, 0.0, -0.0, 3e38, -3e38, 1e-45, INF])
    columns = [torch.empty(N, dtype=torch.int64, device=device) for _ in range(3)]
    values = torch.empty(N, device=device)
    run(token_kernel, 1, columns[0], columns[1], values, columns[2], x.to(device))
    tokens, keys, ids = (column.cpu() for column in columns)
    assert torch.equal(tokens.argsort(descending=True), x.sort(descending=True, stable=True).indices)
    assert torch.equal(values.cpu(), x)
    assert torch.equal(ids, torch.arange(N))
    assert sampling_math.NO_TOKEN.value < int(tokens.min())
    assert int(tokens.max()) < sampling_math.NAN_TOKEN.value
    assert int(keys[1]) == sampling_math.LOWEST_KEY.value - 1  # -inf, which no bound reaches


COUNT_FUSED = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from inferneo_kernels import sampling, sampling_filters, sampling_select, scoring

for module in (sampling, sampling_filters, sampling_select, scoring):
    for case in module.aot_cases():
        names = case.kernel.arg_names
        given = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
        values = {(names.index(name),): value for name, value in case.constexprs.items()}
        source = ASTSource(case.kernel, {name: given[name] for name in names}, values)
        options = {"num_warps": case.num_warps, "enable_fp_fusion": case.enable_fp_fusion}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        inexact = re.findall(r"fma\\.rn\\.f|div\\.full|\\.approx|\\.ftz", ptx)
        print(module.__name__, case.name, len(inexact), len(re.findall(r"mul\\.(?:rn\\.)?f32", ptx)))
"""


@pytest.mark.slow
def test_device_code_rounds_every_product_and_sum() -> None:
    """What the interpreter cannot show: the compiler fuses nothing and approximates nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COUNT_FUSED]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    counts = {tuple(line.split()[:2]): line.split()[2:] for line in result.stdout.splitlines()}
    assert len(counts) >= 8
    assert all(inexact == "0" for inexact, _ in counts.values()), counts
    assert any(int(products) > 50 for _, products in counts.values())  # the pattern does find instructions
