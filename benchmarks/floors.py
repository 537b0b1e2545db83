"""What the machine can do at most, measured in the same minutes as what is compared to it.

    python benchmarks/floors.py [threads]

On a CPU: reading memory, and multiply-adds of 8-bit integers, fp32 and bf16 in registers (floors.cpp). On a GPU: the
faster of copying and reading, and the vendor's own products of large matrices.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

READ_BYTES = 96 * 2**20  # three times the largest last-level cache that one core of a common server sees
ROUNDS = 50_000  # of 12 instructions: 0.3 ms
TRIES = 40


@dataclass(frozen=True, slots=True)
class Floors:
    """Attributes: threads; read_gb_s of 96 MiB on huge pages; int8_gop_s; fp32_gflop_s; bf16_gflop_s; round_trip_ns
    between two threads (about 55 where they share a cache, 300 where they do not; 0 for one thread)."""

    threads: int
    read_gb_s: float
    int8_gop_s: float
    fp32_gflop_s: float
    bf16_gflop_s: float
    round_trip_ns: float


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device was seen to do at its best, and not by chance.

    Attributes:
        device: "cpu" or "cuda".
        num_threads: of a CPU; 0 on a GPU.
        bytes_per_s: between memory and processor.
        operations_per_s: by the type that is multiplied: "int8" (CPU only), "fp32", "bf16".
    """

    device: str
    num_threads: int
    bytes_per_s: float
    operations_per_s: Mapping[str, float] = field(default_factory=dict)

    def floor_seconds(self, num_bytes: int, num_operations: int, compute: str) -> float:
        """The least time that so many bytes and operations of one type take: the roofline.

        Source: Williams et al., doi 10.1145/1498765.1498785.
        """
        return max(num_bytes / self.bytes_per_s, num_operations / self.operations_per_s[compute])

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@functools.cache
def _library() -> ctypes.CDLL:
    """floors.cpp, compiled for this machine, once a process.

    Raises:
        RuntimeError: there is no C++ compiler, or it does not know this CPU.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"the ceilings of this CPU are measured by a C++ program, and there is no compiler {compiler!r} "
            "(Debian, Ubuntu: apt install g++; or set CXX to yours)"
        )
    with tempfile.TemporaryDirectory(prefix="inferneo-floors-") as directory:
        path = Path(directory) / "floors.so"
        source = Path(__file__).with_suffix(".cpp")
        options = ["-std=c++20", "-O3", "-march=native", "-pthread", "-shared", "-fPIC"]
        subprocess.run([compiler, *options, str(source), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    library.floors_memory.argtypes, library.floors_memory.restype = [ctypes.c_int64], ctypes.c_void_p
    library.floors_free.argtypes, library.floors_free.restype = [ctypes.c_void_p], None
    library.floors_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    for name in ("int8", "fp32", "bf16"):
        getattr(library, f"floors_{name}").argtypes = [ctypes.c_int64, ctypes.c_int]
    for name in ("read", "int8", "fp32", "bf16", "round_trip"):
        getattr(library, f"floors_{name}").restype = ctypes.c_double
    return library


class CpuProbe:
    """The ceilings of the CPU, a sample at a time.

    Args:
        num_threads: that read or compute side by side.
    Raises:
        RuntimeError: there is no C++ compiler, or no memory.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._library = _library()
        self._memory: int | None = self._library.floors_memory(READ_BYTES)
        if self._memory is None:
            raise RuntimeError(f"there are no {READ_BYTES:,} bytes of memory to measure reading on")
        weakref.finalize(self, self._library.floors_free, self._memory)
        self._offset = 0

    def read(self, num_bytes: int = READ_BYTES) -> float:
        """Bytes a second of reading the next num_bytes of a ring of READ_BYTES, which are in no cache by then."""
        assert self._memory is not None
        start = self._offset if self._offset + num_bytes <= READ_BYTES else 0
        self._offset = start + num_bytes
        return num_bytes / float(self._library.floors_read(self._memory + start, num_bytes, self.num_threads))

    def multiply(self, compute: str, rounds: int = ROUNDS) -> float:
        """Operations a second of "int8", "fp32" or "bf16"."""
        return float(getattr(self._library, f"floors_{compute}")(rounds, self.num_threads))

    def round_trip_ns(self) -> float:
        return float(self._library.floors_round_trip()) if self.num_threads > 1 else 0.0

    def rates(self) -> dict[str, list[float]]:
        """Many samples of "read" and of each product; takes some 0.3 s."""
        reads = [self.read() for _ in range(TRIES // 2)]
        products = {compute: [self.multiply(compute) for _ in range(TRIES)] for compute in ("int8", "fp32", "bf16")}
        return {"read": reads, **products}


def measure(threads: int) -> Floors:
    """All of them in the units that people quote; takes some 0.3 s."""
    probe = CpuProbe(threads)
    giga = {kind: round(max(rates) / 1e9, 1) for kind, rates in probe.rates().items()}
    round_trip = round(min(probe.round_trip_ns() for _ in range(TRIES // 2)))
    return Floors(threads, giga["read"], giga["int8"], giga["fp32"], giga["bf16"], round_trip)


if __name__ == "__main__":
    print(measure(int(sys.argv[1]) if len(sys.argv) > 1 else len(os.sched_getaffinity(0))))
