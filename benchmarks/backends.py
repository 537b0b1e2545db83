"""The backends, each as something that runs a verb many times in a row at its own speed.

What is timed is a *program*: one verb called once on each of several copies of its weights or caches. The copies
together are larger than any cache, so every call finds its operands in memory, as in a model, where the other layers
come in between. A program is what the engine would run: a tape on CpuOps, a CUDA graph on a GPU, plain calls in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from inferneo_benchmarks.counts import Count
from inferneo_benchmarks.models import DENSE_BYTES, Storage
from torch import Tensor

from inferneo_core.batch import AttentionMetadata
from inferneo_core.ops import select_ops
from inferneo_core.ops.base import Linear, Ops
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.cpu_tape import TapeRecorder

MAX_COPIES = 640
GPU_COLD_BYTES = 2**28  # five times the L2 of an H100
OPERATIONS = {"cpu": 10**9, "cuda": 4 * 10**12}  # a program's, some ms: beyond, memory is not what bounds it
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Program = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One verb at one shape, ready to run.

    Attributes:
        call: call(ops, inputs, copy) runs the verb once on one copy of its weights or caches; gives its result.
        inputs: activations; all copies share them, as they would lie in a cache in a model too.
        num_copies: of the weights or caches.
        is_eager: the verb is no part of a CPU tape; it is called by itself.
        positions, slot_mapping, attention, rows: of the step, for the verbs that read them.
    """

    call: Callable[[Any, tuple[Tensor, ...], int], Tensor]
    inputs: tuple[Tensor, ...]
    num_copies: int
    is_eager: bool = False
    positions: Tensor | None = None
    slot_mapping: Tensor | None = None
    attention: AttentionMetadata | None = None
    rows: Tensor | None = None
    keep: tuple[Any, ...] = field(default=(), repr=False)  # what the call reads and nobody else holds


class Backend:
    """One backend on its device.

    Args:
        name: "torch", "cpu" or "triton".
        weights: GGUF name of the type that weights are stored in.
        num_threads: of a CPU.
    """

    def __init__(self, name: str, weights: str, num_threads: int) -> None:
        self.name = name
        self.device = torch.device("cuda" if name == "triton" or (name == "torch" and has_gpu()) else "cpu")
        is_dense = weights in DENSE_BYTES
        dtype = TORCH_DTYPES[weights] if is_dense else torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.ops: Ops = select_ops(name, self.device, dtype, num_threads=num_threads if name == "cpu" else None)
        self.storage = Storage(
            weights=weights if is_dense or name != "torch" else {4: "F32", 2: "BF16"}[dtype.itemsize],
            activation_bytes=self.ops.dtype.itemsize,
            cache_bytes=self.cache_dtype.itemsize,
        )

    @property
    def cache_dtype(self) -> torch.dtype:
        """What the engine would choose: CpuOps keeps bf16, the others their own."""
        return torch.bfloat16 if self.name == "cpu" else self.ops.dtype

    def compute(self, verb: str) -> str:
        """The type whose multiply-adds bound a verb here: a key of Ceilings.operations_per_s."""
        if verb in ("sample", "score") or (verb == "attention" and self.name != "triton"):
            return "fp32"
        if self.name == "cpu":
            return "fp32" if self.storage.weights in DENSE_BYTES else "int8"
        return "fp32" if self.ops.dtype == torch.float32 else "bf16"

    def num_copies(self, count: Count) -> int:
        """How many copies of what a call reads no cache holds, unless so many calls would take long."""
        cold = GPU_COLD_BYTES if self.device.type == "cuda" else 4 * last_level_cache_bytes()
        affordable = max(1, OPERATIONS[self.device.type] // count.num_operations)
        return min(MAX_COPIES, affordable, -(-cold // count.num_bytes))

    def copies(self, linear: Linear, num_copies: int) -> list[Linear]:
        """A prepared weight, so many times in memory."""
        if not isinstance(self.ops, CpuOps):
            return [self.ops.prepare(_clone(linear)) for _ in range(num_copies)]
        packed = self.ops.prepare(linear)
        stride = -(-packed.weight.numel() // 64) * 64
        memory: Tensor = torch.ops.inferneo.weight_memory(stride * num_copies)
        copies = []
        for copy in range(num_copies):
            place = memory[copy * stride :][: packed.weight.numel()].view(packed.weight.shape)
            copies.append(packed.with_data(place.copy_(packed.weight), None))
        return copies

    def program(self, case: Case) -> Program:
        """What runs the case once on every copy."""
        if isinstance(self.ops, CpuOps) and not case.is_eager:
            return self._tape(self.ops, case)
        return self._graph(case) if self.device.type == "cuda" else self._calls(case)

    def _calls(self, case: Case) -> Program:
        def run() -> None:
            with torch.inference_mode():
                for copy in range(case.num_copies):
                    case.call(self.ops, case.inputs, copy)

        return run

    def _tape(self, ops: CpuOps, case: Case) -> Program:
        tape = TapeRecorder()
        inputs = tuple(map(tape.input, case.inputs))
        for copy in range(case.num_copies):
            case.call(tape, inputs, copy)

        def run() -> None:
            tape.run(
                ops.team,
                positions=case.positions,
                slot_mapping=case.slot_mapping,
                attention=case.attention,
                rows=case.rows,
            )

        return run

    def _graph(self, case: Case) -> Program:
        calls = self._calls(case)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            calls()  # compiles
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        return graph.replay


def has_gpu() -> bool:
    return torch.cuda.is_available()


def last_level_cache_bytes() -> int:
    """Of this machine's largest cache; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(sizes, default=32 * 2**20)


def _clone(linear: Linear) -> Linear:
    """The same weight elsewhere: a dense one in order is prepared without a copy."""
    (segment,) = linear.segments
    return Linear((type(segment)(segment.data.clone(), segment.quant_type),), linear.in_features)
