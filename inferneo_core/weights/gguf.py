"""GGUF: the container of llama.cpp's models, read strictly: every count, length and offset is checked before its use.

The `gguf` package needs 3.5 s for the 98,000 strings of a small vocabulary and trusts the file; this reader takes a
tenth of a second and refuses what llama.cpp refuses.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from inferneo_core.errors import CorruptWeights, UnsupportedModel
from inferneo_core.weights.checkpoint import DENSE_TYPES, Checkpoint, MappedFile, StoredTensor, unsupported_type
from inferneo_core.weights.dequant import BLOCK_TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 64
MAX_DIMENSIONS = 4
MAX_DIMENSION = 2**63 - 1
MAX_ARRAY_ITEMS = 1 << 24  # sixty times the largest vocabulary; keeps a hostile file from costing eight times its size

_MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # a one-byte key, its type, a one-byte value
_MIN_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # a one-byte name, one dimension, type, offset

_STRING, _ARRAY = 8, 9
_SCALARS = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)  # struct codes

_TENSOR_TYPES = MappingProxyType(
    {
        0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
        12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
        20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
        29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    }
)  # fmt: skip

_MODEL_NAMES = MappingProxyType(
    {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)
_LAYER_NAMES = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_LAYER_TENSOR = re.compile(r"blk\.([0-9]+)\.(\w+)\.(weight|bias)")
_HEAD_COUNT_KEYS = MappingProxyType({"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"})


def read_gguf(path: Path) -> Checkpoint:
    """The metadata and tensors of a GGUF file, tensors under Hugging Face's names for Llama.

    Returns:
        Checkpoint, with the metadata. rope_freqs.weight keeps its name.
    Raises:
        ModelNotFound: the file cannot be read.
        CorruptWeights: a count, length, type or offset is impossible or leads past the end of the file.
        UnsupportedModel: another version or byte order, a split file, a tensor type or an architecture we do not run.
    """
    reader = _Reader(MappedFile(path))
    _check_start(reader)
    num_tensors = reader.count("tensor count", _MIN_INFO_BYTES)
    num_pairs = reader.count("metadata count", _MIN_PAIR_BYTES)
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = reader.string("a metadata key", MAX_KEY_BYTES)
        if not key or key in metadata:
            reader.fail(f"the metadata key {key!r:.120} is {'given twice' if key else 'empty'}")
        metadata[key] = reader.value(f"{key!r:.120}")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(
            f"{path} is one of {metadata['split.count']} files of a split model; Inferneo reads one file (join them "
            "with llama-gguf-split --merge)"
        )
    infos = [_tensor_info(reader) for _ in range(num_tensors)]
    return Checkpoint(path, _place_tensors(reader, infos, metadata), metadata)


class _Reader:
    """A cursor over the file that never reads past its end."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.position = 0

    def fail(self, problem: str) -> NoReturn:
        raise CorruptWeights(f"{self.file.path}: {problem} (fetch the file again)")

    def need(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.file.size - self.position:
            self.fail(
                f"{what} takes {num_bytes} bytes from byte {self.position} on; the file ends at byte {self.file.size}"
            )

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.file.data, self.position)
        self.position += size
        return value

    def count(self, what: str, min_item_bytes: int) -> int:
        """A 64-bit count of items that must fit into the rest of the file."""
        count: int = self.scalar("Q", what)
        limit = (self.file.size - self.position) // min_item_bytes
        if count > limit:
            self.fail(f"{what} is {count}; the rest of the file has room for {limit}")
        return count

    def string(self, what: str, max_bytes: int) -> str:
        length: int = self.scalar("Q", what)
        if length > max_bytes:
            self.fail(f"{what} has {length} bytes; at most {max_bytes}")
        (value,) = self._decode([self._take(length, what)], what)
        return value

    def value(self, key: str) -> Any:
        """A metadata value: a scalar, a string, or a list of either. `key` is for messages."""
        type_: int = self.scalar("I", f"the type of {key}")
        if type_ == _STRING:
            return self.string(key, self.file.size)
        if type_ != _ARRAY:
            return self.scalar(self._scalar_code(type_, key), key)
        item_type: int = self.scalar("I", f"the item type of {key}")
        if item_type == _STRING:
            return self._strings(self._array_length(key, 8), key)
        code = self._scalar_code(item_type, key)
        item_bytes = struct.calcsize("<" + code)
        length = self._array_length(key, item_bytes)
        items = struct.unpack_from(f"<{length}{code}", self.file.data, self.position)
        self.position += length * item_bytes
        return list(items)

    def _scalar_code(self, type_: int, key: str) -> str:
        if type_ not in _SCALARS:
            self.fail(f"{key} has the value type {type_}; GGUF defines 0 to 12, and no arrays of arrays are read")
        return _SCALARS[type_]

    def _array_length(self, key: str, min_item_bytes: int) -> int:
        length = self.count(f"the length of {key}", min_item_bytes)
        if length > MAX_ARRAY_ITEMS:
            self.fail(f"{key} has {length} items; at most {MAX_ARRAY_ITEMS}")
        return length

    def _strings(self, count: int, what: str) -> list[str]:
        # The vocabulary's 98,000 strings come through here: two checks and two slices each, nothing else.
        data, size, position = self.file.data, self.file.size, self.position
        unpack_length = struct.Struct("<Q").unpack_from
        items: list[bytes] = []
        for _ in range(count):
            start = position + 8
            if start > size:
                self.fail(f"{what} ends at byte {size} with the file, after {len(items)} of {count} strings")
            (length,) = unpack_length(data, position)
            position = start + length
            if position > size:
                self.fail(f"string {len(items)} of {what} takes {length} bytes; the file ends at byte {size}")
            items.append(data[start:position])
        self.position = position
        return self._decode(items, what)

    def _take(self, num_bytes: int, what: str) -> bytes:
        self.need(num_bytes, what)
        start = self.position
        self.position += num_bytes
        return self.file.data[start : self.position]

    def _decode(self, items: list[bytes], what: str) -> list[str]:
        try:
            return [item.decode() for item in items]
        except UnicodeDecodeError as error:
            raise CorruptWeights(f"{self.file.path}: {what} is not UTF-8: {error} (convert the model again)") from error


