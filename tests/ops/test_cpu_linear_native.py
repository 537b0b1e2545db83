"""The C++ products under AddressSanitizer and UndefinedBehaviorSanitizer, without torch (csrc/cpu/linear_test.cpp)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from inferneo_core.errors import BackendUnavailable
from inferneo_core.ops.cpu_ops import CpuOps

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
SOURCES = (
    "passes.cpp",
    "cpu/linear.cpp",
    "cpu/linear_avx2.cpp",
    "cpu/linear_avx512.cpp",
    "cpu/linear_neon.cpp",
    "cpu/linear_scalar.cpp",
    "cpu/linear_test.cpp",
    "cpu/pack.cpp",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, build: Any) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("native") / "linear_test"
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-trapping-math"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
    build(COMPILER, (*flags, *sanitizers), [CSRC / name for name in SOURCES], path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_products_are_clean_under_the_sanitizers(program: Path, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNEO_CPU_ISA", isa)
    try:
        CpuOps()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    name, _ = result.stdout.splitlines()  # and a checksum
    assert name == isa
