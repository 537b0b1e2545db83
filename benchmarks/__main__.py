"""Run the benchmarks, print a table, write a result and a report: `python -m inferneo_benchmarks --help`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from inferneo_benchmarks import results
from inferneo_benchmarks.compare import MIN_PASSES, compare
from inferneo_benchmarks.machine import commit, machine, versions
from inferneo_benchmarks.report import write_report
from inferneo_benchmarks.results import Result
from inferneo_benchmarks.table import comparison_table, result_table

HERE = Path(__file__).resolve().parent
PYTEST = ("-q", "--no-header", "-o", "python_files=bench_*.py", "--import-mode=importlib", "-p", "no:cacheprovider")
FILES = {
    "qkv_rope_store": "bench_qkv_rope_store.py",
    "attention": "bench_attention.py",
    "linear_add": "bench_linear_add.py",
    "gate_up_silu": "bench_gate_up_silu.py",
    "lm_head": "bench_lm_head.py",
    "sample": "bench_sample.py",
    "model": "bench_model.py",
    "products": "bench_products.py",
    "engine": "bench_engine.py",
    "load": "bench_load.py",
    "tokenizer": "bench_tokenizer.py",
    "server": "bench_server.py",
}


def parser() -> argparse.ArgumentParser:
    asked = argparse.ArgumentParser(prog="inferneo bench", description="Time every verb against its roofline.")
    asked.add_argument("--verb", action="append", choices=tuple(FILES), help="only this one; may be repeated")
    asked.add_argument("--model", action="append", help="only this model's shapes, such as llama-3.2-1b")
    asked.add_argument("--backend", action="append", choices=("torch", "cpu", "triton"), help="only this backend")
    asked.add_argument("--full", action="store_true", help="every model, type and shape")
    asked.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    asked.add_argument("--passes", type=int, default=5, help=f"processes; a comparison needs {MIN_PASSES} or more")
    asked.add_argument("--budget", type=float, default=None, help="seconds of rounds a benchmark and pass")
    asked.add_argument("--compare", type=Path, metavar="RESULT.json", help="hold the run against this earlier one")
    asked.add_argument(
        "--output", type=Path, default=Path("inferneo-bench"), help="folder of the result and the report"
    )
    asked.add_argument("--render", type=Path, metavar="RESULT.json", help="measure nothing: report on this result")
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 where benchmarks failed or a file could not be read."""
    options = parser().parse_args(arguments)
    try:
        before = results.read(options.compare) if options.compare else None
        result = results.read(options.render) if options.render else run(options)
        comparison = compare(before, result) if before else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(result_table(result))
    if not options.render:
        result.write(options.output / "result.json")
        print(f"result: {options.output / 'result.json'}")
    page = write_report(options.output, result, before, comparison)
    print(f"report: {page}")
    if comparison is not None:
        print(comparison_table(comparison))
    return 0


def run(options: argparse.Namespace) -> Result:
    """Every pass, a process each, merged.

    Raises:
        ValueError: a benchmark failed, nothing was selected, or a count is not to be believed.
    """
    if options.passes < 1:
        raise ValueError(f"--passes is {options.passes}; it is at least 1")
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="inferneo-bench-") as directory:
        passes = [_one_pass(options, number, Path(directory) / f"{number}.json") for number in range(options.passes)]
    asked = {key: value for key, value in vars(options).items() if key not in ("compare", "output", "render")}
    return results.merge(passes, when=when, commit=commit(), machine=machine(), versions=versions(), options=asked)


def _one_pass(options: argparse.Namespace, number: int, path: Path) -> dict[str, Any]:
    print(f"pass {number + 1} of {options.passes}", file=sys.stderr, flush=True)
    files = [str(HERE / FILES[verb]) for verb in options.verb or FILES]
    command = [sys.executable, "-m", "pytest", *PYTEST, *files, "--benchmark-quiet", "--pass-json", str(path)]
    # All that is quick takes three minutes; whoever asks for a verb or two gets longer rounds of them.
    budget = options.budget or (1.0 if options.full else 0.25 if options.verb else 0.1)
    command += ["--threads", str(options.threads), "--budget", str(budget)]
    command += ["--full"] if options.full else []
    command += ["--unchecked"] if number else []  # the first pass has checked
    for option, names in (("--backend", options.backend), ("--bench-model", options.model)):
        for name in names or ():
            command += [option, name]
    code = subprocess.run(command, check=False, stdout=sys.stderr).returncode
    if code == 5:  # pytest's "no tests were collected"
        raise ValueError("no benchmark was selected (see --verb, --model and --backend; triton needs a GPU)")
    if code:
        raise ValueError(f"benchmarks failed: pytest ended with {code}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(main())
