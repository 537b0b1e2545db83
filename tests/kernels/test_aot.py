"""Every kernel at its production configuration, compiled for chips that this machine does not have.

Compilation needs real kernels and this process has interpreted ones, so it runs in another; Triton's cache on disk
makes it a matter of seconds when nothing has changed.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import inferneo_kernels
import pytest
from inferneo_kernels.aot import AotCase, compile_case, discover

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
KERNELS = Path(inferneo_kernels.__file__).parent
CASES = discover()
Report = dict[str, Any]


def run(*command: str) -> list[Report]:
    """The reports that a Python command prints, run where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=1800, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, str, int], Report]:
    found = run("-m", "inferneo_kernels.aot", "--json", "--jobs", "2")
    return {(report["module"], report["case"], report["chip"]): report for report in found}


@pytest.fixture(scope="module")
def misfits() -> dict[str, Report]:
    return {report["case"]: report for report in run(str(HERE / "misfits.py"))}


@pytest.mark.parametrize(
    ("module", "name", "chip"),
    [
        pytest.param(module, case.name, chip, id=f"{module}-{case.name}-sm_{chip}")
        for module, cases in CASES.items()
        for case in cases
        for chip in case.chips
    ],
)
def test_kernel_is_fit_for_the_chip(
    module: str, name: str, chip: int, reports: dict[tuple[str, str, int], Report]
) -> None:
    report = reports[module, name, chip]
    assert report["problems"] == [], f"{report['registers']} registers, {report['shared_bytes']:,} shared bytes"


@pytest.mark.parametrize("module", sorted(CASES))
def test_cases_have_names_of_their_own(module: str) -> None:
    names = [case.name for case in CASES[module]]
    assert len(names) == len(set(names))


def launched_kernels(path: Path) -> set[str]:
    """The names that a module launches: those called as name[grid](...)."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    heads = (call.func.value for call in calls if isinstance(call.func, ast.Subscript))
    return {head.id for head in heads if isinstance(head, ast.Name)}


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_every_launched_kernel_has_a_case(path: Path) -> None:
    covered = {case.kernel.__name__ for cases in CASES.values() for case in cases}
    assert launched_kernels(path) <= covered


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("spilling", "spills"),
        ("too_much_shared", "shared memory"),
        ("without_cp_async", "has no cp.async instruction"),
        ("unaligned", "has no ld.v4 instruction"),
        ("without_mma", "has no mma instruction"),
    ],
)
def test_check_finds_what_is_wrong(case: str, problem: str, misfits: dict[str, Report]) -> None:
    assert any(problem in found for found in misfits[case]["problems"]), misfits[case]


@pytest.mark.parametrize("case", ["fit_matmul", "fit_copy"])
def test_check_lets_pass_what_is_right(case: str, misfits: dict[str, Report]) -> None:
    assert misfits[case]["problems"] == []


def test_interpreted_kernel_is_refused() -> None:
    case = AotCase("interpreted", object(), {}, {}, 4, 1)
    with pytest.raises(TypeError, match="unset TRITON_INTERPRET"):
        compile_case(case, 90)
