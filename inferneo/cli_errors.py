"""How the commands end when something is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an InferneoError into one line on standard error and exit code 1."""
    from inferneo_core.errors import InferneoError

    try:
        yield
    except InferneoError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
