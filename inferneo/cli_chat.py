"""A conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from inferneo.cli_stream import figures, stream_answer, to_messages

if TYPE_CHECKING:
    from inferneo_core import Engine, SamplingParams

HELP = "Ctrl-C stops an answer; /reset starts afresh; /quit, quit or Ctrl-D leaves."


def read_line() -> str:
    """One line of standard input, with a prompt and line editing on a terminal."""
    if not sys.stdin.isatty():
        return input()
    import readline  # noqa: F401  importing it gives input() editing and history

    return input("> ")


class Chat:
    """Messages so far, and what each line of input does to them.

    Args:
        engine: answers.
        params: of every answer.
        system: what the model is told first; kept by /reset.
        write: takes the answer's text as it comes.
        note: takes one line meant for the person, not part of the conversation.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: str | None,
        *,
        write: Callable[[str], None],
        note: Callable[[str], None],
    ) -> None:
        self.messages = to_messages(system, None)
        self._engine = engine
        self._params = params
        self._system = system
        self._write = write
        self._note = note

    def run(self, read: Callable[[], str]) -> None:
        """Read and answer lines until one says to leave or `read` raises EOFError."""
        self._note(HELP)
        while True:
            try:
                line = read().strip()
                if line in ("/quit", "quit", "/exit", "exit"):
                    return
                self.take(line)
            except EOFError:
                self._write("\n")
                return
            except KeyboardInterrupt:  # at the prompt, or in the moments before and after an answer
                self._write("\n")
                self._note(HELP)

    def take(self, line: str) -> None:
        """Do what one line asks: a command, a message, or nothing when it is empty."""
        if line == "/reset":
            self.messages = to_messages(self._system, None)
            self._note("The conversation starts afresh.")
        elif line.startswith("/") and " " not in line:
            self._note(f"There is no command {line}. {HELP}")
        elif line:
            self._answer(line)

    def _answer(self, line: str) -> None:
        from inferneo_core.errors import RequestError, StepFailed

        messages = [*self.messages, *to_messages(None, line)]
        try:
            answer = stream_answer(self._engine, messages, self._params, self._write)
        except (RequestError, StepFailed) as error:
            self._note(f"error: {error} (the message was dropped; /reset starts afresh)")
            return
        self._write("\n")
        self._note(figures(answer))
        if answer.text:  # templates want turns to alternate, so a turn without an answer is forgotten whole
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
