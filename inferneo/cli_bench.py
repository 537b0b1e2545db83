"""`inferneo bench`: every verb against this machine's roofline."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

# The benchmarks' own names, repeated so that the help loads none of them.
VERBS = (
    "qkv_rope_store, attention, linear_add, gate_up_silu, lm_head, sample, model, products, engine, load, tokenizer, "
    "server"
)
NEEDED = ("matplotlib", "pytest", "pytest_benchmark")


def bench(
    verb: Annotated[
        list[str] | None, Option(help=f"Only this verb, or part of the engine: {VERBS}. May be repeated.")
    ] = None,
    model: Annotated[
        list[str] | None, Option(help="Only this model's shapes, such as llama-3.2-1b. May be repeated.")
    ] = None,
    backend: Annotated[list[str] | None, Option(help="Only this backend: torch, cpu or triton.")] = None,
    full: Annotated[bool, Option("--full", help="Every model, type and shape, not only the quick ones.")] = False,
    compare: Annotated[
        Path | None, Option(help="The result.json of an earlier run to compare with.", exists=True, dir_okay=False)
    ] = None,
    output: Annotated[Path, Option(help="Folder of the result and the report.")] = Path("inferneo-bench"),
    passes: Annotated[int, Option(help="Processes; a comparison needs three or more.", min=1)] = 5,
    threads: Annotated[int | None, Option(help="CPU threads; otherwise every core.", min=1)] = None,
) -> None:
    """Time every verb against this machine's roofline; write a table, a result and a report."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        typer.secho(
            f"error: the benchmarks need {', '.join(missing)} (pip install 'inferneo[bench]')",
            err=True,
            fg=typer.colors.RED,
        )
        raise typer.Exit(1)
    command = [sys.executable, "-m", "inferneo_benchmarks", "--output", str(output), "--passes", str(passes)]
    for option, values in (("--verb", verb), ("--model", model), ("--backend", backend)):
        for value in values or ():
            command += [option, value]
    command += ["--full"] if full else []
    command += ["--compare", str(compare)] if compare is not None else []
    command += ["--threads", str(threads)] if threads is not None else []
    # A process of its own: the benchmarks take over torch's threads, and pytest's options are theirs.
    raise typer.Exit(subprocess.run(command, check=False).returncode)
