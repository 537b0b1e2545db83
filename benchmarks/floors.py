"""What the machine can do at most, measured in the same seconds as what is compared to it.

python benchmarks/floors.py [threads]
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Floors:
    """Attributes: threads; read_gb_s of 96 MiB on huge pages; int8_gop_s; fp32_gflop_s; round_trip_ns between two
    threads (about 55 where they share a cache, 300 where they do not; 0 for one thread)."""

    threads: int
    read_gb_s: float
    int8_gop_s: float
    fp32_gflop_s: float
    round_trip_ns: float


@functools.cache
def _program() -> Path:
    """floors.cpp, compiled for this machine, once a process."""
    path = Path(tempfile.mkdtemp(prefix="inferneo-floors-")) / "floors"
    source = Path(__file__).with_suffix(".cpp")
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, "-std=c++20", "-O3", "-march=native", "-pthread", str(source), "-o", str(path)], check=True
    )
    return path


def measure(threads: int) -> Floors:
    """Takes some 0.2 s."""
    output = subprocess.run([_program(), str(threads)], check=True, capture_output=True, text=True).stdout
    figures = output.split()
    return Floors(int(figures[0]), *(float(figure) for figure in figures[1:]))


if __name__ == "__main__":
    print(measure(int(sys.argv[1]) if len(sys.argv) > 1 else len(os.sched_getaffinity(0))))
