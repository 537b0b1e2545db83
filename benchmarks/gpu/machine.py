"""Which machine this is, and the two floors that every other figure is held against."""

from __future__ import annotations

import platform

import torch
import triton
from inferneo_benchmarks.gpu.measure import copy_bandwidth, matmul_peak, require, write


def main() -> None:
    require(torch.cuda.is_available(), f"torch {torch.__version__} finds no CUDA GPU")
    properties = torch.cuda.get_device_properties(0)
    write(
        gpu=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.__version__,
        copy_gb_s=round(copy_bandwidth(), 1),
        matmul_tflop_s=round(matmul_peak(), 1),
    )


if __name__ == "__main__":
    main()
