"""TokenizerSpec: what a model's files say of its tokenizer, whichever format they are in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import tokenizers

SPACE_MARK = "\u2581"  # "▁", how SentencePiece writes a space


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """Everything that `Tokenizer` needs, read once from tokenizer.json or from GGUF metadata.

    Attributes:
        backend: turns text into ids. Adds no special tokens, truncates nothing, pads nothing.
        pieces: a token's text as the vocabulary writes it, by id; "" where an id has no token.
        byte_level: pieces are in GPT-2's byte alphabet; otherwise in SentencePiece's, with "▁" and "<0x0A>".
        strips_space: decoding drops one leading space, the one that encoding put there.
        special_ids: tokens that are control, not text.
        literal_ids: tokens whose piece is plain text, whatever the alphabet of the others.
        prefix_ids: what encoding puts in front (BOS), and
        suffix_ids: behind, where special tokens are asked for.
        bos_token_id: None when the model has none.
        eos_token_ids: every token that ends an answer.
        special_texts: the names a chat template may use, such as {"bos_token": "<s>"}.
        chat_template: jinja source; None when the model has none.
    """

    backend: tokenizers.Tokenizer
    pieces: tuple[str, ...]
    byte_level: bool
    strips_space: bool = False
    special_ids: frozenset[int] = frozenset()
    literal_ids: frozenset[int] = frozenset()
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    special_texts: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None


def vocabulary_bytes(spec: TokenizerSpec) -> list[bytes]:
    """The bytes each token adds to a text, by id; b"" for special tokens and for ids without a token."""
    if spec.byte_level:
        # What is no stand-in must not pass for a byte: a space, U+00AD.
        table = {**dict.fromkeys(range(256), 0x100), **byte_alphabet()}
        decoded = [_byte_level_bytes(piece, table) for piece in spec.pieces]
    else:
        decoded = [_sentencepiece_bytes(piece) for piece in spec.pieces]
    for token_id in _within(spec.literal_ids, len(decoded)):
        decoded[token_id] = spec.pieces[token_id].encode()
    for token_id in _within(spec.special_ids, len(decoded)):
        decoded[token_id] = b""
    return decoded


def byte_alphabet() -> dict[int, int]:
    """GPT-2's stand-ins: {code point: byte}. Printable bytes stand for themselves, the others from U+0100 upwards.

    Source: Radford et al. 2019, bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {**{byte: byte for byte in printable}, **{0x100 + n: byte for n, byte in enumerate(others)}}


def _byte_level_bytes(piece: str, table: dict[int, int]) -> bytes:
    try:
        return piece.translate(table).encode("latin-1")
    except UnicodeEncodeError:
        # One character outside the alphabet, and the piece is plain text: added tokens, such as "  " or "<｜tool｜>".
        return piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes.fromhex(piece[3:5])
        except ValueError:
            pass  # "<0xyz>" is text like any other
    return piece.replace(SPACE_MARK, " ").encode()


def _within(token_ids: Iterable[int], vocab_size: int) -> Iterable[int]:
    return (token_id for token_id in token_ids if token_id < vocab_size)
