"""A tokenizer from a model directory in Hugging Face's layout: tokenizer.json and the files beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from inferneo_core.errors import CorruptWeights, ModelNotFound, UnsupportedModel
from inferneo_core.tokenizer_spec import TokenizerSpec

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def spec_from_directory(path: str | Path) -> TokenizerSpec:
    """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja, config.json and
    generation_config.json; all but the first are optional.

    Raises:
        ModelNotFound: there is no tokenizer.json.
        UnsupportedModel: its decoder is of a kind that Inferneo does not know.
        CorruptWeights: a file is not the JSON it should be.
    """
    directory = Path(path)
    source = directory / "tokenizer.json"
    if not source.is_file():
        raise ModelNotFound(f"{source} is missing; a model directory needs it (save the fast tokenizer of the model)")
    definition = _read_json(source)
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # tokenizers raises the bare Exception, and only here
        raise CorruptWeights(f"{source}: the tokenizers library cannot read it: {error}") from error
    backend.no_truncation()  # a prompt is refused when it is too long, never shortened in silence
    backend.no_padding()

    settings = {**_read_json(directory / "special_tokens_map.json"), **_read_json(directory / "tokenizer_config.json")}
    config = _read_json(directory / "config.json")
    texts = {name: text for name in _NAMED_TOKENS if (text := _token_text(settings.get(name))) is not None}
    known = backend.get_added_tokens_decoder()
    listed = {token.content for token in known.values()}
    # A special token that is named but not listed is still one token wherever it stands in a text.
    in_vocab = [text for text in texts.values() if text not in listed and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in in_vocab])

    ids = {name: backend.token_to_id(text) for name, text in texts.items()}
    special_ids = {token_id for token_id, token in known.items() if token.special}
    special_ids |= {token_id for token_id in ids.values() if token_id is not None}
    bos = ids.get("bos_token")
    prefix_ids, suffix_ids = _special_frame(backend, settings, bos, ids.get("eos_token"))
    byte_level, strips_space = _decoding(definition.get("decoder"), source)
    return TokenizerSpec(
        backend=backend,
        pieces=_pieces(backend, config),
        byte_level=byte_level,
        strips_space=strips_space,
        special_ids=frozenset(special_ids),
        literal_ids=frozenset(known) if byte_level else frozenset(),
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        bos_token_id=bos,
        eos_token_ids=frozenset(_end_ids(directory, config, ids.get("eos_token"))),
        special_texts=texts,
        chat_template=_chat_template(directory, settings),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptWeights(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptWeights(f"{path} holds a {type(value).__name__}; it holds a JSON object")
    return value


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _pieces(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> tuple[str, ...]:
    vocab = backend.get_vocab(with_added_tokens=True)
    # Many models pad their embedding: the ids past the tokenizer's last are valid, and add nothing to a text.
    padded = config.get("vocab_size")
    size = max(max(vocab.values(), default=-1) + 1, padded if isinstance(padded, int) else 0)
    pieces = [""] * size
    for piece, token_id in vocab.items():
        pieces[token_id] = piece
    return tuple(pieces)


def _special_frame(
    backend: tokenizers.Tokenizer, settings: dict[str, Any], bos: int | None, eos: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What encoding puts around a text: as tokenizer_config.json says, otherwise as the post-processor does."""
    if "add_bos_token" in settings or "add_eos_token" in settings:
        prefix = (bos,) if settings.get("add_bos_token") and bos is not None else ()
        suffix = (eos,) if settings.get("add_eos_token") and eos is not None else ()
        return prefix, suffix
    probe = backend.encode("a", add_special_tokens=True)
    text = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
    if not text:
        return tuple(probe.ids), ()
    return tuple(probe.ids[: text[0]]), tuple(probe.ids[text[-1] + 1 :])


def _decoding(decoder: Any, source: Path) -> tuple[bool, bool]:
    """(byte_level, strips_space) of tokenizer.json's decoder."""
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = [step.get("type") for step in steps if isinstance(step, dict)]
    if kinds == ["ByteLevel"]:
        return True, False
    if "Metaspace" in kinds or "Replace" in kinds:
        unknown = set(kinds) - {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
        if not unknown:
            return False, any(map(_strips_space, steps))
    raise UnsupportedModel(
        f"{source}: the decoder is {kinds or decoder!r}; Inferneo runs ByteLevel and SentencePiece's "
        "(Metaspace, or Replace with ByteFallback, Fuse and Strip)"
    )


def _strips_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return step["type"] == "Strip" and step.get("content") == " " and bool(step.get("start"))


def _end_ids(directory: Path, config: dict[str, Any], eos: int | None) -> Iterator[int]:
    """The ids that end an answer: the tokenizer's and those of both configs, each of which may hold several."""
    generation = _read_json(directory / "generation_config.json")
    for value in (eos, config.get("eos_token_id"), generation.get("eos_token_id")):
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None:
                continue
            if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                raise CorruptWeights(f"{directory}: eos_token_id holds {token_id!r}; it holds token ids")
            yield token_id


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template = _read_json(directory / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(template, list):  # several, named: tool use, retrieval; the one for plain chat is "default"
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CorruptWeights(f"{directory}: chat_template is a {type(template).__name__}; it is a string")
    return template
