"""`inferneo generate` and `inferneo chat`: streams, exit codes and words, most of them with a fake engine behind."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
from typer.testing import CliRunner

import inferneo_core
from inferneo import __version__
from inferneo.cli import app
from inferneo.cli_chat import Chat
from inferneo.cli_stream import Answer, Screen, figures, stream_answer
from inferneo_core import Engine, SamplingParams
from inferneo_core.errors import EngineClosed, InvalidPrompt, ModelNotFound
from inferneo_core.outputs import Timings, TokenOutput

TIMINGS = Timings(queued_ms=1.0, prefill_ms=20.4, ttft_ms=21.4, decode_ms=100.0, tokens_per_s=12.34, cached_tokens=0)


class FakeStream:
    """Yields the given texts; an exception among them is raised in its turn."""

    def __init__(self, script: tuple[str | BaseException, ...]) -> None:
        self.script = script
        self.closed = False

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.closed = True

    def __iter__(self) -> Iterator[TokenOutput]:
        for index, item in enumerate(self.script):
            if isinstance(item, BaseException):
                raise item
            yield TokenOutput(item, index, index, None, None, None, TIMINGS)


class FakeEngine:
    """Answers each prompt with the next script, and remembers what it was asked."""

    def __init__(self, *scripts: tuple[str | BaseException, ...]) -> None:
        self.scripts = list(scripts)
        self.prompts: list[Any] = []
        self.params: list[SamplingParams] = []
        self.streams: list[FakeStream] = []
        self.arguments: dict[str, Any] = {}
        self.closed = False

    def open(self, model: str, **arguments: Any) -> FakeEngine:
        self.arguments = {"model": model, **arguments}
        return self

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.closed = True

    def stream(self, prompt: Any, params: SamplingParams) -> FakeStream:
        self.prompts.append(prompt)
        self.params.append(params)
        self.streams.append(FakeStream(self.scripts.pop(0)))
        return self.streams[-1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """run(engine, *arguments, input=None): the command with `engine` behind it; the engine must end up closed."""

    def run(engine: FakeEngine, *arguments: str, input: str | None = None):
        monkeypatch.setattr(inferneo_core, "Engine", engine.open)
        result = CliRunner().invoke(app, list(arguments), input=input)
        assert engine.closed
        return result

    return run


def test_version_is_that_of_the_package():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"inferneo {__version__}\n")


def test_no_command_shows_the_help():
    result = CliRunner().invoke(app, [])
    assert result.exit_code in (0, 2)  # typer changed its mind about this one
    assert all(command in result.output for command in ("generate", "chat", "info"))


# generate


def test_generate_streams_to_stdout_and_puts_figures_on_stderr(run):
    result = run(FakeEngine(("Hello", "", " wörld")), "generate", "some-model", "Hi")
    assert result.exit_code == 0
    assert result.stdout == "Hello wörld\n"
    assert result.stderr == "3 tokens, first token after 21 ms, 12.3 tokens/s\n"


def test_generate_passes_every_option_on(run):
    engine = FakeEngine(("x",))
    options = (
        "--max-tokens 7 --temperature 0.5 --top-k 40 --top-p 0.9 --min-p 0.05 --repetition-penalty 1.1 --seed 3 "
        "--stop END --stop STOP --device cpu --dtype float32 --threads 2 --max-model-len 99"
    )
    run(engine, "generate", "some-model", "Hi", *options.split())
    assert engine.prompts == ["Hi"]
    assert engine.arguments == {
        "model": "some-model",
        "device": "cpu",
        "dtype": "float32",
        "num_threads": 2,
        "max_model_len": 99,
    }
    assert engine.params == [
        SamplingParams(
            max_tokens=7,
            temperature=0.5,
            top_k=40,
            top_p=0.9,
            min_p=0.05,
            repetition_penalty=1.1,
            seed=3,
            stop=("END", "STOP"),
        )
    ]


def test_generate_chat_sends_messages(run):
    engine = FakeEngine(("x",), ("x",))
    run(engine, "generate", "m", "Hi", "--chat")
    run(engine, "generate", "m", "Hi", "--chat", "--system", "Be brief.")
    user = {"role": "user", "content": "Hi"}
    assert engine.prompts == [[user], [{"role": "system", "content": "Be brief."}, user]]


def test_generate_reads_the_prompt_from_stdin(run):
    engine = FakeEngine(("x",))
    run(engine, "generate", "m", "-", input="two\nlines\n")
    assert engine.prompts == ["two\nlines\n"]


def test_generate_interrupted_closes_the_stream_and_exits_130(run):
    engine = FakeEngine(("some", " text", KeyboardInterrupt()))
    result = run(engine, "generate", "m", "Hi")
    assert (result.exit_code, result.stdout) == (130, "some text\n")
    assert result.stderr.startswith("2 tokens, ")
    assert engine.streams[0].closed


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "m", "Hi", "--top-p", "0"], 1, "error: top_p is 0.0; it is in (0, 1] (1 keeps every token)\n"),
        (["generate", "m", "Hi", "--temperature", "nan"], 1, "error: temperature is nan; "),
        (["generate", "m", "Hi", "--max-tokens", "0"], 1, "error: max_tokens is 0; "),
        (["generate", "m", "Hi", "--stop", ""], 1, "error: "),
        (["generate", "/no/such/model", "Hi"], 1, "error: "),
        (["chat", "/no/such/model"], 1, "error: "),
        (["info", "/no/such/model"], 1, "error: "),
        (["generate", "m", "Hi", "--device", "toaster"], 1, "error: device is 'toaster'; it is one of "),
        (["generate", "m", "Hi", "--system", "x"], 2, "--chat"),
        (["generate", "m", "Hi", "--top-k", "many"], 2, "--top-k"),
        (["generate", "m"], 2, ""),
        (["info", "m", "--context", "0"], 2, "--context"),
        (["bogus"], 2, "bogus"),
    ],
)
def test_bad_input_is_explained_on_stderr(arguments, code, words):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stdout == ""
    if code == 1:
        assert result.stderr.count("\n") == 1


def test_generate_error_in_the_stream_is_one_line(run):
    result = run(FakeEngine((InvalidPrompt("the prompt is empty"),)), "generate", "m", "")
    assert (result.exit_code, result.stderr) == (1, "error: the prompt is empty\n")


def test_error_while_the_model_opens_is_one_line(monkeypatch):
    def fail(*args: object, **kwargs: object):
        raise ModelNotFound("there is no m")

    monkeypatch.setattr(inferneo_core, "Engine", fail)
    result = CliRunner().invoke(app, ["generate", "m", "Hi"])
    assert (result.exit_code, result.stderr) == (1, "error: there is no m\n")


# The pieces


def test_stream_answer_writes_each_token_as_it_comes():
    written: list[str] = []
    engine = FakeEngine(("a", "", "b"))
    answer = stream_answer(engine, "Hi", SamplingParams(), written.append)
    assert written == ["a", "", "b"]
    assert answer == Answer("ab", 3, TIMINGS, interrupted=False)


@pytest.mark.parametrize(
    ("num_tokens", "timings", "line"),
    [
        (0, None, "0 tokens"),
        (1, TIMINGS, "1 token, first token after 21 ms"),
        (2, TIMINGS, "2 tokens, first token after 21 ms, 12.3 tokens/s"),
    ],
)
def test_figures_say_only_what_was_measured(num_tokens, timings, line):
    assert figures(Answer("", num_tokens, timings, interrupted=False)) == line


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_screen_shows_control_characters_on_a_terminal_harmlessly():
    terminal, file = Terminal(), StringIO()
    hostile = "\x1b]0;title\x07 a\tb\nc\r\x9b2J\x7fé"
    Screen(terminal).write(hostile)
    Screen(file).write(hostile)
    assert terminal.getvalue() == "\ufffd]0;title\ufffd a\tb\nc\ufffd\ufffd2J\ufffdé"
    assert file.getvalue() == hostile


# chat


def converse(engine: FakeEngine, *lines: str | BaseException, system: str | None = None) -> tuple[Chat, str, list[str]]:
    """Feed `lines` to a Chat; returns it with what it wrote and noted."""
    script: Iterator[str | BaseException] = iter([*lines, EOFError()])

    def read() -> str:
        item = next(script)
        if isinstance(item, BaseException):
            raise item
        return item

    written: list[str] = []
    notes: list[str] = []
    chat = Chat(engine, SamplingParams(), system, write=written.append, note=notes.append)
    chat.run(read)
    return chat, "".join(written), notes


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_chat_remembers_the_conversation():
    engine = FakeEngine(("Hello", "!"), ("Fine.",))
    chat, written, _ = converse(engine, "Hi", "How are you?", system="Be kind.")
    first = [turn("system", "Be kind."), turn("user", "Hi")]
    second = [*first, turn("assistant", "Hello!"), turn("user", "How are you?")]
    assert engine.prompts == [first, second]
    assert chat.messages == [*second, turn("assistant", "Fine.")]
    assert written == "Hello!\nFine.\n\n"


@pytest.mark.parametrize("word", ["/quit", "quit", "/exit", "exit", "  quit  "])
def test_chat_leaves_on(word):
    engine = FakeEngine()
    converse(engine, word, "never read")
    assert engine.prompts == []


def test_chat_ignores_empty_lines():
    engine = FakeEngine()
    converse(engine, "", "   ")
    assert engine.prompts == []


def test_chat_reset_keeps_only_the_system_prompt():
    chat, _, notes = converse(FakeEngine(("a",)), "Hi", "/reset", system="Be kind.")
    assert chat.messages == [turn("system", "Be kind.")]
    assert notes[-1] == "The conversation starts afresh."


def test_chat_unknown_command_is_not_sent_to_the_model():
    engine = FakeEngine(("a",))
    _, _, notes = converse(engine, "/rest", "/etc/passwd holds what?")
    assert "There is no command /rest. " in notes[1]
    assert engine.prompts == [[turn("user", "/etc/passwd holds what?")]]


def test_chat_interrupt_stops_the_answer_and_keeps_what_was_said():
    engine = FakeEngine(("Once", " upon", KeyboardInterrupt()), ("ok",))
    _, _, notes = converse(engine, "Tell me a story", "Go on")
    assert engine.streams[0].closed
    assert engine.prompts[1] == [
        turn("user", "Tell me a story"),
        turn("assistant", "Once upon"),
        turn("user", "Go on"),
    ]
    assert notes[1].startswith("2 tokens, ")


def test_chat_interrupt_before_the_first_token_forgets_the_turn():
    engine = FakeEngine((KeyboardInterrupt(),), ("ok",))
    converse(engine, "Hi", "Hello")
    assert engine.prompts[1] == [turn("user", "Hello")]


def test_chat_interrupt_at_the_prompt_says_how_to_leave():
    engine = FakeEngine(("ok",))
    _, _, notes = converse(engine, KeyboardInterrupt(), "Hi")
    assert "/quit" in notes[1]
    assert len(engine.prompts) == 1


def test_chat_refused_message_is_dropped_and_the_chat_goes_on():
    engine = FakeEngine((InvalidPrompt("too long"),), ("ok",))
    chat, _, notes = converse(engine, "x" * 10, "Hi")
    assert notes[1] == "error: too long (the message was dropped; /reset starts afresh)"
    assert chat.messages == [turn("user", "Hi"), turn("assistant", "ok")]


def test_chat_ends_when_the_engine_does():
    with pytest.raises(EngineClosed):
        converse(FakeEngine((EngineClosed("gone"),)), "Hi", "never read")


def test_chat_command_answers_piped_lines(run):
    engine = FakeEngine(("Hello.",), ("Bye.",))
    result = run(engine, "chat", "m", "--system", "Be brief.", "--seed", "5", input="Hi\nThanks\nquit\n")
    assert (result.exit_code, result.stdout) == (0, "Hello.\nBye.\n")
    assert engine.params[0].seed == 5
    assert [len(prompt) for prompt in engine.prompts] == [2, 4]


# From end to end


def test_generate_prints_what_the_engine_streams(tiny_model):
    directory, params = tiny_model(), SamplingParams(max_tokens=16, temperature=0.9, seed=7)
    with Engine(directory) as engine:
        expected = "".join(token.text for token in engine.stream("Once upon", params))
    options = ["--max-tokens", "16", "--temperature", "0.9", "--seed", "7"]
    result = CliRunner().invoke(app, ["generate", str(directory), "Once upon", *options])
    assert (result.exit_code, result.stdout) == (0, expected + "\n")
    assert "tokens, first token after " in result.stderr


@pytest.mark.parametrize("prompt", ["", "caf\udce9"])
def test_generate_refuses_a_prompt_that_is_no_text(tiny_model, prompt):
    result = CliRunner().invoke(app, ["generate", str(tiny_model()), prompt])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_chat_sends_a_real_model_the_whole_conversation(default_model):
    questions = ("My name is Ada. Say hello.", "What is the capital of France?")
    messages, expected = [], ""
    with Engine(default_model) as engine:
        for question in questions:
            messages.append(turn("user", question))
            (answer,) = engine.generate([messages], SamplingParams(max_tokens=12, temperature=0.0))
            messages.append(turn("assistant", answer.text))
            expected += answer.text + "\n"
    options = ["--temperature", "0", "--max-tokens", "12"]
    result = CliRunner().invoke(app, ["chat", str(default_model), *options], input="\n".join([*questions, "quit", ""]))
    assert (result.exit_code, result.stdout) == (0, expected)
