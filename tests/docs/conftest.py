"""What the documentation promises is run as a reader would: commands in a shell, programs against a real server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MAKE = shutil.which("make")
MODEL = "smollm2-135m-instruct"
GUIDE_MODEL = "meta-llama/Llama-2-7b-chat-hf"
TIMEOUT = 300  # seconds until a process has failed; a machine may be slow
SERVE = f"inferneo serve {MODEL} --threads 1 --served-model-name {MODEL} --served-model-name {GUIDE_MODEL}"


class Server:
    """A running `inferneo serve`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str) -> str:
        """The text at a path."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=TIMEOUT) as response:
            return str(response.read().decode())

    def generated_tokens(self) -> int:
        """How many tokens the server has generated so far, by its own count."""
        return self._figures("generation_tokens_total")[""]

    def statuses(self) -> Counter[str]:
        """How many completions ended with each status so far, once none is open any more."""
        deadline = time.monotonic() + TIMEOUT
        while self._figures("num_requests_open")[""]:
            assert time.monotonic() < deadline, "a request has not ended"
        return self._figures("requests_total", "status")

    def _figures(self, name: str, label: str = "") -> Counter[str]:
        """The values of one metric, summed by a label; without one, all of them."""
        found: Counter[str] = Counter()
        for labels, value in re.findall(rf"^inferneo:{name}{{(.*)}} (\S+)$", self.get("/metrics"), re.MULTILINE):
            found[dict(re.findall(r'(\w+)="([^"]*)"', labels))[label] if label else ""] += int(float(value))
        return found


@contextmanager
def serving(command: str, port: int) -> Iterator[Server]:
    """Run a serve command in bash until it listens on `port`; at the end it must go down in order."""
    command = f"{command.strip()} --port {port}"
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    with subprocess.Popen(
        ["bash", "-c", command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if f":{port}" in line:
                    break
            else:
                pytest.fail(f"`{command}` ended before it listened:\n{''.join(said)}")
            rest = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
            rest.start()  # a full pipe would stop the server
            yield Server(f"http://127.0.0.1:{port}")
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT) == 0, "".join(said)
            rest.join(TIMEOUT)
        finally:
            process.kill()


@pytest.fixture
def serve_briefly() -> Callable[[str], AbstractContextManager[Server]]:
    """serve_briefly(command) runs a serve command on a free port instead of its own."""
    return lambda command: serving(command, free_port())


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(default_model: Path) -> Iterator[Server]:
    """The default model under its own name and the guide's, on port 8000, where the guide looks for it."""
    if not is_free(8000):
        pytest.fail(
            "port 8000 is taken, and the documentation's snippets speak to http://localhost:8000: stop what listens "
            "there (`ss -ltnp 'sport = :8000'` shows it) and run the tests again"
        )
    with serving(SERVE, 8000) as running:
        yield running


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """shell(script, stdin="") runs a script in bash as if in the project's folder, but cannot change anything there.

    `make` shows what it would do, so a target or variable that does not exist is an error and nothing is built.
    """
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    commands = {"inferneo": BIN / "inferneo", "python": sys.executable, "make": f"env -u MAKEFLAGS {MAKE} -n -C {ROOT}"}
    for name, command in commands.items():
        (binaries / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (binaries / name).chmod(0o755)
    for folder in ("examples", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)

    def run(script: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
        command = ["bash", "-euo", "pipefail", "-c", script]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    return run
