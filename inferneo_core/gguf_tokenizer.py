"""A tokenizer from the metadata of a GGUF file: byte-level BPE ("gpt2") and SentencePiece ("llama").

The rules are llama.cpp's, which defines the format: docs/gguf.md and src/llama-vocab.cpp of ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from inferneo_core.errors import CorruptWeights, UnsupportedModel
from inferneo_core.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from inferneo_core.tokenizer_spec import SPACE_MARK, TokenizerSpec

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type; 1 is normal, 5 unused
_ENDS_OF_TURN = frozenset(  # control tokens that end an answer whether or not the metadata names them
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "</s>"}
    | {"<|end_of_text|>", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|return|>"}
)


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    metadata: Mapping[str, Any]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """`tokenizer.ggml.<key>`, checked to be a `kind`; `default` when the file does not hold it."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CorruptWeights(f"tokenizer.ggml.{key} is a {type(value).__name__}; it is a {kind.__name__}")
        return value

    def token_id(self, name: str, default: int | None = None) -> int | None:
        """`tokenizer.ggml.<name>_token_id`, checked to be in the vocabulary."""
        token_id = self.get(f"{name}_token_id", int, default)
        if token_id is not None and not 0 <= token_id < len(self.tokens):
            num_tokens = len(self.tokens)
            raise CorruptWeights(f"tokenizer.ggml.{name}_token_id is {token_id}; the file has {num_tokens} tokens")
        return None if token_id is None else int(token_id)


def spec_from_gguf(metadata: Mapping[str, Any]) -> TokenizerSpec:
    """Reads the tokenizer of a GGUF file.

    Args:
        metadata: the file's key-value pairs as plain Python values.
    Raises:
        UnsupportedModel: `tokenizer.ggml.model` or `.pre` is one that Inferneo does not know.
        CorruptWeights: a list is missing, too short or of the wrong type, or an id is outside the vocabulary.
    """
    vocab = _read_vocabulary(metadata)
    model = vocab.get("model", str)
    defaults: tuple[int | None, ...] = (None, None, None)
    if model == "gpt2":
        pre = _pre_tokenizer(vocab)
        backend, add_bos = _byte_level_backend(vocab, pre), pre.add_bos
    elif model == "llama":
        backend, add_bos, defaults = _sentencepiece_backend(vocab), True, (1, 2, 0)
    else:
        raise UnsupportedModel(f"the GGUF tokenizer is {model!r}; Inferneo runs 'gpt2' and 'llama' (SentencePiece)")
    bos, eos, unk = map(vocab.token_id, ("bos", "eos", "unknown"), defaults)
    special_ids = frozenset(i for i, kind in enumerate(vocab.types) if kind in (CONTROL, UNKNOWN))
    ends = {vocab.token_id(name) for name in ("eot", "eom")} | {eos}
    ends |= {i for i in special_ids if vocab.tokens[i] in _ENDS_OF_TURN}
    named = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": vocab.token_id("padding")}
    return TokenizerSpec(
        backend=backend,
        pieces=tuple(vocab.tokens),
        byte_level=model == "gpt2",
        strips_space=model == "llama" and vocab.get("add_space_prefix", bool, True),
        special_ids=special_ids,
        literal_ids=frozenset(i for i, kind in enumerate(vocab.types) if kind == USER_DEFINED),
        prefix_ids=_added(vocab, "bos", bos, add_bos),
        suffix_ids=_added(vocab, "eos", eos, False),
        bos_token_id=bos,
        eos_token_ids=frozenset(token_id for token_id in ends if token_id is not None),
        special_texts={name: vocab.tokens[i] for name, i in named.items() if i is not None},
        chat_template=_chat_template(metadata),
    )