class _TensorInfo(NamedTuple):
    """A tensor as the file's header gives it; `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    num_bytes: int


def _check_start(reader: _Reader) -> None:
    magic = reader.file.data[:4]
    if magic != MAGIC:
        reader.fail(f"it begins with {magic!r}; a GGUF file begins with {MAGIC!r}")
    reader.position = 4
    version: int = reader.scalar("I", "the version")
    if version not in VERSIONS:
        order = " (the file is big-endian)" if version & 0xFFFF == 0 and version else ""
        raise UnsupportedModel(
            f"{reader.file.path} has GGUF version {version}{order}; Inferneo reads little-endian versions "
            f"{VERSIONS[0]} and {VERSIONS[1]} (convert the model again)"
        )


def _tensor_info(reader: _Reader) -> _TensorInfo:
    name = reader.string("a tensor name", MAX_NAME_BYTES)
    if not name:
        reader.fail("a tensor has an empty name")
    num_dims: int = reader.scalar("I", f"the dimension count of {name!r}")
    if not 1 <= num_dims <= MAX_DIMENSIONS:
        reader.fail(f"{name!r} has {num_dims} dimensions; it must have 1 to {MAX_DIMENSIONS}")
    # The file puts the innermost dimension first.
    shape = tuple(reversed([reader.scalar("Q", f"a dimension of {name!r}") for _ in range(num_dims)]))
    if not all(1 <= dim <= MAX_DIMENSION for dim in shape):
        reader.fail(f"{name!r} has shape {list(shape)}; each dimension must be in [1, {MAX_DIMENSION}]")
    type_id: int = reader.scalar("I", f"the type of {name!r}")
    offset: int = reader.scalar("Q", f"the offset of {name!r}")
    type_ = _TENSOR_TYPES.get(type_id, f"type {type_id}")
    if type_ in DENSE_TYPES:
        block_size, type_size = 1, DENSE_TYPES[type_].itemsize
    elif type_ in BLOCK_TYPES:
        block_size, type_size = BLOCK_TYPES[type_]
    else:
        raise unsupported_type(reader.file.path, name, type_)
    if shape[-1] % block_size:
        reader.fail(f"{name!r} has rows of {shape[-1]} weights; {type_} stores a multiple of {block_size}")
    return _TensorInfo(name, shape, type_, offset, math.prod(shape) // block_size * type_size)


def _place_tensors(reader: _Reader, infos: list[_TensorInfo], metadata: dict[str, Any]) -> dict[str, StoredTensor]:
    """Check where the tensors lie, and give them their canonical names."""
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        reader.fail(f"general.alignment is {alignment!r:.40}; it must be a power of two")
    data_start = -(-reader.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.offset):
        if info.offset % alignment or info.offset < end:
            reader.fail(f"{info.name!r} has offset {info.offset}; it must be a multiple of {alignment} from {end} on")
        end = info.offset + info.num_bytes
        if data_start + end > reader.file.size:
            reader.fail(
                f"{info.name!r} ends at byte {data_start + end}; the file, truncated, ends at byte {reader.file.size}"
            )
        name, heads = _canonical(reader, info, metadata)
        if name in tensors:
            reader.fail(f"the tensor {info.name!r} stands twice")
        tensors[name] = StoredTensor(
            reader.file, data_start + info.offset, info.num_bytes, info.shape, info.type, heads
        )
    return tensors


def _canonical(reader: _Reader, info: _TensorInfo, metadata: dict[str, Any]) -> tuple[str, int]:
    """Hugging Face's name of a tensor, and its number of interleaved heads (0: its rows stand in order)."""
    match = _LAYER_TENSOR.fullmatch(info.name)
    if match is None or match[2] not in _LAYER_NAMES:
        return _MODEL_NAMES.get(info.name, info.name), 0
    name = f"model.layers.{int(match[1])}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    if match[2] not in _HEAD_COUNT_KEYS:
        return name, 0
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(
            f"{reader.file.path} has the architecture {architecture!r:.40}; Inferneo runs 'llama' (use another model)"
        )
    queries = metadata.get(_HEAD_COUNT_KEYS["attn_q"])
    num_heads = metadata.get(_HEAD_COUNT_KEYS[match[2]], queries)
    if not isinstance(num_heads, int) or num_heads < 1 or info.shape[0] % (2 * num_heads):
        reader.fail(
            f"{info.name} has {info.shape[0]} rows and {_HEAD_COUNT_KEYS[match[2]]} is {num_heads!r:.40}; the rows "
            "must divide into heads of even size"
        )
    return name, int(num_heads)
