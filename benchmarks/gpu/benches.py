"""The verbs' benchmarks on the GPU, against the ceilings measured in the same process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from inferneo_benchmarks.gpu.measure import require, write
from inferneo_benchmarks.results import read

VERBS = ("qkv_rope_store", "attention", "linear_add", "gate_up_silu", "lm_head", "sample")


def main() -> None:
    folder = Path(sys.argv[1]).with_suffix("")
    command = [sys.executable, "-m", "inferneo_benchmarks", "--backend", "triton", "--passes", "1"]
    for verb in VERBS:
        command += ["--verb", verb]
    code = subprocess.run([*command, "--output", str(folder)], check=False).returncode
    require(code == 0, f"the benchmarks ended with {code}")
    result = read(folder / "result.json")
    rows = []
    for one in result.measurements:
        share = result.share(one)
        rows.append({"name": one.name, "median_us": one.median_s * 1e6, "gb_s": one.gb_s, "share_of_floor": share})
    require(bool(rows), "no benchmark ran")
    write(rows=rows)


if __name__ == "__main__":
    main()
