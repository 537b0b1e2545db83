"""The C++ sampler under AddressSanitizer and UndefinedBehaviorSanitizer, without torch (csrc/sampler_test.cpp)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from inferneo_core.errors import BackendUnavailable
from inferneo_core.ops.cpu_ops import CpuOps

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("native") / "sampler_test"
    sources = [str(CSRC / name) for name in ("sampler_test.cpp", "sampler.cpp", "passes.cpp")]
    flags = [
        "-std=c++20",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-ffp-contract=off",
        "-fno-trapping-math",
        "-pthread",
    ]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([COMPILER, *flags, *sanitizers, *sources, "-o", str(path)], check=True)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_sampler_is_clean_under_the_sanitizers(program: Path, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNEO_CPU_ISA", isa)
    try:
        CpuOps()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    name, _ = result.stdout.splitlines()  # and a checksum
    assert name == isa
