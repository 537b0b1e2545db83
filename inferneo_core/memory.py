"""How much memory is there: what the default size of the KV cache is taken from."""

from __future__ import annotations

from pathlib import Path

import torch

CPU_CACHE_SHARE = 0.25  # of the memory available once the weights are loaded; pages are touched only when used
CUDA_CACHE_SHARE = 0.9  # of the free device memory, likewise


def default_cache_memory(device: torch.device) -> int:
    """Bytes that the KV cache gets when nobody says: a share of what is free on the device now."""
    return int(free_memory(device) * (CUDA_CACHE_SHARE if device.type == "cuda" else CPU_CACHE_SHARE))


def free_memory(device: torch.device) -> int:
    """Bytes of the device's memory that are free now; a GPU's allocator first gives back what it only holds."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else what loading has used in passing would be lost to the cache
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_memory()


def available_memory() -> int:
    """Bytes of main memory this process may still use: the system's figure, or its control group's if lower."""
    candidates = [_meminfo_available(), _cgroup_headroom()]
    known = [value for value in candidates if value is not None]
    return min(known) if known else 4 * 2**30  # neither file: not Linux; a modest guess that kv_cache_memory overrides


def _meminfo_available() -> int | None:
    text = _read(Path("/proc/meminfo"))
    for line in (text or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_headroom() -> int | None:
    group = Path("/sys/fs/cgroup")
    limit, used = _read(group / "memory.max"), _read(group / "memory.current")
    if limit is None or used is None or not limit.strip().isdigit():
        return None
    return max(int(limit) - int(used), 0)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