def _read_vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CorruptWeights("tokenizer.ggml.tokens is missing or is not a list of strings; convert the model again")
    # An empty token would match everywhere; llama.cpp names it so, too.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        raise CorruptWeights("tokenizer.ggml.tokens holds a token twice; convert the model again")
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) < len(tokens):
        raise CorruptWeights(f"tokenizer.ggml.token_type is not a list of {len(tokens)} types, one a token")
    return _Vocabulary(tokens, types[: len(tokens)], metadata)


def _pre_tokenizer(vocab: _Vocabulary) -> PreTokenizer:
    name = vocab.get("pre", str, "default")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModel(f"the GGUF pre-tokenizer is {name!r}; Inferneo knows {known}")
    return PRE_TOKENIZERS[name]


def _byte_level_backend(vocab: _Vocabulary, pre: PreTokenizer) -> tokenizers.Tokenizer:
    lines = vocab.get("merges", list)
    if lines is None:
        raise CorruptWeights("tokenizer.ggml.merges is missing; a BPE tokenizer needs it (convert the model again)")
    merges = []
    for line in lines:
        # The first character may itself be a space: merges are split at the first one after it.
        cut = line.find(" ", 1) if isinstance(line, str) else -1
        if cut < 0:
            raise CorruptWeights(f"tokenizer.ggml.merges holds {line!r}; a merge is two pieces with a space between")
        merges.append((line[:cut], line[cut + 1 :]))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = _bpe(vocab, merges, ignore_merges=pre.ignore_merges)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    return backend


def _sentencepiece_backend(vocab: _Vocabulary) -> tokenizers.Tokenizer:
    scores = vocab.get("scores", list)
    if scores is None or len(scores) < len(vocab.tokens) or not all(map(math.isfinite, scores)):
        raise CorruptWeights(f"tokenizer.ggml.scores is not a list of {len(vocab.tokens)} finite numbers, one a token")
    unk = vocab.token_id("unknown", 0)
    unk_token = None if unk is None else vocab.tokens[unk]
    backend = _bpe(vocab, _merges_of_scores(vocab, scores), byte_fallback=True, fuse_unk=True, unk_token=unk_token)
    # Prepend acts on every stretch between special tokens, as llama.cpp's add_space_prefix does.
    prefix = [normalizers.Prepend(SPACE_MARK)] if vocab.get("add_space_prefix", bool, True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE_MARK)])
    return backend


def _merges_of_scores(vocab: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins any two neighbours that make a piece, best score first; BPE wants the pairs listed."""
    pieces = {
        token: score
        for token, kind, score in zip(vocab.tokens, vocab.types, scores[: len(vocab.tokens)], strict=True)
        if kind not in (UNKNOWN, CONTROL, BYTE)
    }
    ranked = sorted(pieces, key=pieces.__getitem__, reverse=True)  # stable: equal scores keep the order of their ids
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]


def _bpe(vocab: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    ids = {token: i for i, token in enumerate(vocab.tokens)}
    added: list[AddedToken] = []
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, **options))
    except Exception as error:  # tokenizers raises the bare Exception, and only here
        raise CorruptWeights(f"the GGUF vocabulary and its merges contradict each other: {error}") from error
    for token, kind in zip(vocab.tokens, vocab.types, strict=True):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            added.append(AddedToken(token, special=kind != USER_DEFINED, normalized=False))
    backend.add_tokens(added)
    return backend


def _added(vocab: _Vocabulary, name: str, token_id: int | None, default: bool) -> tuple[int, ...]:
    """What encoding adds for BOS or EOS: the file's own word, or what its kind of tokenizer does."""
    explicit = vocab.get(f"add_{name}_token", bool)
    if explicit and token_id is None:
        raise CorruptWeights(f"tokenizer.ggml.add_{name}_token is true, but there is no {name}_token_id")
    wanted = default if explicit is None else explicit
    return (token_id,) if wanted and token_id is not None else ()


def _chat_template(metadata: Mapping[str, Any]) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CorruptWeights(f"tokenizer.chat_template is a {type(template).__name__}; it is a string")
    return template
