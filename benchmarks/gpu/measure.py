"""What the parts share: timing on the device, and the result file."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

L2_BYTES = 256 * 2**20  # more than any L2: written between runs, so that each one finds its operands in memory


def graphed(fn: Callable[[], Any]) -> Callable[[], None]:
    """The launches of `fn`, warmed up and captured: what is timed is the device, not Python."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def microseconds(fn: Callable[[], Any], *, rounds: int = 30, cold: bool = True) -> float:
    """Median time of one run of `fn` on the device, its operands out of the cache if `cold`."""
    replay = graphed(fn)
    flush = torch.empty(L2_BYTES if cold else 1, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(rounds):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return float(statistics.median(times))


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read and written: the floor of whatever reads each byte once."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds(lambda: target.copy_(source)) / 1e3


def matmul_peak() -> float:
    """TFLOP/s of the vendor's bf16 product of two random 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / microseconds(lambda: a @ b, rounds=15) / 1e6


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact value, in fp64."""
    exact = exact.double()
    return float((actual.double() - exact).norm() / exact.norm())


def require(condition: bool, message: str) -> None:
    """Fail the part: a result that is wrong has no speed."""
    if not condition:
        sys.exit(f"error: {message}")


def write(**result: Any) -> None:
    """Write the part's result where check.py looks for it, and show it."""
    text = json.dumps(result, indent=1)
    print(text)
    Path(sys.argv[1]).write_text(text)
