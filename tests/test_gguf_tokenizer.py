"""Tokenizer.from_gguf: ids equal to llama.cpp's, by its recorded answers; metadata that cannot be used is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inferneo_core.errors import CorruptWeights, InvalidPrompt, UnsupportedModel
from inferneo_core.gguf_pretokenizers import PRE_TOKENIZERS
from inferneo_core.tokenizer import Tokenizer
from inferneo_core.weights.gguf import read_gguf

GOLDEN = Path(__file__).parent / "golden"
SMOLLM2 = json.loads((GOLDEN / "tokenizer_smollm2.json").read_text())["cases"]
BPE = json.loads((GOLDEN / "tokenizer_bpe.json").read_text())
SPM = json.loads((GOLDEN / "tokenizer_spm.json").read_text())
TEXTS: list[str] = BPE["texts"]


def bpe_metadata(**changes: Any) -> dict[str, Any]:
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": BPE["tokens"],
        "merges": BPE["merges"],
        "token_type": BPE["types"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return gguf_metadata({**metadata, **changes})


def spm_metadata(**changes: Any) -> dict[str, Any]:
    metadata = {"model": "llama", "tokens": SPM["tokens"], "scores": SPM["scores"], "token_type": SPM["types"]}
    return gguf_metadata({**metadata, **changes})


def gguf_metadata(values: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


@pytest.fixture(scope="module")
def smollm2(default_model: Path) -> Tokenizer:
    return Tokenizer.from_gguf(read_gguf(default_model).metadata())


@pytest.mark.parametrize(("text", "ids"), SMOLLM2, ids=range(len(SMOLLM2)))
def test_default_model_ids_equal_llama_cpp(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids
    assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_default_model_knows_its_special_tokens(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids == {0, 2}  # <|endoftext|> and <|im_end|>
    assert smollm2.special_token_ids == frozenset(range(17))
    assert smollm2.id_to_token(2) == "<|im_end|>"


# llama.cpp treats U+2029 as no letter of the CJK range, and leaves \p{M} out of tekken's and o200k's words. There the
# patterns of the models' own tokenizer.json hold.
_LLAMA_CPP_DIFFERS = {
    **dict.fromkeys(("deepseek-llm", "deepseek-coder"), lambda text: "\u2029" in text),
    **dict.fromkeys(("tekken", "gpt-4o"), lambda text: any(mark in text for mark in "\u0301\u094d\u0e31")),
}


@pytest.mark.parametrize("pre", BPE["ids"])
def test_bpe_pre_tokenizer_splits_as_llama_cpp(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(bpe_metadata(pre=pre))
    differs: Callable[[str], bool] = _LLAMA_CPP_DIFFERS.get(pre, lambda text: False)
    cases = [(text, ids) for text, ids in zip(TEXTS, BPE["ids"][pre], strict=True) if not differs(text)]
    assert len(cases) >= len(TEXTS) - 4
    for text, ids in cases:
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text


def test_every_pre_tokenizer_family_is_compared_with_llama_cpp() -> None:
    compared = [PRE_TOKENIZERS[name] for name in BPE["ids"]]
    assert all(pre in compared for pre in PRE_TOKENIZERS.values())


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_bpe_pre_tokenizer_loses_no_text(name: str) -> None:
    tokenizer = Tokenizer.from_gguf(bpe_metadata(pre=name))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False).removeprefix("<s>") == text


@pytest.mark.parametrize(("kind", "space"), [("add_space_prefix", True), ("no_space_prefix", False)])
def test_sentencepiece_ids_equal_llama_cpp(kind: str, space: bool) -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata(add_space_prefix=space))
    for text, ids in zip(SPM["texts"], SPM["ids"][kind], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        if "<|im_end|>" not in text:
            assert tokenizer.decode(ids) == text


def test_sentencepiece_defaults_are_llama_2s() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata())
    assert (tokenizer.bos_token_id, tokenizer.strips_space) == (1, True)
    assert tokenizer.eos_token_ids == {2, tokenizer.encode("<|im_end|>")[-1]}
    assert tokenizer.encode("")[0] == 1


def test_sentencepiece_token_bytes_of_each_kind() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata())
    assert tokenizer.token_bytes(3 + 0xF0) == b"\xf0"  # <0xF0>
    assert tokenizer.token_bytes(SPM["tokens"].index("▁")) == b" "
    assert tokenizer.token_bytes(SPM["tokens"].index("<tool>")) == b"<tool>"  # user-defined: text
    assert tokenizer.token_bytes(2) == b""  # </s>: control


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({"pre": "gpt-2"}, [6]),
        ({"pre": "gpt-2", "add_bos_token": True}, [0, 6]),
        ({"pre": "llama-bpe"}, [0, 6]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [6]),
        ({"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}, [0, 6, 1]),
    ],
)
def test_gguf_bos_and_eos_follow_the_file_then_the_kind(changes: dict[str, Any], ids: list[int]) -> None:
    tokenizer = Tokenizer.from_gguf(bpe_metadata(**changes))
    assert tokenizer.encode(tokenizer.id_to_token(6)) == ids
    assert tokenizer.encode(tokenizer.id_to_token(6), add_special_tokens=False) == [6]


def test_bos_is_not_doubled() -> None:
    tokenizer = Tokenizer.from_gguf(bpe_metadata(pre="llama-bpe"))
    assert tokenizer.encode("<s>Hello") == tokenizer.encode("Hello")
    assert tokenizer.encode("<s><s>Hello") == [0, *tokenizer.encode("Hello")]  # what the text says twice stays


def test_chat_holds_the_bos_of_its_template_once() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = Tokenizer.from_gguf(bpe_metadata(pre="llama-bpe") | {"tokenizer.chat_template": template})
    messages = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.encode_chat(messages)
    assert ids == [0, *tokenizer.encode("Hello", add_special_tokens=False), 2]
    assert ids == tokenizer.encode(tokenizer.apply_chat_template(messages))


def test_chat_gets_no_bos_that_its_template_lacks() -> None:
    metadata = bpe_metadata(pre="llama-bpe") | {"tokenizer.chat_template": "{{ messages[0].content }}"}
    assert 0 not in Tokenizer.from_gguf(metadata).encode_chat([{"role": "user", "content": "Hello"}])


def test_gguf_end_tokens_are_all_found() -> None:
    named = Tokenizer.from_gguf(bpe_metadata(eot_token_id=7, eom_token_id=8))
    assert named.eos_token_ids == {1, 7, 8, 2}  # 2 is <|im_end|>, found by its text


@pytest.mark.parametrize(
    ("metadata", "error", "words"),
    [
        (bpe_metadata(pre="pelican"), UnsupportedModel, "'pelican'"),
        (bpe_metadata(model="bert"), UnsupportedModel, "'bert'"),
        (bpe_metadata(model=None), UnsupportedModel, "None"),
        (bpe_metadata(tokens=None), CorruptWeights, "tokens"),
        (bpe_metadata(tokens=[b"a"]), CorruptWeights, "strings"),
        (bpe_metadata(tokens=["a", "b", "a"], token_type=None), CorruptWeights, "twice"),
        (bpe_metadata(merges=None), CorruptWeights, "merges is missing"),
        (bpe_metadata(merges=["ab"]), CorruptWeights, "'ab'"),
        (bpe_metadata(merges=["nowhere tobefound"]), CorruptWeights, "contradict"),
        (bpe_metadata(token_type=[1]), CorruptWeights, "token_type"),
        (bpe_metadata(bos_token_id=900), CorruptWeights, "bos_token_id is 900"),
        (bpe_metadata(eos_token_id="x"), CorruptWeights, "eos_token_id is a str"),
        (bpe_metadata(bos_token_id=None, add_bos_token=True), CorruptWeights, "no bos_token_id"),
        (bpe_metadata() | {"tokenizer.chat_template": 5}, CorruptWeights, "chat_template is a int"),
        (spm_metadata(scores=None), CorruptWeights, "scores"),
        (spm_metadata(scores=[0.0]), CorruptWeights, "scores"),
        (spm_metadata(scores=[float("nan")] * len(SPM["tokens"])), CorruptWeights, "finite"),
    ],
)
def test_gguf_metadata_that_cannot_be_used_is_refused(metadata: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        Tokenizer.from_gguf(metadata)


def test_gguf_empty_token_matches_nothing() -> None:
    tokenizer = Tokenizer.from_gguf(bpe_metadata(tokens=["", *BPE["tokens"][1:]]))
    assert tokenizer.id_to_token(0) == "[EMPTY_0]"
    assert 0 not in tokenizer.encode("Hello")


def test_chat_message_that_cannot_be_encoded_is_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidPrompt, match=r"U\+DFFF"):
        smollm2.encode_chat([{"role": "user", "content": "\udfff"}])
