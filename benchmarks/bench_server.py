"""What the server costs: 64 streams over HTTP against the same engine alone, with one thread for the engine in both.

The engine alone, and the engine's thread inside the server, run on one core; the server's event loop and the client
share another. Arms take turns; the share is the ratio of their medians.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import pytest
from inferneo_benchmarks.server_worker import TOTAL_TOKENS
from inferneo_benchmarks.timing import CpuMeter, Samples

pytestmark = [pytest.mark.backend("cpu"), pytest.mark.model("smollm2-135m"), pytest.mark.full]
NUM_ROUNDS = 2  # of each arm, a pass; half a minute


class Worker:
    """A process of server_worker.py."""

    def __init__(self, *arguments: Any) -> None:
        command = [sys.executable, "-m", "inferneo_benchmarks.server_worker", *map(str, arguments)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.greeting = self._read()

    def round(self, salt: int) -> float:
        """Seconds of one round."""
        assert self._process.stdin is not None
        print(salt, file=self._process.stdin, flush=True)
        return float(self._read())

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, f"a worker ended with status {self._process.wait()}"
        return line


@contextmanager
def arms() -> Iterator[dict[str, Worker]]:
    """Who is asked for a round of each arm."""
    engine_core, core = sorted(os.sched_getaffinity(0))[:2]
    with ExitStack() as stack:

        def start(*arguments: Any) -> Worker:
            worker = Worker(*arguments)
            stack.callback(worker.stop)
            return worker

        server = start("server", engine_core, core)
        yield {"engine": start("engine", engine_core), "server": start("client", core, server.greeting)}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the engine has a core to itself")
def test_server_beside_its_engine(benchmark: Any, record: Callable[..., Any], cpu_meter: CpuMeter) -> None:
    found = {"engine": Samples(), "server": Samples()}
    with arms() as workers:
        for salt in range(NUM_ROUNDS):
            for arm, worker in workers.items():
                found[arm].probe_seconds.append(cpu_meter.probe("python"))
                found[arm].seconds.append(worker.round(salt))
    benchmark.pedantic(lambda: None)  # the time is the other processes' own
    one = record("server", found["server"], cpu_meter, "python")
    alone = median(found["engine"].seconds)
    one.facts["tokens_per_s"] = round(TOTAL_TOKENS / one.median_s, 1)
    one.facts["engine_tokens_per_s"] = round(TOTAL_TOKENS / alone, 1)
    one.facts["share_of_engine"] = round(alone / one.median_s, 3)
    benchmark.extra_info.update(one.facts)
