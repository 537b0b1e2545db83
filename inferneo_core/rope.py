"""Rotary position embedding: inverse frequencies, their scalings, and the table that the kernels read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inferneo_core.config import ModelConfig, RopeConfig


def rope_table(config: ModelConfig, max_model_len: int, freq_factors: Tensor | None = None) -> Tensor:
    """Cosines and sines of every position.

    Args:
        config: the model's; its rope and head_dim are used.
        max_model_len: rows; also fixes the base of "dynamic" scaling, once, so that no cached key goes stale.
        freq_factors: [head_dim / 2] divisors of the inverse frequencies (GGUF's rope_freqs.weight), or None.
    Returns:
        [max_model_len, head_dim] fp32: the cosines of the head_dim / 2 angles, then their sines.
    Source: arXiv 2104.09864.
    """
    freqs, attention_factor = inverse_frequencies(config, max_model_len)
    if freq_factors is not None:
        freqs = freqs / freq_factors.float()
    angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * freqs  # [max_model_len, head_dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=1) * attention_factor


def inverse_frequencies(config: ModelConfig, max_model_len: int) -> tuple[Tensor, float]:
    """[head_dim / 2] fp32 inverse frequencies, and the factor on cosines and sines (1 but for "yarn")."""
    rope, dim = config.rope, config.head_dim
    if rope.kind == "dynamic":
        return _base_frequencies(_dynamic_theta(rope, dim, max_model_len, config.max_position_embeddings), dim), 1.0
    freqs = _base_frequencies(rope.theta, dim)
    if rope.kind == "linear":
        return freqs / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(freqs, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(freqs, rope, dim), _yarn_attention_factor(rope)
    return freqs, 1.0


def _base_frequencies(theta: float, dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _dynamic_theta(rope: RopeConfig, dim: int, max_model_len: int, trained_len: int) -> float:
    """NTK-aware base for max_model_len, fixed at load; within the trained length the base is unchanged."""
    stretch = rope.factor * max(max_model_len, trained_len) / trained_len - (rope.factor - 1.0)
    return float(rope.theta * stretch ** (dim / (dim - 2)))


def _llama3(freqs: Tensor, rope: RopeConfig) -> Tensor:
    """Long wavelengths are stretched by factor, short ones kept, the band between blended. Source: Llama 3.1."""
    turns = rope.original_max_position_embeddings * freqs / (2.0 * math.pi)  # rotations over the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1.0 - keep) * freqs / rope.factor + keep * freqs


def _yarn(freqs: Tensor, rope: RopeConfig, dim: int) -> Tensor:
    """Dimensions that turn often are kept, those that turn seldom interpolated. Source: YaRN, arXiv 2309.00071."""

    def dim_of(rotations: float) -> float:
        return (
            dim
            * math.log(rope.original_max_position_embeddings / (rotations * 2.0 * math.pi))
            / (2.0 * math.log(rope.theta))
        )

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, dim - 1.0)
    width = high - low if high != low else 0.001  # a ramp of no width would divide by zero
    interpolate = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return freqs / rope.factor * interpolate + freqs * (1.0 - interpolate)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
