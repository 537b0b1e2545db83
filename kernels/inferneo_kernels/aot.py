"""Ahead-of-time compilation: every kernel at its production configuration, for chips that this machine does not have.

Triton needs a driver to run a kernel, not to compile one. So without any GPU this measures what decides whether a
configuration can be fast: registers, spills, shared memory, and whether the tensor-core, async-copy and 16-byte-load
instructions that the kernel counts on are in its PTX.

    python -m inferneo_kernels.aot --report           # the table, in Markdown
    python -m inferneo_kernels.aot --json             # one JSON object a line
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import inferneo_kernels

CHIPS = (80, 90, 100, 120)  # A100, H100 and H200, B200, RTX 50
# Bytes of shared memory that a CTA can have.
SHARED_LIMIT = MappingProxyType({80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024})
INSTRUCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "mma.sync": r"\bmma\.sync\.",
        "wgmma": r"\bwgmma\.mma_async\.",
        "tcgen05": r"\btcgen05\.mma\.",
        "cp.async": r"\bcp\.async\.c[ag]\.",
        "ld.v4": r"\bld\.global[\w.:]*\.(?:v4\.[bfsu]32|v8\.[bfsu]32|v2\.[bfsu]64|v4\.[bfsu]64)",  # 16 bytes or more
    }
)
# What AotCase.expect may name, as the instructions of which one must be there.
EXPECTATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "mma": ("mma.sync", "wgmma", "tcgen05"),
        "wgmma": ("wgmma",),
        "cp.async": ("cp.async",),
        "ld.v4": ("ld.v4",),
    }
)


@dataclass(frozen=True, slots=True)
class AotCase:
    """One kernel at one production configuration.

    Attributes:
        name: unique within its module.
        kernel: the @triton.jit function.
        signature: the type of each argument that is no constexpr: "*bf16", "*fp32", "i32", "i64", "fp32", ...
        constexprs: the value of each that is.
        num_warps, num_stages: as the launcher passes them.
        divisible_by_16: pointers and integers known to be multiples of 16, as Triton finds them at launch.
        expect: which of EXPECTATIONS the PTX must hold; "wgmma" is asked of sm_90 only.
        chips: compute capabilities, as 90 for sm_90.
        enable_fp_fusion: whether multiply and add may fuse; False where bits are defined without it.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...] = ()
    expect: tuple[str, ...] = ()
    chips: tuple[int, ...] = CHIPS
    enable_fp_fusion: bool = True


@dataclass(frozen=True, slots=True)
class AotReport:
    """What the compiler made of one case on one chip.

    Attributes:
        module, kernel, case, chip: which one.
        num_warps, num_stages: its configuration.
        registers: a thread.
        stack_bytes: a thread; above 0 the kernel spills.
        shared_bytes: a CTA.
        counts: how often each of INSTRUCTIONS stands in the PTX.
        problems: what is wrong with it, in words; empty when nothing is.
    """

    module: str
    kernel: str
    case: str
    chip: int
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    counts: Mapping[str, int]
    problems: tuple[str, ...]


def compile_case(case: AotCase, chip: int) -> AotReport:
    """Compile a case for a chip; Triton's cache on disk answers when nothing has changed.

    Raises:
        TypeError: the kernel is interpreted (TRITON_INTERPRET was set), or an argument of it has no type and no value.
        KeyError: `expect` names what is no expectation.
    """
    if not isinstance(case.kernel, triton.runtime.JITFunction):
        kind = type(case.kernel).__name__
        raise TypeError(f"{case.name}: the kernel is of type {kind} (unset TRITON_INTERPRET to compile it)")
    arguments = case.kernel.arg_names
    given = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    if set(given) != set(arguments):
        raise TypeError(f"{case.name}: {sorted(set(given) ^ set(arguments))} are not in both the case and the kernel")
    source = ASTSource(
        fn=case.kernel,
        signature={name: given[name] for name in arguments},
        constexprs={(arguments.index(name),): value for name, value in case.constexprs.items()},
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16},
    )
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.enable_fp_fusion,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    registers, stack_bytes = _resource_usage(compiled.asm["cubin"])
    counts = {name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in INSTRUCTIONS.items()}
    return AotReport(
        module=case.kernel.__module__.rpartition(".")[2],
        kernel=case.kernel.__name__,
        case=case.name,
        chip=chip,
        num_warps=case.num_warps,
        num_stages=case.num_stages,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=compiled.metadata.shared,
        counts=counts,
        problems=tuple(_problems(case, chip, stack_bytes, compiled.metadata.shared, counts)),
    )


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, as cuobjdump reads them from the binary."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text
    return int(usage[1]), int(usage[2])


def _problems(
    case: AotCase, chip: int, stack_bytes: int, shared_bytes: int, counts: Mapping[str, int]
) -> Iterator[str]:
    """What makes the compiled case unfit, each as a phrase that follows its name."""
    if stack_bytes:
        yield f"spills {stack_bytes} bytes a thread"
    if shared_bytes > SHARED_LIMIT[chip]:
        yield f"needs {shared_bytes:,} bytes of shared memory; sm_{chip} has {SHARED_LIMIT[chip]:,}"
    for expected in case.expect:
        if not any(counts[name] for name in EXPECTATIONS[expected]) and (expected != "wgmma" or chip == 90):
            yield f"has no {expected} instruction"


def discover() -> dict[str, tuple[AotCase, ...]]:
    """The cases of every kernel module, by the module's name."""
    found = {}
    for info in pkgutil.iter_modules(inferneo_kernels.__path__):
        module = importlib.import_module(f"inferneo_kernels.{info.name}")
        if hasattr(module, "aot_cases"):
            found[info.name] = tuple(module.aot_cases())
    return found


def reports(jobs: int, only: str = "") -> Iterator[AotReport]:
    """Compile every case whose "module case" holds `only`, for each of its chips, in `jobs` processes."""
    work = [
        (module, index, chip)
        for module, cases in discover().items()
        for index, case in enumerate(cases)
        for chip in case.chips
        if only in f"{module} {case.name}"
    ]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_one, work, chunksize=4)


def _compile_one(item: tuple[str, int, int]) -> AotReport:
    module, index, chip = item
    case = importlib.import_module(f"inferneo_kernels.{module}").aot_cases()[index]
    return replace(compile_case(case, chip), module=module)


def table(rows: Iterator[AotReport]) -> str:
    """The reports as a Markdown table."""
    head = ("kernel", "case", "chip", "warps", "stages", "registers", "stack B", "shared B", *INSTRUCTIONS, "problems")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * 3 + " ---: |" * (len(head) - 4) + " --- |"]
    for row in rows:
        numbers = (
            row.num_warps,
            row.num_stages,
            row.registers,
            row.stack_bytes,
            row.shared_bytes,
            *row.counts.values(),
        )
        cells = (row.kernel, row.case, f"sm_{row.chip}", *map(str, numbers), "; ".join(row.problems))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    description = "Compile every kernel for every chip; needs no GPU."
    parser = argparse.ArgumentParser(prog="python -m inferneo_kernels.aot", description=description)
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--report", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--only", default="", help='compile only the cases whose "module name" holds this')
    arguments = parser.parse_args()
    rows = reports(arguments.jobs, arguments.only)
    if arguments.report:
        print(table(rows))
    else:
        for row in rows:
            print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    importlib.import_module("inferneo_kernels.aot").main()  # not this copy: worker processes look functions up there
