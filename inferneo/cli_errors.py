"""How the commands end when something is refused."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer


class OutputError(Exception):
    """Standard output takes no more; its text says why."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an InferneoError or an OutputError into one line on standard error and exit code 1."""
    with _interrupts_kill():
        from inferneo_core.errors import InferneoError

    try:
        yield
    except (InferneoError, OutputError) as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error


@contextmanager
def _interrupts_kill() -> Iterator[None]:
    """A block that Ctrl-C leaves at once: torch, while it is imported, swallows a KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:  # somebody else's, or ignored
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
