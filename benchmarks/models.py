"""The shapes that are benchmarked: models by name, and how their weights are stored."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from inferneo_core.config import ModelConfig, RopeConfig
from inferneo_core.weights.dequant import BLOCK_TYPES

_LLAMA3_ROPE = RopeConfig("llama3", 500000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)

MODELS = MappingProxyType(
    {
        "smollm2-135m": ModelConfig(
            49152, 576, 1536, 30, 9, 3, 64, 1e-5, 8192, RopeConfig(theta=1e5), tie_word_embeddings=True
        ),
        "llama-3.2-1b": ModelConfig(
            128256, 2048, 8192, 16, 32, 8, 64, 1e-5, 131072, _LLAMA3_ROPE, tie_word_embeddings=True
        ),
        "llama-3.1-8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 131072, _LLAMA3_ROPE),
        "llama-3.1-70b": ModelConfig(128256, 8192, 28672, 80, 64, 8, 128, 1e-5, 131072, _LLAMA3_ROPE),
    }
)

DENSE_BYTES = MappingProxyType({"F32": 4, "F16": 2, "BF16": 2})  # bytes a weight, under GGUF's names


@dataclass(frozen=True, slots=True)
class Storage:
    """How a model's tensors are stored.

    Attributes:
        weights: GGUF name of the projections' type, such as "Q4_1" or "BF16".
        activation_bytes: of one element of the activations and norms.
        cache_bytes: of one element of the KV cache.
        head: GGUF name of the output head's type; "": as the projections.
    """

    weights: str
    activation_bytes: int
    cache_bytes: int
    head: str = ""


def weight_bytes(num_rows: int, num_columns: int, type_: str) -> int:
    """Bytes of a weight as a checkpoint stores it.

    Args:
        num_rows, num_columns: its shape.
        type_: GGUF name of its type.
    """
    if type_ in DENSE_BYTES:
        return num_rows * num_columns * DENSE_BYTES[type_]
    block_size, bytes_each = BLOCK_TYPES[type_]
    if num_columns % block_size:
        raise ValueError(f"a row has {num_columns} columns; {type_} stores whole blocks of {block_size}")
    return num_rows * (num_columns // block_size) * bytes_each
