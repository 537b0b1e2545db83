"""The `inferneo` command as a process of its own: what it loads, broken pipes, interrupts."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A program that runs the command with an engine whose answers never end.
ENDLESS = """
import itertools, signal
import inferneo_core
from inferneo.cli import main
from inferneo_core.outputs import Timings, TokenOutput

class Endless:
    def __init__(self, *args, **kwargs): ...
    def __enter__(self): return self
    def __exit__(self, *exc_info): ...
    def stream(self, prompt, params): return Endless()
    def __iter__(self):
        for index in itertools.count():
            yield TokenOutput("text ", 0, index, None, None, None, Timings(0, 0, 0, 0, 0, 0))

inferneo_core.Engine = Endless
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with interrupts ignored
main()
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["generate", "--help"], ["chat", "--help"], ["info", "-h"], ["serve", "-h"]]
)
def test_help_loads_neither_torch_nor_the_engine(arguments):
    code = """
import sys
from inferneo.cli import main
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
loaded = {"torch", "numpy", "inferneo_core", "openai", "fastapi", "uvicorn"} & set(sys.modules)
assert not loaded, loaded
"""
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage: inferneo" in result.stdout


def test_broken_pipe_is_quiet():
    command = [sys.executable, "-c", ENDLESS, "generate", "m", "Hi"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(4)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


def test_full_disk_is_one_line():
    command = [sys.executable, "-c", ENDLESS, "generate", "m", "Hi"]
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert result.stderr == "error: cannot write the answer: No space left on device\n"


def test_interrupt_while_the_engine_is_imported_ends_the_command(tmp_path):
    (tmp_path / "inferneo_core").mkdir()
    swallowing = "try:\n    print('importing', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n    pass\n"
    (tmp_path / "inferneo_core/__init__.py").write_text(f"import time\n{swallowing}")
    code = f"""
import signal, sys
from inferneo.cli import main
sys.path.insert(0, {str(tmp_path)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
    command = [sys.executable, "-c", code, "generate", "m", "Hi"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == -signal.SIGINT
        assert process.stderr.read() == b""


def test_chat_survives_a_real_interrupt(tmp_path):
    command = [sys.executable, "-c", ENDLESS, "chat", "m"]
    notes = tmp_path / "notes"
    with (
        notes.open("wb") as stderr,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(2):
            process.stdin.write(b"Hi\n")
            process.stdin.flush()
            assert process.stdout.read(5) == b"text "
            process.send_signal(signal.SIGINT)
            while process.stdout.read(1) != b"\n":
                pass
        process.stdin.write(b"quit\n")
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait(timeout=60) == 0
    assert notes.read_text().count("first token after") == 2
