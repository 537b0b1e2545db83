"""`inferneo serve`: from the command line's options to a running server."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer import Option

from inferneo import cli_options as options
from inferneo.cli_errors import one_line_errors

_NAMES = "Names and doors"
_LIMITS = "Limits"
NEEDED = ("fastapi", "prometheus_client", "uvicorn", "httptools", "websockets")


def _limit(help: str, default: str) -> Any:
    """A limit's option. Its default is ServerSettings' own, which the help repeats without loading the server."""
    return Option(help=f"{help} Default: {default}.", rich_help_panel=_LIMITS)


def serve(
    model: options.Model,
    served_model_name: Annotated[
        list[str] | None, Option(help="What requests call the model. May be repeated.", rich_help_panel=_NAMES)
    ] = None,
    host: Annotated[
        str, Option(help="Where to listen; 0.0.0.0 lets other machines in.", rich_help_panel=_NAMES)
    ] = "127.0.0.1",
    port: Annotated[int, Option(help="0 takes a free one.", min=0, max=65535, rich_help_panel=_NAMES)] = 8000,
    api_key: Annotated[
        str | None, Option(help="What clients must send.", envvar="INFERNEO_API_KEY", rich_help_panel=_NAMES)
    ] = None,
    allowed_host: Annotated[
        list[str] | None, Option(help="Another Host header to accept; * takes any.", rich_help_panel=_NAMES)
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, Option(help="A web page's origin to let in; * takes any.", rich_help_panel=_NAMES)
    ] = None,
    ui: Annotated[bool, Option("--ui/--no-ui", help="Serve the chat page at /.", rich_help_panel=_NAMES)] = True,
    max_queued: Annotated[int | None, _limit("Requests that may wait for the engine.", "1024")] = None,
    max_connections: Annotated[int | None, _limit("Clients connected at once.", "1024")] = None,
    max_body_bytes: Annotated[int | None, _limit("Bytes of one request.", "4194304")] = None,
    max_prompt_chars: Annotated[int | None, _limit("Characters of text in one request.", "1048576")] = None,
    max_messages: Annotated[int | None, _limit("Messages of one chat.", "1024")] = None,
    max_choices: Annotated[int | None, _limit("Answers to one request.", "128")] = None,
    max_request_seconds: Annotated[float | None, _limit("From a request to its last token.", "600")] = None,
    slow_reader_seconds: Annotated[float | None, _limit("For a client to take something.", "30")] = None,
    shutdown_seconds: Annotated[float | None, _limit("For streams to end after a signal.", "10")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = 64,
) -> None:
    """Serve a model over HTTP and WebSocket, as the OpenAI API does."""
    limits = {
        "max_queued": max_queued,
        "max_connections": max_connections,
        "max_body_bytes": max_body_bytes,
        "max_prompt_chars": max_prompt_chars,
        "max_messages": max_messages,
        "max_choices": max_choices,
        "max_request_seconds": max_request_seconds,
        "slow_reader_seconds": slow_reader_seconds,
        "shutdown_seconds": shutdown_seconds,
    }
    settings = {
        "served_model_names": tuple(served_model_name or (model,)),
        "host": host,
        "port": port,
        "api_key": api_key,
        "allowed_hosts": tuple(allowed_host or ()),
        "allowed_origins": tuple(allowed_origin or ()),
        "show_ui": ui,
        **{name: value for name, value in limits.items() if value is not None},
    }
    engine_arguments = {
        "device": device,
        "dtype": dtype,
        "num_threads": threads,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
    }
    with one_line_errors():
        serve_model(model, engine_arguments, settings, announce=lambda line: typer.echo(line, err=True))


def serve_model(
    model: str, engine_arguments: dict[str, Any], settings: dict[str, Any], announce: Callable[[str], None]
) -> None:
    """Load a model and serve it until a signal ends it.

    Args:
        model: a name, as AsyncEngine takes it.
        engine_arguments: of AsyncEngine.
        settings: of ServerSettings.
        announce: takes the lines meant for the person who started it.
    Raises:
        BackendUnavailable: the server's libraries are missing.
        ConfigError, ModelError: the model, an option or the address is refused.
    """
    from inferneo_core import AsyncEngine
    from inferneo_core.errors import BackendUnavailable

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"{', '.join(missing)} cannot be imported (pip install 'inferneo[server]')")
    from inferneo.server.serve import bind, serve as run
    from inferneo.server.settings import ServerSettings

    checked = ServerSettings(**settings)
    with bind(checked) as listener:  # first: loading takes seconds, and the port may be taken
        run(AsyncEngine(model, **engine_arguments), checked, listener, announce)
