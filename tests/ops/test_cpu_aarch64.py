"""The C++ kernels on a 64-bit ARM, emulated: NEON and plain C++ have the bits that this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
FLAGS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-trapping-math", "-pthread")
PROGRAMS = {
    "products": (*sorted(set(CSRC.glob("cpu/linear*.cpp")) - {CSRC / "cpu/linear_ops.cpp"}), CSRC / "cpu/pack.cpp"),
    "attention": (
        *CSRC.glob("cpu/attention*.cpp"),
        *CSRC.glob("cpu/row_kernels*.cpp"),
        CSRC / "cpu/step.cpp",
        CSRC / "cpu/team.cpp",
    ),
    "sampler": tuple(CSRC.glob("sampler*.cpp")),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=PROGRAMS)
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, build: Any) -> tuple[Path, Path]:
    """One of the C++ tests, for this machine and for ARM.

    Without a cross-compiler and an emulator it is skipped, unless INFERNEO_REQUIRE_AARCH64 is set.
    """
    if COMPILER is None or CROSS_COMPILER is None or EMULATOR is None:
        reason = "needs c++, aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user-static)"
        pytest.fail(reason) if os.environ.get("INFERNEO_REQUIRE_AARCH64") else pytest.skip(reason)
    directory = tmp_path_factory.mktemp("native")
    sources = (CSRC / "passes.cpp", *PROGRAMS[request.param])
    here, there = directory / "here", directory / "there"
    build(COMPILER, FLAGS, sources, here)
    build(CROSS_COMPILER, (*FLAGS, "-static"), sources, there)
    return here, there


@pytest.mark.parametrize("isa", ["scalar", "neon"])
def test_bits_are_those_of_this_machine(programs: tuple[Path, Path], isa: str) -> None:
    assert EMULATOR is not None
    here, there = programs
    expected = subprocess.run([here], capture_output=True, text=True, check=True)
    command = [EMULATOR, "-E", f"INFERNEO_CPU_ISA={isa}", there]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    _, checksum = expected.stdout.splitlines()
    assert result.stdout.splitlines() == [isa, checksum]


def test_a_processor_without_dot_products_runs_plain_kernels(programs: tuple[Path, Path]) -> None:
    assert EMULATOR is not None
    here, there = programs
    expected = subprocess.run([here], capture_output=True, text=True, check=True)
    result = subprocess.run([EMULATOR, "-cpu", "cortex-a53", there], capture_output=True, text=True, check=True)
    _, checksum = expected.stdout.splitlines()
    assert result.stdout.splitlines() == ["scalar", checksum]
