"""Tokenizer: ids equal to `tokenizers`' for tokenizer.json; text back, byte for byte; bad input; threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from inferneo_core.errors import CorruptWeights, InvalidPrompt, ModelNotFound, UnsupportedModel
from inferneo_core.tokenizer import LONG_TEXT, Tokenizer
from inferneo_core.tokenizer_spec import byte_alphabet

BPE = json.loads((Path(__file__).parent / "golden" / "tokenizer_bpe.json").read_text())
TEXTS: list[str] = BPE["texts"]


def byte_level_json() -> tokenizers.Tokenizer:
    """A small byte-level BPE as Llama 3's: digits in threes, BOS by post-processor, special and plain added tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|eot|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens(["<tool>", "    ", "né"])
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return backend


def sentencepiece_json() -> tokenizers.Tokenizer:
    """A small SentencePiece-like BPE as Llama 2's, with byte fallback."""
    alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=alphabet, show_progress=False, max_token_length=8)
    trained.train_from_iterator([text for text in TEXTS if text.isascii()], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = trained.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in alphabet[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def write_model(directory: Path, backend: tokenizers.Tokenizer, **files: Any) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("make", [byte_level_json, sentencepiece_json])
def test_tokenizer_json_equals_tokenizers(make: Callable[[], tokenizers.Tokenizer], tmp_path: Path) -> None:
    backend = make()
    tokenizer = Tokenizer.from_directory(write_model(tmp_path, backend))
    for text in TEXTS:
        ids = backend.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(text, add_special_tokens=False) == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == backend.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=False).endswith(text)


def test_added_token_outside_ascii_is_its_own_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_model(tmp_path, byte_level_json()))
    (token_id,) = tokenizer.encode("né", add_special_tokens=False)
    assert tokenizer.token_bytes(token_id) == "né".encode()  # not the byte 0xE9, for which "é" stands elsewhere


@pytest.mark.parametrize(
    ("config", "frame"),
    [
        ({}, ["<|begin|>", "a"]),
        ({"add_bos_token": False}, ["a"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<|begin|>", "a", "<|eot|>"]),
    ],
)
def test_tokenizer_config_overrides_the_post_processor(
    tmp_path: Path, config: dict[str, Any], frame: list[str]
) -> None:
    config = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|eot|>", **config}
    tokenizer = Tokenizer.from_directory(write_model(tmp_path, byte_level_json(), tokenizer_config=config))
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("a")] == frame


def test_end_tokens_are_those_of_all_configs(tmp_path: Path) -> None:
    files = {"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": [4, 5]}}
    directory = write_model(tmp_path, byte_level_json(), tokenizer_config={"eos_token": "<|eot|>"}, **files)
    assert Tokenizer.from_directory(directory).eos_token_ids == {1, 3, 4, 5}


def test_special_tokens_come_from_the_map_and_are_parsed_in_text(tmp_path: Path) -> None:
    backend = byte_level_json()
    texts = {"bos_token": "<|begin|>", "eos_token": "in"}  # "in" is an ordinary merge until the map names it
    tokenizer = Tokenizer.from_directory(write_model(tmp_path, backend, special_tokens_map=texts))
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_ids == {backend.token_to_id("in")} <= tokenizer.special_token_ids
    assert tokenizer.decode(tokenizer.encode("string theory")) == "strg theory"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_level_json()
    expected = backend.encode(TEXTS[9]).ids
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    assert Tokenizer.from_directory(write_model(tmp_path, backend)).encode(TEXTS[9]) == expected


def test_padded_vocabulary_decodes_to_nothing(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_model(tmp_path, byte_level_json(), config={"vocab_size": 1024}))
    assert tokenizer.vocab_size == 1024
    assert tokenizer.token_bytes(1023) == b""
    assert tokenizer.decode([1023, *tokenizer.encode("ok"), 1000]) == "ok"


