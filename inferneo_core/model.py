"""The whole network. It calls only the verbs of `ops/base.py` and views; what a verb does, a backend decides."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inferneo_core.batch import ModelInput
from inferneo_core.kv_cache import KVCache
from inferneo_core.ops.base import CacheLayer, ForwardOps, Linear, Norm


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One pre-norm transformer block: attention, then a gated MLP, each added to the residual stream."""

    input_norm: Norm
    qkv: Linear  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]
    out: Linear  # [hidden_size, num_heads * head_dim]
    post_norm: Norm
    gate_up: Linear  # [2 * intermediate_size, hidden_size]
    down: Linear  # [hidden_size, intermediate_size]

    def forward(self, x: Tensor, ops: ForwardOps, inputs: ModelInput, rope: Tensor, cache: CacheLayer) -> Tensor:
        """Args: x: [num_tokens, hidden_size]. Returns: the same shape."""
        q = ops.qkv_rope_store(x, self.input_norm, self.qkv, inputs.positions, rope, cache, inputs.slot_mapping)
        attended = ops.attention(q, cache, inputs.attention)  # [num_tokens, num_heads * head_dim]
        x = ops.linear_add(attended, self.out, x)
        hidden = ops.gate_up_silu(x, self.post_norm, self.gate_up)  # [num_tokens, intermediate_size]
        return ops.linear_add(hidden, self.down, x)


@dataclass(frozen=True, slots=True)
class Llama:
    """A decoder-only Llama whose weights a backend has prepared.

    Source: LLaMA, arXiv 2302.13971; GQA, arXiv 2305.13245.
    """

    embed: Linear  # [vocab_size, hidden_size]
    layers: tuple[DecoderLayer, ...]
    norm: Norm
    head: Linear  # [vocab_size, hidden_size]; the embedding itself where the two are tied
    rope: Tensor  # [max_model_len, head_dim] fp32

    def forward(self, ops: ForwardOps, inputs: ModelInput, cache: KVCache) -> Tensor:
        """Run the step's tokens through every layer, storing their keys and values.

        Returns:
            [num_tokens, hidden_size], before the final norm; `next_tokens` and `lm_head` apply it where it is needed.
        """
        x = ops.embed(inputs.token_ids, self.embed)
        for layer, cache_layer in zip(self.layers, cache.layers, strict=True):
            x = layer.forward(x, ops, inputs, self.rope, cache_layer)
        return x
