"""Team and attention under the sanitizers, without torch (csrc/cpu/attention_test.cpp)."""

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
    "cpu/attention_test.cpp",
    "cpu/attention.cpp",
    "cpu/row_kernels.cpp",
    "cpu/row_kernels_scalar.cpp",
    "cpu/row_kernels_avx2.cpp",
    "cpu/row_kernels_avx512.cpp",
    "cpu/row_kernels_avx512bf16.cpp",
    "cpu/step.cpp",
    "cpu/team.cpp",
    "passes.cpp",
)
WARNINGS = ("-Wall", "-Wextra", "-Werror")
FLAGS = ("-std=c++20", "-O1", "-g", *WARNINGS, "-ffp-contract=off", "-fno-trapping-math", "-pthread")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, build: Any) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("native") / "attention_test"
    sanitizers = [f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    build(COMPILER, (*FLAGS, *sanitizers), [CSRC / name for name in SOURCES], path)
    return path


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512bf16"])
def test_attention_is_clean_under_the_sanitizers(program: Path, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNEO_CPU_ISA", isa)
    try:
        CpuOps(1)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    name, _ = result.stdout.splitlines()  # and a checksum
    assert name == isa
