"""`inferneo bench`: its options, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from inferneo_benchmarks import __main__ as program
from typer.testing import CliRunner

from inferneo import cli_bench
from inferneo.cli import app


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run, none of them really."""
    found: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        found.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(cli_bench.subprocess, "run", run)
    return found


def test_bench_hands_its_options_to_the_benchmarks(commands: list[list[str]], tmp_path: Path) -> None:
    earlier = tmp_path / "result.json"
    earlier.write_text("{}")
    options = ["--verb", "attention", "--verb", "sample", "--model", "llama-3.2-1b", "--compare", str(earlier)]
    result = CliRunner().invoke(app, ["bench", *options, "--threads", "1", "--passes", "3", "--full"])
    assert result.exit_code == 3  # as the benchmarks' own
    (command,) = commands
    assert command[:3] == [sys.executable, "-m", "inferneo_benchmarks"]
    asked = program.parser().parse_args(command[3:])
    assert asked.verb == ["attention", "sample"]
    assert asked.model == ["llama-3.2-1b"]
    assert (asked.threads, asked.passes, asked.full, asked.compare) == (1, 3, True, earlier)


def test_bench_help_names_every_verb() -> None:
    assert cli_bench.VERBS.split(", ") == list(program.FILES)
    assert "tokenizer" in CliRunner().invoke(app, ["bench", "--help"]).output


def test_bench_names_what_is_not_installed(commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_bench, "NEEDED", ("pytest", "no_such_package"))
    result = CliRunner().invoke(app, ["bench"])
    assert result.exit_code == 1
    assert "the benchmarks need no_such_package (pip install 'inferneo[bench]')" in result.output
    assert commands == []


def test_bench_refuses_a_file_that_is_not_there(commands: list[list[str]]) -> None:
    result = CliRunner().invoke(app, ["bench", "--compare", "/no/such/file.json"])
    assert result.exit_code == 2
    assert commands == []


def test_benchmarks_refuse_what_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    path.write_text("{}")
    assert program.main(["--compare", str(path), "--output", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err


def test_every_verb_has_a_file_of_benchmarks() -> None:
    missing = [name for name in program.FILES.values() if not (program.HERE / name).is_file()]
    assert not missing


@pytest.mark.slow
def test_benchmarks_of_one_verb_end_with_a_table_and_a_report(tmp_path: Path, capfd: Any) -> None:
    """The whole road, on the smallest selection: what it times is not looked at."""
    options = ["--verb", "sample", "--model", "smollm2-135m", "--backend", "cpu", "--threads", "1"]
    assert program.main([*options, "--passes", "1", "--budget", "0.001", "--output", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("sample[")]
    assert len(rows) == 6
    assert "ceilings of the cpu: " in out
    assert (tmp_path / "result.json").is_file()
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "roofline-cpu.png").is_file()
    measured = program.results.read(tmp_path / "result.json")
    assert all(0 < share <= 1 for one in measured.measurements if (share := measured.share(one)) is not None)
