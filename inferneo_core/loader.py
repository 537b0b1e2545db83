"""From a checkpoint to a Llama whose weights a backend has prepared: every tensor read once, checked, released."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from inferneo_core.config import ModelConfig
from inferneo_core.errors import CorruptWeights, UnsupportedModel
from inferneo_core.model import DecoderLayer, Llama
from inferneo_core.ops.base import Linear, Norm, Ops
from inferneo_core.rope import rope_table
from inferneo_core.weights.checkpoint import Checkpoint

ROPE_FREQS = "rope_freqs.weight"  # GGUF's divisors of the inverse frequencies (Llama 3.1 and later)


def load_llama(checkpoint: Checkpoint, config: ModelConfig, ops: Ops, max_model_len: int) -> Llama:
    """Build the network from a checkpoint, with a progress bar where stderr is a terminal.

    Weights are prepared one at a time and the file's pages released behind them, so the peak stays near the final size.

    Raises:
        CorruptWeights: a tensor is missing or of the wrong shape.
        UnsupportedModel: a tensor that a Llama of this config does not have.
    """
    _check_tensors(checkpoint, config)
    load = _Loader(checkpoint, config, ops)
    embed = load.linear("model.embed_tokens", bias=False, keeps_rows=True)
    layers = range(config.num_layers)
    bar = tqdm(layers, desc="Loading", unit="layer", leave=False, disable=not sys.stderr.isatty())
    return Llama(
        embed=embed,
        layers=tuple(load.layer(f"model.layers.{index}") for index in bar),
        norm=load.norm("model.norm"),
        head=embed if config.tie_word_embeddings else load.linear("lm_head", bias=False),
        rope=load.rope(max_model_len),
    )


class _Loader:
    """What the parts of one load share."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, ops: Ops) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.ops = ops

    def layer(self, prefix: str) -> DecoderLayer:
        attention, mlp = self.config.attention_bias, self.config.mlp_bias
        qkv = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
        gate_up = [f"{prefix}.mlp.{name}_proj" for name in ("gate", "up")]
        return DecoderLayer(
            input_norm=self.norm(f"{prefix}.input_layernorm"),
            qkv=self.linear(*qkv, bias=attention),
            out=self.linear(f"{prefix}.self_attn.o_proj", bias=attention),
            post_norm=self.norm(f"{prefix}.post_attention_layernorm"),
            gate_up=self.linear(*gate_up, bias=mlp),
            down=self.linear(f"{prefix}.mlp.down_proj", bias=mlp),
        )

    def linear(self, *names: str, bias: bool, keeps_rows: bool = False) -> Linear:
        """The product of the named weights stacked, prepared."""
        parts = [self._part(name, bias) for name in names]
        linear = self.ops.prepare(Linear.stack(parts), keeps_rows=keeps_rows)
        for name in names:
            self.checkpoint.release(f"{name}.weight")
        return linear

    def _part(self, name: str, bias: bool) -> Linear:
        weight = f"{name}.weight"
        return Linear(
            segments=(self.checkpoint.segment(weight),),
            in_features=self.checkpoint.shape(weight)[1],
            bias=self.checkpoint.tensor(f"{name}.bias") if bias else None,
        )

    def norm(self, name: str) -> Norm:
        weight = self.checkpoint.tensor(f"{name}.weight")
        return Norm(weight.to(self.ops.device, self.ops.dtype, copy=True), self.config.norm_eps)

    def rope(self, max_model_len: int) -> Tensor:
        factors: Tensor | None = None
        if ROPE_FREQS in self.checkpoint.names():
            factors = self.checkpoint.tensor(ROPE_FREQS).to(torch.float32)
        return rope_table(self.config, max_model_len, factors).to(self.ops.device)


def _check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Every tensor that the config calls for is there with its shape, and no other."""
    names = checkpoint.names()
    known = set()
    for name, shape, required in _expected(config):
        known.add(name)
        if name not in names:
            if required:
                raise CorruptWeights(f"the checkpoint has no tensor {name}; a Llama of this config needs it")
        elif checkpoint.shape(name) != shape:
            raise CorruptWeights(
                f"tensor {name} has shape {list(checkpoint.shape(name))}; the config makes it {list(shape)}"
            )
    unknown = sorted(name for name in names - known if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise UnsupportedModel(
            f"the checkpoint has {len(unknown)} tensors that a Llama of this config has not, such as {unknown[0]}"
        )


def _expected(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, shape, whether it must be there) of every tensor."""
    vocab, hidden, intermediate = config.vocab_size, config.hidden_size, config.intermediate_size
    yield "model.embed_tokens.weight", (vocab, hidden), True
    yield "lm_head.weight", (vocab, hidden), not config.tie_word_embeddings
    yield "model.norm.weight", (hidden,), True
    yield ROPE_FREQS, (config.head_dim // 2,), False
    projections = (
        ("self_attn.q_proj", config.q_size, hidden, config.attention_bias),
        ("self_attn.k_proj", config.kv_size, hidden, config.attention_bias),
        ("self_attn.v_proj", config.kv_size, hidden, config.attention_bias),
        ("self_attn.o_proj", hidden, config.q_size, config.attention_bias),
        ("mlp.gate_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.up_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, intermediate, config.mlp_bias),
    )
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        yield f"{prefix}.input_layernorm.weight", (hidden,), True
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,), True
        for name, rows, columns, bias in projections:
            yield f"{prefix}.{name}.weight", (rows, columns), True
            if bias:
                yield f"{prefix}.{name}.bias", (rows,), True
