"""StreamDecoder: token ids to text as they arrive, byte-exact, cut before a stop string."""

from __future__ import annotations

from codecs import utf_8_decode
from collections import deque
from collections.abc import Sequence

from inferneo_core.tokenizer import Tokenizer


class StreamDecoder:
    """Turns the tokens of one answer into text, one at a time.

        decoder = StreamDecoder(tokenizer, stop=("\\n\\n",))
        for token_id in ids:
            print(decoder.push(token_id), end="")
            if decoder.stopped:
                break
        print(decoder.flush())

    The texts joined are `tokenizer.decode(ids)`, for any ids, cut before the stop string that is complete first
    (of several complete at the same character, the longest). What is held back is never more than an unfinished
    UTF-8 character and the longest end of the text that may still become a stop string. The work is O(1) a
    character, whatever the number and length of the stop strings.

    Not thread-safe: a decoder belongs to one answer.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """`stop` holds non-empty strings, as `SamplingParams.stop` does."""
        self._token_bytes = tokenizer.token_bytes
        self._strips_space = tokenizer.strips_space
        self._unfinished = b""  # the first bytes of a UTF-8 character
        self._matcher = StopMatcher(stop) if stop else None
        self._held = ""  # the beginning of what may become a stop string
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete; the text ended before it."""
        return self._stopped

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while all of it is held back, and once stopped.

        Raises:
            InvalidPrompt: the id is not in the vocabulary.
        """
        data = self._token_bytes(token_id)
        return self._advance(data, final=False) if data else ""

    def flush(self) -> str:
        """The text still held back, at the end of the answer. An unfinished character becomes U+FFFD."""
        text = self._advance(b"", final=True)
        held, self._held = self._held, ""
        return text + held

    def _advance(self, data: bytes, *, final: bool) -> str:
        if self._unfinished:
            data = self._unfinished + data
        text, consumed = utf_8_decode(data, "replace", final)
        self._unfinished = data[consumed:]
        if self._strips_space and text:
            self._strips_space = False
            text = text.removeprefix(" ")
        if self._matcher is None:
            return text
        return self._cut(self._matcher, text)

    def _cut(self, matcher: StopMatcher, text: str) -> str:
        """Holds back the end of the text that may still become a stop string."""
        if self._stopped:
            return ""
        pending = self._held + text
        match = matcher.feed(text)
        if match is not None:
            end, length = match
            self._stopped, self._held = True, ""
            return pending[: len(pending) - len(text) + end - length]
        ready = len(pending) - matcher.num_matched
        self._held = pending[ready:]
        return pending[:ready]


class StopMatcher:
    """Finds the first of several strings in a text that arrives in pieces: one automaton, one state.

    Source: Aho and Corasick 1975, doi:10.1145/360825.360855. The depth of its state is the length of the longest
    end of the text that begins one of the strings, which is exactly what a stream has to hold back.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._edges: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match = [0]  # length of the longest pattern that ends in this state
        for pattern in patterns:
            self._add(pattern)
        self._failure = self._link()
        self._state = 0

    @property
    def num_matched(self) -> int:
        """How many of the latest characters begin a pattern."""
        return self._depth[self._state]

    def feed(self, text: str) -> tuple[int, int] | None:
        """Reads on. When a pattern is complete, (where in `text` it ends, its length in characters)."""
        edges, failure, match, state = self._edges, self._failure, self._match, self._state
        for index, char in enumerate(text):
            while state and char not in edges[state]:
                state = failure[state]
            state = edges[state].get(char, 0)
            if match[state]:
                self._state = state
                return index + 1, match[state]
        self._state = state
        return None

    def _add(self, pattern: str) -> None:
        state = 0
        for char in pattern:
            if char not in self._edges[state]:
                self._edges[state][char] = len(self._edges)
                self._edges.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(0)
            state = self._edges[state][char]
        self._match[state] = len(pattern)

    def _link(self) -> list[int]:
        """For each state, that of its longest proper end which also begins a pattern; breadth first."""
        failure = [0] * len(self._edges)
        queue = deque(self._edges[0].values())
        while queue:
            state = queue.popleft()
            self._match[state] = self._match[state] or self._match[failure[state]]
            for char, child in self._edges[state].items():
                back = failure[state]
                while back and char not in self._edges[back]:
                    back = failure[back]
                failure[child] = self._edges[back].get(char, 0)
                queue.append(child)
        return failure
