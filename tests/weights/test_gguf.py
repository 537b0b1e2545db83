"""The GGUF reader: against files that the gguf package wrote, and against files that nobody should have written."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from inferneo_core.errors import CorruptWeights, ModelError, UnsupportedModel
from inferneo_core.weights.checkpoint import DENSE_TYPES
from inferneo_core.weights.dequant import BLOCK_TYPES, dequantize
from inferneo_core.weights.gguf import read_gguf

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, type_: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_) + value


def array(type_: int, length: int, items: bytes) -> bytes:
    return struct.pack("<IQ", type_, length) + items


def info(name: str | bytes, dims: Iterable[int], type_: int = 0, offset: int = 0, num_dims: int | None = None) -> bytes:
    dims = list(dims)
    count = len(dims) if num_dims is None else num_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, type_, offset)


ARCHITECTURE = pair("general.architecture", STRING, string("llama"))
HEADS = pair("llama.attention.head_count", U32, struct.pack("<I", 2))


def raw_file(
    pairs: Iterable[bytes] = (ARCHITECTURE,),
    infos: Iterable[bytes] = (),
    num_data_bytes: int = 0,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_pairs: int | None = None,
    num_infos: int | None = None,
    alignment: int = 32,
) -> bytes:
    pairs, infos = list(pairs), list(infos)
    counts = (len(infos) if num_infos is None else num_infos, len(pairs) if num_pairs is None else num_pairs)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + bytes(num_data_bytes)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def permuted(weights: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """What llama.cpp's converter does to Q and K: each head's two halves become alternating rows."""
    rows = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weights.shape))


def test_metadata_of_every_type_as_plain_python_values(tmp_path: Path) -> None:
    values = [
        ("u8", U8, "B", 255), ("i8", I8, "b", -128), ("u16", U16, "H", 65535), ("i16", I16, "h", -32768),
        ("u32", U32, "I", 2**32 - 1), ("i32", I32, "i", -(2**31)), ("u64", U64, "Q", 2**64 - 1),
        ("i64", I64, "q", -(2**63)), ("f32", F32, "f", 1.5), ("f64", F64, "d", 1e-300), ("yes", BOOL, "?", True),
    ]  # fmt: skip
    pairs = [pair(name, type_, struct.pack("<" + code, value)) for name, type_, code, value in values]
    for name, type_, code, value in values:
        pairs.append(pair(f"a.{name}", ARRAY, array(type_, 3, struct.pack(f"<3{code}", value, value, value))))
    pairs += [
        pair("text", STRING, string("naïve 日本 🙂\x00")),
        pair("texts", ARRAY, array(STRING, 3, string("Ġthe") + string("") + string("é"))),
        pair("none", ARRAY, array(STRING, 0, b"")),
        pair("no numbers", ARRAY, array(F32, 0, b"")),
    ]
    metadata = read_gguf(write(tmp_path, raw_file(pairs))).metadata()
    for name, _, _, value in values:
        assert (metadata[name], metadata[f"a.{name}"]) == (value, [value] * 3)
        assert type(metadata[name]) is type(value)
    assert (metadata["text"], metadata["texts"]) == ("naïve 日本 🙂\x00", ["Ġthe", "", "é"])
    assert (metadata["none"], metadata["no numbers"]) == ([], [])


@pytest.mark.slow
def test_default_model_metadata_equals_the_gguf_package(default_model: Path) -> None:
    fields = gguf.GGUFReader(default_model).fields
    expected = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert read_gguf(default_model).metadata() == expected


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, npt.NDArray[Any]]]:
    """A file by the gguf package with a tensor of every type; the tensors as they went in, by canonical name."""
    generator = np.random.default_rng(3)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    tensors: dict[str, npt.NDArray[Any]] = {}

    def add(name: str, canonical: str, values: npt.NDArray[Any], num_heads: int = 0, type_: str = "") -> None:
        tensors[canonical] = values
        stored = permuted(values, num_heads) if num_heads else values
        writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType[type_] if type_ else None)

    layer = "model.layers.11"
    add("token_embd.weight", "model.embed_tokens.weight", generator.standard_normal((7, 13), np.float32))
    add("output_norm.weight", "model.norm.weight", generator.standard_normal(13, np.float32))
    add("output.weight", "lm_head.weight", generator.standard_normal((7, 13)).astype(np.float16))
    add("rope_freqs.weight", "rope_freqs.weight", generator.standard_normal(5, np.float32))
    add("blk.11.attn_norm.weight", f"{layer}.input_layernorm.weight", generator.standard_normal(13, np.float32))
    add("blk.11.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", generator.standard_normal(13, np.float32))
    add("blk.11.attn_q.weight", f"{layer}.self_attn.q_proj.weight", generator.standard_normal((60, 13), np.float32), 6)
    add("blk.11.attn_q.bias", f"{layer}.self_attn.q_proj.bias", generator.standard_normal(60, np.float32), 6)
    add("blk.11.attn_k.bias", f"{layer}.self_attn.k_proj.bias", generator.standard_normal(20, np.float32), 2)
    k_bytes = generator.integers(0, 60, (20, 2 * 20), dtype=np.uint8)
    add("blk.11.attn_k.weight", f"{layer}.self_attn.k_proj.weight", k_bytes, 2, "Q4_1")
    for type_, (_, type_size) in BLOCK_TYPES.items():
        blocks = generator.integers(0, 60, (5, 3 * type_size), dtype=np.uint8)
        add(f"{type_}.weight", f"{type_}.weight", blocks, 0, type_)
    bf16 = torch.from_numpy(generator.standard_normal((5, 3), np.float32)).bfloat16()
    add("BF16.weight", "BF16.weight", bf16.view(torch.uint8).numpy(), 0, "BF16")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf", tensors


def test_tensors_have_canonical_names_shapes_and_values(written: tuple[Path, dict[str, npt.NDArray[Any]]]) -> None:
    path, expected = written
    checkpoint = read_gguf(path)
    assert checkpoint.names() == frozenset(expected)
    for name, values in expected.items():
        stored = checkpoint.tensors[name]
        if stored.type in DENSE_TYPES:
            actual = checkpoint.tensor(name)
            assert actual.dtype == DENSE_TYPES[stored.type]
            assert checkpoint.shape(name) == tuple(actual.shape)
            assert np.array_equal(actual.contiguous().view(torch.uint8).numpy(), values.view(np.uint8)), name
        else:
            segment = checkpoint.segment(name)
            block_size, type_size = BLOCK_TYPES[segment.quant_type]
            rows = segment.data if segment.row_order is None else segment.data[segment.row_order]
            assert checkpoint.shape(name) == (values.shape[0], values.shape[1] // type_size * block_size)
            assert np.array_equal(rows.numpy(), values), name


def test_segments_keep_storage_order_and_say_how_to_leave_it(
    written: tuple[Path, dict[str, npt.NDArray[Any]]],
) -> None:
    path, expected = written
    checkpoint = read_gguf(path)
    for name, num_heads in (("q_proj", 6), ("k_proj", 2)):
        segment = checkpoint.segment(f"model.layers.11.self_attn.{name}.weight")
        values = expected[f"model.layers.11.self_attn.{name}.weight"]
        assert segment.row_order is not None
        assert np.array_equal(segment.data.numpy(), permuted(values, num_heads))
        assert np.array_equal(segment.data[segment.row_order].numpy(), values)
    assert checkpoint.segment("lm_head.weight").row_order is None


def test_rows_in_order_dequantise_alike_before_and_after(written: tuple[Path, dict[str, npt.NDArray[Any]]]) -> None:
    segment = read_gguf(written[0]).segment("model.layers.11.self_attn.k_proj.weight")
    order = segment.row_order
    assert order is not None
    assert torch.equal(dequantize(segment.data, "Q4_1")[order], dequantize(segment.data[order], "Q4_1"))


def test_head_count_kv_defaults_to_head_count(tmp_path: Path) -> None:
    data = raw_file([ARCHITECTURE, HEADS], [info("blk.0.attn_k.weight", [3, 8])], 96)
    segment = read_gguf(write(tmp_path, data)).segment("model.layers.0.self_attn.k_proj.weight")
    assert segment.row_order is not None
    assert segment.row_order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_alignment_of_one_leaves_odd_offsets_readable(tmp_path: Path) -> None:
    alignment = pair("general.alignment", U32, struct.pack("<I", 1))
    values = np.arange(6, dtype=np.float32)
    head = raw_file([ARCHITECTURE, alignment, pair("x", U8, b"\0")], [info("w", [3, 2])], alignment=1)
    assert len(head) % 4 != 0
    checkpoint = read_gguf(write(tmp_path, head + values.tobytes()))
    assert torch.equal(checkpoint.segment("w").data, torch.from_numpy(values.reshape(2, 3)))


def aligned(value: bytes, type_: int = U32) -> bytes:
    return raw_file([ARCHITECTURE, pair("general.alignment", type_, value)], [info("w", [3, 2])], 24)


def valued(type_: int, value: bytes) -> bytes:
    return raw_file([pair("k", type_, value)])


def one(*args: Any, num_data_bytes: int = 64, **kwargs: Any) -> bytes:
    return raw_file(infos=[info(*args, **kwargs)], num_data_bytes=num_data_bytes)


def two(first: bytes, second: bytes) -> bytes:
    return raw_file(infos=[first, second], num_data_bytes=64)


CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes"),
    "magic": (raw_file(magic=b"GGML"), "begins with b'GGML'"),
    "many pairs": (raw_file(num_pairs=2**64 - 1), r"metadata count is 18446744073709551615; .* room for \d+"),
    "many tensors": (raw_file(num_infos=2**63), r"tensor count is 9223372036854775808; .* room for \d+"),
    "one pair too many": (raw_file(num_pairs=2), "the metadata key '' is empty"),
    "key of 2**64 - 1": (raw_file([struct.pack("<Q", 2**64 - 1) + bytes(20)]), "at most 65535"),
    "key past the end": (raw_file([struct.pack("<Q", 65535) + bytes(20)]), "takes 65535 bytes"),
    "empty key": (raw_file([pair("", U8, b"\0")]), "'' is empty"),
    "key twice": (raw_file([ARCHITECTURE, ARCHITECTURE]), "'general.architecture' is given twice"),
    "key not UTF-8": (raw_file([pair(b"\xff", U8, b"\0")]), "is not UTF-8"),
    "value not UTF-8": (valued(STRING, string(b"\xff")), "'k' is not UTF-8"),
    "item not UTF-8": (valued(ARRAY, array(STRING, 1, string(b"\xff"))), "'k' is not UTF-8"),
    "value type": (valued(13, bytes(8)), "'k' has the value type 13"),
    "array of arrays": (valued(ARRAY, array(ARRAY, 1, bytes(16))), "value type 9"),
    "long string": (valued(STRING, struct.pack("<Q", 2**63)), "'k' has 9223372036854775808 bytes"),
    "long array": (valued(ARRAY, array(F64, 2**61, b"")), "length of 'k' is 2305843009213693952"),
    "many strings": (valued(ARRAY, array(STRING, 2**60, b"")), "length of 'k' is 1152921504606846976"),
    "last string": (valued(ARRAY, array(STRING, 1, struct.pack("<Q", 999))), "string 0 of 'k' takes 999"),
    "huge array": (valued(ARRAY, array(U8, 2**24 + 1, bytes(2**24 + 1))), "16777217 items; at most 16777216"),
    "alignment 0": (aligned(struct.pack("<I", 0)), "general.alignment is 0; it must be a power of two"),
    "alignment 13": (aligned(struct.pack("<I", 13)), "general.alignment is 13"),
    "alignment text": (aligned(string("32"), STRING), "general.alignment is '32'"),
    "alignment 2**31": (aligned(struct.pack("<I", 2**31)), "truncated"),
    "name empty": (one("", [1]), "empty name"),
    "name long": (one("w" * 65, [1]), "65 bytes; at most 64"),
    "name twice": (two(info("w", [1]), info("w", [1], 0, 32)), "'w' stands twice"),
    "no dimensions": (one("w", []), "'w' has 0 dimensions"),
    "five dimensions": (one("w", [1] * 5), "5 dimensions; it must have 1 to 4"),
    "2**32 - 1 dimensions": (one("w", [1], num_dims=2**32 - 1), "4294967295 dimensions"),
    "zero dimension": (one("w", [3, 0]), r"shape \[0, 3\]"),
    "negative dimension": (one("w", [2**64 - 2]), "each dimension must be"),
    "overflowing product": (one("w", [2**62, 2**62]), "truncated"),
    "partial block": (one("w", [33, 2], 3), "rows of 33 .* multiple of 32"),
    "odd offset": (one("w", [1], 0, 4), "offset 4; .* multiple of 32"),
    "offset past the end": (one("w", [1], 0, 2**63), "truncated"),
    "overlap": (two(info("a", [16]), info("b", [1], 0, 32)), "'b' has offset 32; .* from 64"),
    "truncated": (one("w", [16], num_data_bytes=63), "truncated"),
    "no data": (one("w", [16], num_data_bytes=0), "truncated"),
    "no head count": (one("blk.0.attn_q.weight", [3, 4]), "head_count is None"),
    "odd heads": (
        raw_file([ARCHITECTURE, HEADS], [info("blk.0.attn_q.weight", [3, 6])], 72),
        "6 rows and llama",
    ),
}

OTHER = pair("general.architecture", STRING, string("qwen2"))
UNSUPPORTED: dict[str, tuple[bytes, str]] = {
    "version 1": (raw_file(version=1), "GGUF version 1; Inferneo reads"),
    "version 0": (raw_file(version=0), "GGUF version 0;"),
    "big-endian": (raw_file(version=3 << 24), "the file is big-endian"),
    "type": (one("w", [256], 23), "w is stored as IQ4_XS"),
    "unknown type": (one("w", [256], 2**31), "w is stored as type 2147483648"),
    "split": (raw_file([pair("split.count", U16, struct.pack("<H", 3))]), "one of 3 files .* --merge"),
    "architecture": (raw_file([OTHER], [info("blk.0.attn_q.weight", [3, 4])], 48), "architecture 'qwen2'"),
}


def assert_refused(path: Path, error: type[ModelError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_file_is_refused(tmp_path: Path, case: str) -> None:
    data, message = CORRUPT[case]
    assert_refused(write(tmp_path, data), CorruptWeights, message)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_file_is_refused(tmp_path: Path, case: str) -> None:
    data, message = UNSUPPORTED[case]
    assert_refused(write(tmp_path, data), UnsupportedModel, message)


GOOD_FILE = raw_file(
    [ARCHITECTURE, HEADS, pair("tokens", ARRAY, array(STRING, 3, string("a") + string("bc") + string("")))],
    [info("token_embd.weight", [32, 3], 3), info("blk.0.attn_q.weight", [3, 4], 0, 64)],
    64 + 48,
)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    assert len(read_gguf(write(tmp_path, GOOD_FILE)).names()) == 2
    for length in range(len(GOOD_FILE)):
        with pytest.raises(CorruptWeights):
            read_gguf(write(tmp_path, GOOD_FILE[:length]))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD_FILE) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3)
)
def test_damage_is_a_typed_error_or_harmless(tmp_path: Path, patches: list[tuple[int, bytes]]) -> None:
    data = bytearray(GOOD_FILE)
    for start, patch in patches:
        data[start : start + len(patch)] = patch
    try:
        checkpoint = read_gguf(write(tmp_path, bytes(data[: len(GOOD_FILE)])))
    except ModelError:
        return
    for name in checkpoint.names():  # whatever was let through can be read to its last byte
        assert checkpoint.tensors[name].view().clone().nbytes == checkpoint.tensors[name].num_bytes
