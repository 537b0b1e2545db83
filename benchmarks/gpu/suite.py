"""The kernel tests on the GPU, in every dtype. The interpreter's and the compiler's own tests run elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from inferneo_benchmarks.gpu.measure import require, write

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    log = Path(sys.argv[1]).with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={log}", "tests/kernels"]
    command += ["--ignore=tests/kernels/test_aot.py", "-k", "not mutation and not mutant", "--maxfail=20"]
    environment = {**os.environ, "INFERNEO_TEST_DEVICE": "cuda"}
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    require(log.exists(), "pytest wrote no report")
    suite = ElementTree.parse(log).getroot().find("testsuite")
    require(suite is not None, "the report holds no test suite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    print(counts)
    require(code == 0, f"pytest ended with {code}: {counts}")
    write(**counts)


if __name__ == "__main__":
    main()
