"""Runs the parts of the GPU check one after another, each in a process of its own, and writes the table of results."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from inferneo_benchmarks.gpu.table import table

LIMIT_S = 480  # a part


class Part(NamedTuple):
    """A module of this package, and the packages beside the engine's own that it cannot do without."""

    name: str
    needs: tuple[str, ...] = ()


ENGINE = ("numpy", "tokenizers", "jinja2", "tqdm")

PARTS = (
    Part("machine"),
    Part("suite", (*ENGINE, "pytest", "hypothesis")),
    Part("precision", ENGINE),
    Part("golden", ENGINE),
    Part("linear"),
    Part("attention"),
    Part("benches", (*ENGINE, "pytest", "pytest_benchmark", "matplotlib")),
    Part("sampling"),
    Part("head"),
    Part("decode_1b", ENGINE),
    Part("decode_8b", ENGINE),
    Part("decode_8b_q4", ENGINE),
    Part("batched", ENGINE),
    Part("throughput", ENGINE),
    Part("peers", ("transformers",)),
)


def run(part: Part, out: Path) -> dict[str, object]:
    """A part's result: what it wrote, or why there is none."""
    missing = [package for package in part.needs if importlib.util.find_spec(package) is None]
    if missing:
        return {"status": "skipped", "why": f"python package {', '.join(missing)} is not installed"}
    result_path = out / f"{part.name}.json"
    started = time.perf_counter()
    with (out / f"{part.name}.log").open("w") as log:
        try:
            command = [sys.executable, "-m", f"inferneo_benchmarks.gpu.{part.name}", str(result_path)]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "why": f"it took more than {LIMIT_S} s"}
    seconds = round(time.perf_counter() - started, 1)
    if done.returncode != 0 or not result_path.exists():
        return {"status": "failed", "why": f"exit code {done.returncode}; see {part.name}.log", "seconds": seconds}
    return {"status": "ok", "seconds": seconds, **json.loads(result_path.read_text())}


def main() -> None:
    out, wanted = Path(sys.argv[1]), set(sys.argv[2:])
    unknown = wanted - {part.name for part in PARTS}
    if unknown:
        sys.exit(f"no part is called {', '.join(sorted(unknown))}; they are {', '.join(part.name for part in PARTS)}")
    results: dict[str, dict[str, object]] = {}
    for part in PARTS:
        path = out / f"{part.name}.json"
        done = json.loads(path.read_text()) if path.exists() else {}
        if part.name in wanted or (not wanted and done.get("status") != "ok"):
            path.unlink(missing_ok=True)
            done = run(part, out)
            path.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{part.name}: {done['status']} {done.get('why', '')} {done.get('seconds', '')}", flush=True)
        if done:
            results[part.name] = done
    (out / "table.md").write_text(table(results))
    print(table(results))
    sys.exit(any(result["status"] == "failed" for result in results.values()))


if __name__ == "__main__":
    main()
