"""The linear kernels by number of tokens beside the vendor's GEMM: what the switch-over table should say."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from inferneo_benchmarks.gpu.measure import copy_bandwidth, microseconds, write
from inferneo_benchmarks.quant_blocks import random_blocks
from inferneo_kernels import linear
from inferneo_kernels.quant_layout import Weight, dense, repack

# Llama-3.1-8B and Llama-3.2-1B: (rows, columns) of QKV, output, gate and up, down.
SHAPES_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
SHAPES_1B = ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
REGIMES: tuple[linear.Regime, ...] = ("gemv", "tile", "wide", "vendor")


def weight(rows: int, columns: int, quant_type: str) -> Weight:
    if not quant_type:
        return dense(torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5)
    generator = torch.Generator("cuda").manual_seed(0)
    return repack(random_blocks(rows, columns, quant_type, generator), quant_type)


def compare(w: Weight, num_tokens: int, bandwidth: float) -> dict[str, Any]:
    """Microseconds of each regime, and the best one's share of the floor."""
    x = torch.randn(num_tokens, w.in_features, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(num_tokens, w.num_rows, device="cuda", dtype=torch.bfloat16)
    times = {
        regime: microseconds(partial(linear.linear_add, x, (w,), None, residual, regime=regime))
        for regime in REGIMES
        if regime != "gemv" or num_tokens <= 8
    }
    best = min(times, key=lambda regime: times[regime])
    return {
        "weights": w.quant_type or "bf16",
        "shape": [w.num_rows, w.in_features],
        "num_tokens": num_tokens,
        "us": {regime: round(time, 2) for regime, time in times.items()},
        "best": best,
        "share_of_floor": round(w.num_bytes / times[best] / 1e3 / bandwidth, 3),
    }


def main() -> None:
    bandwidth = copy_bandwidth()
    rows = []
    for quant_type in ("", "Q4_K", "Q8_0"):
        for shape in (*SHAPES_8B, *SHAPES_1B):
            w = weight(*shape, quant_type)
            for num_tokens in TOKENS:
                rows.append(compare(w, num_tokens, bandwidth))
                print(rows[-1], flush=True)
    write(copy_gb_s=round(bandwidth, 1), rows=rows)


if __name__ == "__main__":
    main()
