"""safetensors: one file, or shards under an index. Headers are untrusted; every number is checked before it is used.

Source: https://github.com/huggingface/safetensors#format and, for what to refuse, its `attacks` directory.
"""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

from inferneo_core.errors import CorruptWeights, ModelNotFound, UnsafeWeights
from inferneo_core.weights.checkpoint import MappedFile, StoredTensor, parse_json_object, unsupported_type

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 8
MAX_DIMENSION = 2**63 - 1

# Bits an element, so that a tensor nobody asks for (an integer buffer) is still checked against the file.
_DTYPE_BITS = MappingProxyType(
    {
        "F64": 64, "I64": 64, "U64": 64, "C64": 64,
        "F32": 32, "I32": 32, "U32": 32,
        "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
        "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8,
        "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    }
)  # fmt: skip


def read_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json names.

    Raises:
        ModelNotFound: neither exists, or a shard is missing.
        CorruptWeights: a file is truncated, or a header or the index contradicts itself or the files.
        UnsafeWeights: the index names a file outside the directory.
        UnsupportedModel: a tensor has a dtype that the format does not define.
    """
    if (directory / SINGLE_FILE).exists():
        return _read_file(directory / SINGLE_FILE)
    index_path = directory / INDEX_FILE
    try:
        text = index_path.read_bytes()
    except OSError as error:
        raise ModelNotFound(f"{directory} has neither {SINGLE_FILE} nor a readable {INDEX_FILE}: {error}") from error
    weight_map = parse_json_object(text, str(index_path)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CorruptWeights(f"{index_path}: weight_map must map each tensor to a file name (fetch the index again)")
    for shard in sorted(set(weight_map.values())):
        _check_inside(index_path, shard)
    shards = {shard: _read_file(directory / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CorruptWeights(f"{index_path} places {name} in {shard}, which lacks it (fetch the model again)")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _check_inside(index_path: Path, shard: str) -> None:
    """Refuse a shard outside the index's directory by its name alone: download caches link to where the bytes lie."""
    names = PurePosixPath(shard), PureWindowsPath(shard)
    if not shard or any(name.is_absolute() or name.drive or name.root or ".." in name.parts for name in names):
        raise UnsafeWeights(
            f"{index_path} names the shard {shard!r:.120}; a shard must lie in the index's own directory (do not trust "
            "this model)"
        )


def _read_file(path: Path) -> dict[str, StoredTensor]:
    file = MappedFile(path)
    if file.size < 8:
        raise CorruptWeights(f"{path} has {file.size} bytes; a header takes at least 8 (fetch the file again)")
    header_bytes = int.from_bytes(file.data[:8], "little")
    limit = min(MAX_HEADER_BYTES, file.size - 8)
    if header_bytes > limit:
        raise CorruptWeights(f"{path}: its header claims {header_bytes} bytes; at most {limit} (fetch the file again)")
    header = parse_json_object(file.data[8 : 8 + header_bytes], f"{path}: the header")
    _check_metadata(path, header.pop("__metadata__", None))
    data_start = 8 + header_bytes
    tensors = {name: _entry(file, data_start, name, entry) for name, entry in header.items()}
    _check_coverage(file, data_start, tensors)
    return tensors


def _check_metadata(path: Path, metadata: object) -> None:
    valid = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not valid:
        raise CorruptWeights(f"{path}: __metadata__ must map strings to strings (fetch the file again)")


def _entry(file: MappedFile, data_start: int, name: str, entry: Any) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptWeights(
            f"{file.path}: {name!r:.120} must have a dtype, a shape and two data_offsets (fetch the file again)"
        ) from error
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise unsupported_type(file.path, name, f"{dtype!r:.40}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, (*shape, begin, end))):
        raise CorruptWeights(
            f"{file.path}: {name!r:.120} has shape {shape!r:.120} and data_offsets [{begin!r:.40}, {end!r:.40}]; "
            f"at most {MAX_DIMENSIONS} dimensions, and integers in [0, {MAX_DIMENSION}] (fetch the file again)"
        )
    num_bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if num_bits != (end - begin) * 8:
        raise CorruptWeights(
            f"{file.path}: {name!r:.120} of shape {shape} and dtype {dtype} needs {num_bits / 8:.15g} bytes; its "
            f"data_offsets hold {end - begin} (fetch the file again)"
        )
    return StoredTensor(file, data_start + begin, end - begin, tuple(shape), dtype)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_DIMENSION


def _check_coverage(file: MappedFile, data_start: int, tensors: dict[str, StoredTensor]) -> None:
    """The tensors must tile the data: no overlap, no gap, nothing beyond the end, nothing left over."""
    end = data_start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if stored.offset != end:
            kind = "overlaps the tensor before it" if stored.offset < end else "leaves a gap before it"
            raise CorruptWeights(
                f"{file.path}: {name!r:.120} {kind}: it begins at byte {stored.offset}; it must begin at {end} (fetch "
                "the file again)"
            )
        end = stored.offset + stored.num_bytes
    if end != file.size:
        raise CorruptWeights(
            f"{file.path} has {file.size} bytes; its tensors end at byte {end} (a broken download: fetch it again)"
        )
