"""Kernels that must not pass the ahead-of-time check; run as a script, this prints their reports for sm_90.

Each is wrong in one way that the check is there to find.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import triton
import triton.language as tl
from inferneo_kernels.aot import AotCase, compile_case


@triton.jit
def matmul(x_ptr, y_ptr, out_ptr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, 64):
        k = start + tl.arange(0, 64)
        acc = tl.dot(tl.load(x_ptr + rows * K + k[None, :]), tl.load(y_ptr + k[:, None] + columns * K), acc)
    tl.store(out_ptr + rows * BLOCK_N + columns, acc)


@triton.jit
def copy(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index))


def matmul_case(name: str, block: int, num_stages: int, expect: tuple[str, ...], dtype: str = "*bf16") -> AotCase:
    signature = {"x_ptr": dtype, "y_ptr": dtype, "out_ptr": "*fp32"}
    constexprs = {"K": 1024, "BLOCK_M": block, "BLOCK_N": block}
    return AotCase(name, matmul, signature, constexprs, 4, num_stages, tuple(signature), expect)


def copy_case(name: str, divisible_by_16: tuple[str, ...], expect: tuple[str, ...]) -> AotCase:
    return AotCase(name, copy, {"x_ptr": "*bf16", "out_ptr": "*bf16"}, {"BLOCK": 1024}, 4, 1, divisible_by_16, expect)


CASES = (
    matmul_case("fit_matmul", 64, 3, ("mma", "wgmma", "cp.async")),
    matmul_case("spilling", 256, 1, ("mma",)),
    matmul_case("too_much_shared", 128, 8, ("mma",)),
    matmul_case("without_cp_async", 64, 1, ("mma", "cp.async")),
    copy_case("fit_copy", ("x_ptr", "out_ptr"), ("ld.v4",)),
    copy_case("unaligned", (), ("ld.v4",)),
    copy_case("without_mma", ("x_ptr", "out_ptr"), ("mma",)),
)

if __name__ == "__main__":
    for case in CASES:
        print(json.dumps(asdict(compile_case(case, 90))))
