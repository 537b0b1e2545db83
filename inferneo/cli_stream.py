"""One answer, from the engine to the terminal as it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, TextIO

from inferneo.cli_errors import OutputError

if TYPE_CHECKING:
    from inferneo_core import Engine, SamplingParams
    from inferneo_core.outputs import Timings

_CONTROLS = frozenset([*range(0x20), *range(0x7F, 0xA0)]) - {ord("\n"), ord("\t")}
_HARMLESS = MappingProxyType(dict.fromkeys(_CONTROLS, "\N{REPLACEMENT CHARACTER}"))


class Screen:
    """Writes text as it comes.

    On a terminal, control characters are shown as U+FFFD: a model may have learnt, or been told, to print the escape
    sequences that retitle windows and fill clipboards. A pipe or a file gets the text as it is.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()

    def write(self, text: str) -> None:
        """Raises OutputError where there is no room; a closed pipe is for the command to be quiet about."""
        if self._is_terminal:
            text = text.translate(_HARMLESS)
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write the answer: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one prompt.

    Attributes:
        text: the whole answer, as far as it got.
        num_tokens: tokens generated.
        timings: the stream's last Timings; None before the first token.
        interrupted: Ctrl-C ended it.
    """

    text: str
    num_tokens: int
    timings: Timings | None
    interrupted: bool


def stream_answer(
    engine: Engine,
    prompt: str | list[dict[str, str]],
    params: SamplingParams,
    write: Callable[[str], None],
) -> Answer:
    """Stream one answer through `write`, token by token. Ctrl-C ends the answer and is not raised."""
    texts: list[str] = []
    timings, interrupted = None, False
    with engine.stream(prompt, params) as stream:
        try:
            for token in stream:
                texts.append(token.text)
                timings = token.timings
                write(token.text)
        except KeyboardInterrupt:
            interrupted = True
    return Answer("".join(texts), len(texts), timings, interrupted)


def to_messages(system: str | None, text: str | None) -> list[dict[str, str]]:
    """Chat messages from a system prompt and a user's text; either may be absent."""
    pairs = (("system", system), ("user", text))
    return [{"role": role, "content": content} for role, content in pairs if content is not None]


def figures(answer: Answer) -> str:
    """One line: tokens, time to first token, tokens/s."""
    if answer.timings is None:
        return "0 tokens"
    parts = [
        f"{answer.num_tokens} token{'s' if answer.num_tokens != 1 else ''}",
        f"first token after {answer.timings.ttft_ms:.0f} ms",
    ]
    if answer.num_tokens > 1:  # a speed needs two points in time
        parts.append(f"{answer.timings.tokens_per_s:.1f} tokens/s")
    return ", ".join(parts)
