"""Checkpoint: the tensors of a model's files under one set of names, as views of the mapped bytes.

safetensors.py and gguf.py only read headers; both fill a table of StoredTensor, and everything a loader asks for is
answered here. Nothing is copied on the way: a segment is a view of the file, and pages that have been converted can be
given back to the system with `release`.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from inferneo_core.errors import CorruptWeights, ModelNotFound, UnsupportedModel
from inferneo_core.ops.base import Segment
from inferneo_core.weights.dequant import BLOCK_TYPES

DENSE_TYPES = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})


class MappedFile:
    """A file mapped for reading. It stays mapped for as long as a tensor views it.

    Args:
        path: a file of at least one byte.
    Raises:
        ModelNotFound: it does not exist or cannot be read.
        CorruptWeights: it is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size == 0:
                    raise CorruptWeights(f"{path} has 0 bytes (fetch the file again)")
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise ModelNotFound(f"{path} cannot be read: {error} (fetch the model again)") from error
        with warnings.catch_warnings():
            # The pages are read-only, so that a stray write faults instead of changing a weight; torch warns of that.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._bytes = torch.frombuffer(self.data, dtype=torch.uint8)

    def view(self, offset: int, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, a view of the mapping."""
        return self._bytes[offset : offset + num_bytes]

    def release(self, offset: int, num_bytes: int) -> None:
        """Drop these bytes' pages from this process's memory; a later read brings them back from the file."""
        if num_bytes:
            start = offset - offset % mmap.PAGESIZE
            self.data.madvise(mmap.MADV_DONTNEED, start, offset + num_bytes - start)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and how it is stored.

    Attributes:
        file: the mapped file.
        offset: bytes from the file's start.
        num_bytes: stored size.
        shape: logical shape, outermost dimension first; never the shape in bytes.
        type: "F32", "F16", "BF16", a block type such as "Q4_1", or a type that is refused when it is asked for.
        interleaved_heads: number of heads whose two halves are interleaved row by row (GGUF's Q and K); 0: none.
    """

    file: MappedFile
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    type: str
    interleaved_heads: int = 0

    def view(self) -> Tensor:
        """Dense: the logical shape in its own dtype; quantised: [rows, bytes_per_row] uint8."""
        data = self.file.view(self.offset, self.num_bytes)
        if self.type in BLOCK_TYPES:
            return data.view(-1, self.num_bytes // self.shape[0])
        dtype = DENSE_TYPES[self.type]
        # Both formats allow any header length, hence odd offsets; torch cannot view those in place.
        aligned = data if self.offset % dtype.itemsize == 0 else data.clone()
        return aligned.view(dtype).view(self.shape)

    def row_order(self) -> Tensor | None:
        """[rows] int64 as Segment.row_order has it; None when the rows are stored in order.

        GGUF stores a head's rows as [pair, half], the verbs emit [half, pair].
        """
        if self.interleaved_heads == 0:
            return None
        rows = torch.arange(self.shape[0]).view(self.interleaved_heads, -1, 2)  # [num_heads, head_dim / 2, 2]
        return rows.transpose(1, 2).reshape(-1)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of one model, named as Hugging Face names Llama's whatever the format.

    Attributes:
        source: the directory or file, for messages.
        tensors: name -> StoredTensor. Unknown names stand here too and disturb nobody.
        key_values: GGUF's metadata.
    """

    source: Path
    tensors: dict[str, StoredTensor]
    key_values: dict[str, Any] = field(default_factory=dict)

    def names(self) -> frozenset[str]:
        """All tensors, such as model.layers.0.self_attn.q_proj.weight."""
        return frozenset(self.tensors)

    def metadata(self) -> dict[str, Any]:
        """GGUF's key-value pairs as plain Python values, by key; empty for safetensors."""
        return self.key_values

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape, as the network sees it. Raises CorruptWeights: there is no such tensor."""
        return self._stored(name).shape

    def segment(self, name: str) -> Segment:
        """A weight matrix as it is stored.

        Args:
            name: of a tensor with two dimensions.
        Returns:
            Segment whose data views the mapped file; its pages count as this process's memory once they are read.
        Raises:
            CorruptWeights: there is no such tensor, or it is no matrix.
            UnsupportedModel: its type is not one that Inferneo reads.
        """
        stored = self._readable(name)
        if len(stored.shape) != 2:
            raise CorruptWeights(f"{self.source}: {name} has shape {list(stored.shape)}; it must have 2 dimensions")
        return Segment(stored.view(), stored.type if stored.type in BLOCK_TYPES else "", stored.row_order())

    def tensor(self, name: str) -> Tensor:
        """A dense tensor, its rows in the network's order: norms, biases, RoPE factors.

        Returns:
            fp32, fp16 or bf16 as stored; a view of the mapped file where the order allows.
        Raises:
            CorruptWeights: there is no such tensor.
            UnsupportedModel: it is quantised, or of a type that Inferneo does not read.
        """
        stored = self._readable(name)
        if stored.type in BLOCK_TYPES:
            raise UnsupportedModel(
                f"{self.source}: {name} is stored as {stored.type}; this tensor must be one of "
                f"{', '.join(DENSE_TYPES)} (convert the model again, keeping vectors dense)"
            )
        order = stored.row_order()
        return stored.view() if order is None else stored.view()[order]

    def release(self, name: str) -> None:
        """Give the pages of a tensor back once it has been converted, so that they never add up beside the result.

        Views stay valid: reading one again brings its pages back. Raises CorruptWeights: there is no such tensor.
        """
        stored = self._stored(name)
        stored.file.release(stored.offset, stored.num_bytes)

    def close(self) -> None:
        """Forget every tensor; a file is unmapped when the last view of it is gone. May be called twice."""
        self.tensors.clear()

    @property
    def num_bytes(self) -> int:
        """Stored size of all tensors."""
        return sum(stored.num_bytes for stored in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that holds most of a dense checkpoint's matrices; None when any matrix is quantised."""
        bytes_by_type: Counter[str] = Counter()
        for stored in self.tensors.values():
            if len(stored.shape) == 2:
                bytes_by_type[stored.type] += stored.num_bytes
        if any(type_ in BLOCK_TYPES for type_ in bytes_by_type):
            return None
        dense = [type_ for type_, _ in bytes_by_type.most_common() if type_ in DENSE_TYPES]
        return DENSE_TYPES[dense[0]] if dense else None

    def _stored(self, name: str) -> StoredTensor:
        stored = self.tensors.get(name)
        if stored is None:
            raise CorruptWeights(
                f"{self.source} has no tensor {name} among its {len(self.tensors)} (fetch the model again)"
            )
        return stored

    def _readable(self, name: str) -> StoredTensor:
        stored = self._stored(name)
        if stored.type not in DENSE_TYPES and stored.type not in BLOCK_TYPES:
            raise unsupported_type(self.source, name, stored.type)
        return stored


def unsupported_type(source: Path, name: str, type_: str) -> UnsupportedModel:
    """The error for a tensor whose type Inferneo does not read."""
    known = ", ".join((*DENSE_TYPES, *BLOCK_TYPES))
    return UnsupportedModel(f"{source}: {name} is stored as {type_}; Inferneo reads {known} (convert the model)")


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object from untrusted bytes.

    Args:
        text: UTF-8.
        where: what the bytes are, for the message.
    Raises:
        CorruptWeights: not UTF-8, not JSON, nested too deeply, a key that stands twice, or not an object.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CorruptWeights(f"{where} is not valid JSON: {error} (fetch the file again)") from error
    if not isinstance(value, dict):
        raise CorruptWeights(f"{where} is a JSON {type(value).__name__}; it must be an object (fetch the file again)")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r:.80} stands twice")
    return result
