"""Each example as a user runs it: a process of its own, against a server where the example looks for it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROGRAMS = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "options.py")
TYPED = "What is rain?\nquit\n"

pytestmark = pytest.mark.slow


def run(path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("INFERNEO_")}
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        env={**kept, **environment},
        input=TYPED,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_examples_are_the_nine_of_the_guide():
    assert len(PROGRAMS) == 9
    listed = re.findall(r"^\| `(\w+\.py)` \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == [path.name for path in PROGRAMS]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_example_begins_by_saying_what_it_does(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_example_streams_from_the_guides_server(path, server):
    before = server.generated_tokens()
    ran = run(path, "--max-tokens", "16")
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout
    num_tokens = server.generated_tokens() - before
    assert 1 <= num_tokens <= 16
    for counted in re.findall(r"^Total tokens: (\d+)$", ran.stdout, re.MULTILINE):
        assert int(counted) == num_tokens


def test_example_progress_bar_ends_at_the_number_of_tokens(server):
    before = server.generated_tokens()
    ran = run(EXAMPLES / "progress_bar.py", "--max-tokens", "12")
    counted = re.findall(r"Generated (\d+) tokens: +\d+%.*? (\d+)/12 ", ran.stderr)[-1]
    assert set(map(int, counted)) == {server.generated_tokens() - before}


def test_example_takes_server_and_model_from_the_environment(server):
    ran = run(EXAMPLES / "robust.py", INFERNEO_BASE_URL=server.url, INFERNEO_MODEL="nonesuch")
    assert "nonesuch" in ran.stderr
    ran = run(EXAMPLES / "robust.py", INFERNEO_BASE_URL=f"{server.url}/nowhere")
    assert "/nowhere" in ran.stderr


def test_robust_example_does_not_repeat_a_request_that_can_only_fail(server):
    ran = run(EXAMPLES / "robust.py", "--model", "nonesuch")
    assert ran.returncode == 1
    assert len(re.findall(r"^Attempt \d failed: ", ran.stderr, re.MULTILINE)) == 1
    assert "smollm2-135m-instruct" in ran.stderr  # the error names what is served
