"""Tokenizer: text to token ids and back.

    tokenizer = Tokenizer.from_directory("path/to/model")
    ids = tokenizer.encode("Once upon a time")
    assert tokenizer.decode(ids) == "Once upon a time"

The ids are those of the `tokenizers` library, which does the work; the bytes of each token are kept beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inferneo_core.chat import ChatTemplate
from inferneo_core.errors import InvalidPrompt
from inferneo_core.gguf_tokenizer import spec_from_gguf
from inferneo_core.hf_tokenizer import spec_from_directory
from inferneo_core.tokenizer_spec import TokenizerSpec, vocabulary_bytes

LONG_TEXT = 4096  # characters; shorter ones take no longer than it takes another thread to notice


class Tokenizer:
    """Text to token ids and back, with the special tokens and the chat template of one model.

    Immutable, so any number of threads may share it.

    The text of a special token, such as "<|im_end|>", is that token wherever it stands, in a prompt or in a chat
    message, as in llama.cpp and in Hugging Face's tokenizers. Who does not trust a message must remove it.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        self._spec = spec
        self._bytes = vocabulary_bytes(spec)
        self._chat = ChatTemplate(spec.chat_template, spec.special_texts)

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a model directory: tokenizer.json and the configs beside it.

        Raises:
            ModelNotFound: there is no tokenizer.json.
            UnsupportedModel: its decoder is of a kind that Inferneo does not know.
            CorruptWeights: a file is not the JSON it should be.
        """
        return cls(spec_from_directory(path))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of a GGUF file, from its key-value pairs as plain Python values.

        Raises:
            UnsupportedModel: the kind of tokenizer, or its pre-tokenizer, is unknown to Inferneo.
            CorruptWeights: the metadata lacks a list or contradicts itself.
        """
        return cls(spec_from_gguf(metadata))

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size). Ids that pad a model's embedding count, and decode to nothing."""
        return len(self._bytes)

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text; None when the model has none."""
        return self._spec.bos_token_id

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends an answer."""
        return self._spec.eos_token_ids

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The tokens that are control, not text."""
        return self._spec.special_ids

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's files hold a chat template."""
        return self._spec.chat_template is not None

    @property
    def strips_space(self) -> bool:
        """Whether decoding drops one leading space, the one that encoding puts there (SentencePiece)."""
        return self._spec.strips_space

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to ids.

        Args:
            text: any string that UTF-8 can carry.
            add_special_tokens: put BOS in front (and EOS behind) where the model's files ask for it. A text that
                already begins with BOS does not get a second one.
        Raises:
            InvalidPrompt: `text` is not a string, or holds half a surrogate pair.
        """
        try:
            ids = self._backend_ids(text)
        except TypeError as error:
            raise InvalidPrompt(_why_not_text(text)) from error
        if not add_special_tokens:
            return ids
        prefix = list(self._spec.prefix_ids)
        if prefix and ids[: len(prefix)] != prefix:
            ids = prefix + ids
        return ids + list(self._spec.suffix_ids)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Ids to text: the tokens' bytes, joined, read as UTF-8 with U+FFFD for what is not.

        Args:
            ids: token ids.
            skip_special_tokens: leave special tokens out; otherwise their own text stands for them.
        Raises:
            InvalidPrompt: an id is not in [0, vocab_size).
        """
        if skip_special_tokens:
            parts = [self.token_bytes(token_id) for token_id in ids]
        else:
            special = self._spec.special_ids
            parts = [self._text_bytes(i) if i in special else self.token_bytes(i) for i in ids]
        text = b"".join(parts).decode("utf-8", "replace")
        return text[1:] if self._spec.strips_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text; b"" for a special token. They need not be whole characters.

        Raises:
            InvalidPrompt: the id is not in [0, vocab_size).
        """
        if not 0 <= token_id < len(self._bytes):
            raise InvalidPrompt(self._why_not_an_id(token_id))
        return self._bytes[token_id]

    def id_to_token(self, token_id: int) -> str:
        """A token as the vocabulary writes it: "Ġthe", "▁the", "<0x0A>", "<|im_end|>"; "" for a padding id.

        Raises:
            InvalidPrompt: the id is not in [0, vocab_size).
        """
        if not 0 <= token_id < len(self._bytes):
            raise InvalidPrompt(self._why_not_an_id(token_id))
        return self._spec.pieces[token_id]

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Messages to the text that the model was trained on.

        Args:
            messages: [{"role": ..., "content": ...}, ...]; content is a string or a list of {"type": "text"} parts.
            add_generation_prompt: end with the words that open the assistant's turn.
        Raises:
            InvalidPrompt: the messages are not of that form.
            ChatTemplateError: the model has no chat template, or it refuses, fails or breaks its limits.
        """
        return self._chat.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Messages to ids: `apply_chat_template`, then `encode` with no special tokens but the template's own.

        The template alone decides about BOS, as in Hugging Face's `apply_chat_template(tokenize=True)`.

        Raises:
            InvalidPrompt, ChatTemplateError: as `apply_chat_template` and `encode` do.
        """
        text = self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def _backend_ids(self, text: str) -> list[int]:
        backend = self._spec.backend
        if len(text) < LONG_TEXT:
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        else:  # `encode` holds the GIL, 1.6 s for a million characters; a batch of one does not
            ids = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _text_bytes(self, token_id: int) -> bytes:
        return self.id_to_token(token_id).encode()

    def _why_not_an_id(self, token_id: object) -> str:
        return f"token id {token_id!r} is not in [0, {len(self._bytes)}), the vocab_size of this model"


def _why_not_text(text: object) -> str:
    if not isinstance(text, str):
        return f"text is a {type(text).__name__}; it is a string"
    at = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    return (
        f"text holds half a surrogate pair, U+{ord(text[at]):04X} at index {at}, which no encoding can carry "
        "(decode the input as UTF-8, or replace it)"
    )
