"""StreamDecoder: joined texts equal decode, for any ids, cut before the stop string, with no more held than it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from inferneo_core.errors import InvalidPrompt
from inferneo_core.stream_decoder import StopMatcher, StreamDecoder
from inferneo_core.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"


def load(name: str, model: str, **values: Any) -> Tokenizer:
    golden = json.loads((GOLDEN / name).read_text())
    values |= {"model": model, "token_type": golden["types"], "tokens": golden["tokens"]}
    values |= {key: golden[key] for key in ("merges", "scores") if key in golden}
    return Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in values.items()})


BYTE_LEVEL = load("tokenizer_bpe.json", "gpt2", pre="gpt-2")
SENTENCEPIECE = load("tokenizer_spm.json", "llama")
KINDS = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])

# Bytes and specials come up often enough to break characters apart.
IDS = st.lists(st.one_of(st.integers(0, 258), st.integers(0, 419)), max_size=40)


def pushed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], StreamDecoder]:
    """The texts of each push up to the stop, and of the flush."""
    decoder = StreamDecoder(tokenizer, stop)
    texts = []
    for token_id in ids:
        texts.append(decoder.push(token_id))
        if decoder.stopped:
            break
    return [*texts, decoder.flush()], decoder


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """By hand: the text before the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@KINDS
@given(ids=IDS)
def test_joined_texts_equal_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    texts, decoder = pushed(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids)
    assert not decoder.stopped


@KINDS
@given(ids=IDS, stop=st.lists(st.text("ab e\ufffdé", min_size=1, max_size=4), max_size=4).map(tuple))
def test_joined_texts_are_cut_before_the_stop_string(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]
) -> None:
    texts, decoder = pushed(tokenizer, ids, stop)
    assert ("".join(texts), decoder.stopped) == cut(tokenizer.decode(ids), stop)


@given(
    text=st.text("ab", max_size=40),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=5).map(tuple),
)
@example(text="aabaab", stop=("aabab", "baa"))
@example(text="abab", stop=("abac", "bab"))
def test_held_text_is_the_longest_end_that_may_become_a_stop_string(text: str, stop: tuple[str, ...]) -> None:
    ids = [BYTE_LEVEL.encode(char)[0] for char in text]
    decoder = StreamDecoder(BYTE_LEVEL, stop)
    shown = ""
    for end, token_id in enumerate(ids, 1):
        shown += decoder.push(token_id)
        if decoder.stopped:
            break
        seen = text[:end]
        held = max((n for s in stop for n in range(len(s)) if seen.endswith(s[:n])), default=0)
        assert shown == seen[: len(seen) - held]


@pytest.mark.parametrize("pieces", [["Hello", "STOP", "x"], ["HelloS", "T", "OPx"], ["He", "lloST", "O", "P"]])
def test_stop_string_never_leaks_across_tokens(pieces: list[str]) -> None:
    ids = [token_id for piece in pieces for token_id in BYTE_LEVEL.encode(piece)]
    texts, decoder = pushed(BYTE_LEVEL, ids, ("STOP",))
    assert "".join(texts) == "Hello"
    assert decoder.stopped


def test_partial_match_that_fails_is_given_out_at_once() -> None:
    decoder = StreamDecoder(BYTE_LEVEL, ("ab!",))
    shown = [decoder.push(BYTE_LEVEL.encode(char)[0]) for char in "xabab?"]
    assert shown == ["x", "", "", "ab", "", "ab?"]


def test_flush_gives_out_a_partial_match() -> None:
    texts, decoder = pushed(BYTE_LEVEL, BYTE_LEVEL.encode("the end ST"), ("STOP",))
    assert "".join(texts) == "the end ST"
    assert texts[-1] == "ST"
    assert not decoder.stopped


def test_nothing_follows_a_stop() -> None:
    decoder = StreamDecoder(BYTE_LEVEL, ("\n",))
    decoder.push(BYTE_LEVEL.encode("\n")[0])
    assert decoder.stopped
    assert (decoder.push(BYTE_LEVEL.encode("a")[0]), decoder.flush()) == ("", "")


def test_character_is_held_until_it_is_whole() -> None:
    ids = SENTENCEPIECE.encode("😀", add_special_tokens=False)[-4:]
    decoder = StreamDecoder(SENTENCEPIECE)
    assert [decoder.push(token_id) for token_id in ids] == ["", "", "", "😀"]
    assert decoder.flush() == ""


def test_unfinished_character_ends_as_replacement() -> None:
    first_bytes = SENTENCEPIECE.encode("😀", add_special_tokens=False)[-4:-1]
    texts, _ = pushed(SENTENCEPIECE, first_bytes)
    assert texts == ["", "", "", "\ufffd"]


def test_replacement_at_the_end_can_be_the_stop_string() -> None:
    first_bytes = SENTENCEPIECE.encode("😀", add_special_tokens=False)[-4:-1]
    texts, decoder = pushed(SENTENCEPIECE, first_bytes, ("\ufffd",))
    assert "".join(texts) == ""
    assert decoder.stopped


def test_leading_space_is_dropped_once() -> None:
    ids = SENTENCEPIECE.encode("  two spaces", add_special_tokens=False)
    texts, _ = pushed(SENTENCEPIECE, [1, *ids])
    assert "".join(texts) == SENTENCEPIECE.decode(ids) == "  two spaces"


def test_special_tokens_add_no_text() -> None:
    decoder = StreamDecoder(BYTE_LEVEL)
    assert [decoder.push(token_id) for token_id in (0, 2, 1)] == ["", "", ""]


def test_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidPrompt, match="not in"):
        StreamDecoder(BYTE_LEVEL).push(900)


def test_matcher_does_linear_work_on_the_worst_strings() -> None:
    # Every character a near miss of 32 long strings: the state falls back at most as often as it advanced.
    stop = tuple("a" * (1023 - i) + "b" for i in range(32))
    matcher = StopMatcher(stop)
    counting = CountingList(matcher._failure)
    matcher._failure = counting
    text = ("a" * 1023 + "c") * 100
    assert matcher.feed(text) is None
    assert counting.reads <= len(text)


class CountingList(list[int]):
    """A list that counts how often it is read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)
