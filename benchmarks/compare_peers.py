"""This engine beside the others on the same model file, in turns: `make bench-peers`.

    python benchmarks/compare_peers.py [--threads N] [--rounds N] [--peers-python PATH] [--models DIR] [--only TITLE]

Each engine runs in a process of its own (peer_worker.py) that rests while another measures. Every figure is the median
over the rounds; a ratio is the median of the rounds' ratios to this engine, so that what the machine does to one round
it does to both. The floors are measured in each round. An engine that is not installed is listed as absent. All read
the same GGUF file but those whose name says otherwise (peer_models.py makes their formats of it).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from inferneo_benchmarks.floors import Floors, measure
from inferneo_benchmarks.peer_models import PeerModels

OURS = "inferneo"
WEIGHT_BYTES = 96.6e6  # read for every token that is decoded
OPERATIONS = 2 * 106.2e6  # integer multiply-adds in the layers' products, for every token of a prompt


class Task(NamedTuple):
    """One figure: what the workers are asked, and how many tokens that makes."""

    title: str
    command: dict[str, Any]
    num_tokens: int


TASKS = (
    Task("decode, short prompt", {"what": "decode", "context": 8, "tokens": 128}, 128),
    Task("decode at 2,048", {"what": "decode", "context": 2048, "tokens": 48}, 48),
    Task("decode at 8,000", {"what": "decode", "context": 8000, "tokens": 16}, 16),
    Task("prefill 128", {"what": "prefill", "tokens": 128}, 128),
    Task("prefill 512", {"what": "prefill", "tokens": 512}, 512),
    Task("first token of 16", {"what": "prefill", "tokens": 16}, 1),
    Task("8 streams, 128 + 128", {"what": "streams", "streams": 8, "prompt": 128, "tokens": 128}, 1024),
    Task("32 streams, 128 + 128", {"what": "streams", "streams": 32, "prompt": 128, "tokens": 128}, 4096),
)


class Contender(NamedTuple):
    """An engine on a file of the model.

    Attributes:
        name: as the table calls it.
        kind: one of peer_worker.py's engines.
        model: the file or directory, made if need be.
    """

    name: str
    kind: str
    model: Callable[[PeerModels], Path]


CONTENDERS = (
    Contender(OURS, "inferneo", lambda models: models.gguf),
    Contender("llama.cpp", "llama.cpp", lambda models: models.gguf),
    Contender("llama.cpp Q4_0", "llama.cpp", PeerModels.q4_0),
    Contender("openvino-genai", "openvino-genai", lambda models: models.gguf),
    Contender("onnxruntime-genai int4", "onnxruntime-genai", PeerModels.onnx),
    Contender("transformers bf16", "transformers", PeerModels.dense),
)


class Engine:
    """A worker process."""

    def __init__(self, name: str, kind: str, python: str, model: Path, threads: int) -> None:
        self.name = name
        worker = Path(__file__).with_name("peer_worker.py")
        self._process = subprocess.Popen(
            [python, str(worker), kind, str(model), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._commands, self._answers = self._process.stdin, self._process.stdout
        self.greeting: dict[str, Any] = self._read()

    @property
    def is_absent(self) -> bool:
        return "loaded" not in self.greeting

    def ask(self, command: dict[str, Any]) -> float:
        print(json.dumps(command), file=self._commands, flush=True)
        return float(self._read())

    def _read(self) -> Any:
        line = self._answers.readline()
        return json.loads(line) if line else {"absent": f"the worker ended with status {self._process.wait()}"}

    def close(self) -> None:
        self._commands.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers-python", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--engines", nargs="*", default=[], help="beginnings of the names of the peers to run")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of the titles of the tasks to run")
    parser.add_argument(
        "--models", type=Path, default=Path(".venv-peers/models"), help="where peer_models.py keeps them"
    )
    args = parser.parse_args()
    models = PeerModels(args.models, args.peers_python)
    chosen = [one for one in CONTENDERS if one.name == OURS or one.name.startswith(tuple(args.engines or [""]))]
    engines = list(started(chosen, models, args.peers_python, args.threads))
    try:
        for task in TASKS:
            if not args.only or any(task.title.startswith(begin) for begin in args.only):
                compare(task, engines, args.rounds, args.threads)
        for engine in engines:
            memory = engine.ask({"what": "memory"}) / 1e6
            print(f"{engine.name}: loaded in {engine.greeting['loaded']:.2f} s, {memory:.0f} MB at most")
    finally:
        for engine in engines:
            engine.close()


def started(contenders: list[Contender], models: PeerModels, peers_python: str, threads: int) -> Iterator[Engine]:
    """The engines that are installed, this one first; says which are not."""
    for name, kind, find_model in contenders:
        try:
            engine = Engine(name, kind, sys.executable if name == OURS else peers_python, find_model(models), threads)
        except RuntimeError as error:
            print(f"{name}: absent ({error})", flush=True)
            continue
        print(f"{name}: " + (f"absent ({engine.greeting['absent']})" if engine.is_absent else "ready"), flush=True)
        if not engine.is_absent:
            yield engine


def compare(task: Task, engines: list[Engine], rounds: int, threads: int) -> None:
    """Run one task in turns and print its rows."""
    seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    floors = []
    for _ in range(rounds):
        floors.append(measure(threads))
        for engine in engines:
            seconds[engine.name].append(engine.ask(task.command))
    print(f"\n{task.title}")
    for name, times in seconds.items():
        ours = seconds[OURS]
        ratio = median(other / own for other, own in zip(times, ours, strict=True))
        share = median(floor_seconds(task, floor) / time for floor, time in zip(floors, times, strict=True))
        print(
            f"  {name:22} {median(times) * 1e3:9.1f} ms {task.num_tokens / median(times):9.1f} tok/s   "
            f"{ratio:5.2f} x our time   {share:4.0%} of the machine's floor"
        )


def floor_seconds(task: Task, floors: Floors) -> float:
    """The least time the task can take: reading the weights for each decoded token, or the products' operations."""
    if task.command["what"] == "decode":
        return task.num_tokens * WEIGHT_BYTES / (floors.read_gb_s * 1e9)
    tokens = task.command["tokens"]
    if task.command["what"] == "streams":
        tokens = task.command["streams"] * (task.command["prompt"] + tokens)
    return float(tokens * OPERATIONS / (floors.int8_gop_s * 1e9))


if __name__ == "__main__":
    main()