def test_metaspace_decoder_is_sentencepieces(tmp_path: Path) -> None:
    backend = sentencepiece_json()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = Tokenizer.from_directory(write_model(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("two  words, né")) == "two  words, né"


def test_chat_template_is_found_in_each_place(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "listed"}]
    write_model(tmp_path, byte_level_json(), tokenizer_config={"chat_template": named})
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(messages) == "listed"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(messages) == "json"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }} jinja")
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(messages) == "x jinja"


def test_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json is missing"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", "{", "not JSON"),
        ("tokenizer.json", '{"model": {"type": "Pelican"}}', "cannot read it"),
        ("tokenizer.json", "[]", "holds a list"),
        ("config.json", "{'a'}", "not JSON"),
        ("config.json", "[" * 100_000, "not JSON"),
        ("generation_config.json", '{"eos_token_id": [1, "x"]}', "'x'"),
        ("tokenizer_config.json", '{"chat_template": 7}', "chat_template is a int"),
    ],
)
def test_file_that_is_not_what_it_should_be_is_refused(tmp_path: Path, file: str, content: str, words: str) -> None:
    write_model(tmp_path, byte_level_json())
    (tmp_path / file).write_text(content)
    with pytest.raises(CorruptWeights, match=words):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.CTC()])
def test_unknown_decoder_is_refused(tmp_path: Path, decoder: Any) -> None:
    backend = byte_level_json()
    definition = json.loads(backend.to_str())
    definition["decoder"] = None if decoder is None else json.loads(decoder.__getstate__())
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UnsupportedModel, match="decoder is"):
        Tokenizer.from_directory(tmp_path)


def test_byte_alphabet_is_tokenizers() -> None:
    assert {chr(code) for code in byte_alphabet()} == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


TINY = Tokenizer.from_gguf(
    {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": BPE["tokens"],
        "tokenizer.ggml.merges": BPE["merges"],
        "tokenizer.ggml.token_type": BPE["types"],
    }
)


@given(st.text())
def test_text_comes_back(text: str) -> None:
    assert TINY.decode(TINY.encode(text), skip_special_tokens=False) == text


@given(st.lists(st.integers(0, len(BPE["tokens"]) - 1)))
def test_decode_is_the_tokens_bytes_joined(ids: list[int]) -> None:
    joined = b"".join(map(TINY.token_bytes, ids))
    assert TINY.decode(ids) == joined.decode("utf-8", "replace")


@pytest.mark.parametrize("token_id", [-1, len(BPE["tokens"]), 2**40, -(2**70)])
def test_id_outside_the_vocabulary_is_refused(token_id: int) -> None:
    for method in (TINY.token_bytes, TINY.id_to_token, lambda token_id: TINY.decode([5, token_id])):
        with pytest.raises(InvalidPrompt, match=rf"{token_id} is not in \[0, {len(BPE['tokens'])}\)"):
            method(token_id)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ab\ud800c", r"U\+D800 at index 2"),
        ("a" * LONG_TEXT + "\ud800", rf"U\+D800 at index {LONG_TEXT}"),
        (b"bytes", "text is a bytes"),
        (b"b" * LONG_TEXT, "text is a bytes"),
        (None, "text is a NoneType"),
    ],
)
def test_text_that_cannot_be_encoded_is_refused(text: Any, words: str) -> None:
    with pytest.raises(InvalidPrompt, match=words):
        TINY.encode(text)


def test_long_text_has_the_ids_of_the_backend() -> None:
    text = " ".join(TEXTS) * (LONG_TEXT // 10)
    for length in (LONG_TEXT - 1, LONG_TEXT, LONG_TEXT + 1, 9 * LONG_TEXT):
        part = text[:length]
        assert len(part) == length
        assert (
            TINY.encode(part, add_special_tokens=False) == TINY._spec.backend.encode(part, add_special_tokens=False).ids
        )


def test_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        TINY.encode("a", add_special_token=True)  # type: ignore[call-arg]


def test_threads_share_one_tokenizer() -> None:
    expected = [TINY.encode(text) for text in TEXTS]
    seen: list[list[list[int]]] = []
    threads = [threading.Thread(target=lambda: seen.append([TINY.encode(text) for text in TEXTS])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [expected] * 8
