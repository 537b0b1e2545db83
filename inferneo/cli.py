"""The `inferneo` command. Each command imports the engine when it runs, so `--help` never loads torch."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from inferneo import cli_options as options
from inferneo.cli_bench import bench
from inferneo.cli_errors import one_line_errors
from inferneo.cli_serve import serve

app = typer.Typer(
    help="Run Llama models on this machine, one token at a time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `inferneo` command."""
    app(prog_name="inferneo")


@app.command()
def generate(
    model: options.Model,
    prompt: options.Prompt,
    chat: options.AsChat = False,
    system: options.System = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    max_model_len: options.MaxModelLen = None,
) -> None:
    """Stream one answer to standard output, and its figures to standard error."""
    if system is not None and not chat:
        raise typer.BadParameter("a system prompt needs --chat", param_hint="--system")
    text = sys.stdin.read() if prompt == "-" else prompt
    with one_line_errors():
        from inferneo.cli_stream import Screen, figures, stream_answer, to_messages
        from inferneo_core import Engine, SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
        )
        screen = Screen(sys.stdout)
        with Engine(model, device=device, dtype=dtype, num_threads=threads, max_model_len=max_model_len) as engine:
            answer = stream_answer(engine, to_messages(system, text) if chat else text, params, screen.write)
        screen.write("\n")
        _note(figures(answer))
    if answer.interrupted:
        raise typer.Exit(130)


@app.command()
def chat(
    model: options.Model,
    system: options.System = None,
    max_tokens: options.AnswerTokens = None,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    max_model_len: options.MaxModelLen = None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer; /reset starts afresh; /quit, quit or Ctrl-D leaves."""
    with one_line_errors():
        from inferneo.cli_chat import Chat, read_line
        from inferneo.cli_stream import Screen
        from inferneo_core import Engine, SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        with Engine(model, device=device, dtype=dtype, num_threads=threads, max_model_len=max_model_len) as engine:
            Chat(engine, params, system, write=Screen(sys.stdout).write, note=_note).run(read_line)


@app.command()
def info(model: options.Model, context: options.Context = None) -> None:
    """Show what a model is and the memory it needs, without loading its weights."""
    with one_line_errors():
        from inferneo.cli_info import describe

        for name, value in describe(model, context):
            typer.echo(f"{name:<14}{value}")


app.command()(serve)
app.command()(bench)


def _show_version(wanted: bool) -> None:
    if wanted:
        from inferneo import __version__

        typer.echo(f"inferneo {__version__}")
        raise typer.Exit()


@app.callback()
def _before_any_command(
    verbose: options.Verbose = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    # Bytes that are no text reach the engine as surrogates, which it refuses by name; what the terminal's encoding
    # cannot show comes out as "?". The defaults of both would end in a traceback.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if verbose:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


def _note(line: str) -> None:
    typer.secho(line, err=True, dim=True)
