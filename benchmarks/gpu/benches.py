"""The kernel benchmarks that pytest-benchmark runs, on the GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from gpu.measure import require, write

ROOT = Path(__file__).resolve().parents[2]
FILES = ("benchmarks/bench_attention_peers.py",)


def main() -> None:
    log = Path(sys.argv[1]).with_suffix(".benchmarks")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "python_files=bench_*.py", *FILES]
    code = subprocess.run([*command, f"--benchmark-json={log}"], cwd=ROOT, check=False).returncode
    require(code == 0, f"pytest ended with {code}")
    found = json.loads(log.read_text())["benchmarks"]
    rows = [{"name": row["name"], "median_us": row["stats"]["median"] * 1e6, **row["extra_info"]} for row in found]
    require(bool(rows), "no benchmark ran")
    write(rows=rows)


if __name__ == "__main__":
    main()
