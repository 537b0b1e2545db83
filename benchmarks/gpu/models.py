"""Engines without files: the shapes of known Llamas with random weights, made on the GPU in seconds."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from inferneo_benchmarks.quant_blocks import random_blocks
from tokenizers import AddedToken, Tokenizer as HubTokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from inferneo_core import Engine, Tokenizer, assembly
from inferneo_core.config import ModelConfig
from inferneo_core.ops.base import Segment

SCALES = {"Q4_K": 2e-4, "Q6_K": 1e-4}  # so small that random codes make an activation of usual size


class RandomCheckpoint:
    """What the loader asks of a Checkpoint, answered with seeded random tensors on a device.

    Args:
        config: the model's.
        quant_type: of the projections and the embedding, and Q6_K of a separate head; "" makes all of them bf16.
        device: where they are made.
    """

    def __init__(self, config: ModelConfig, quant_type: str, device: str = "cuda") -> None:
        self._shapes = dict(_shapes(config))
        self._quant_type = quant_type
        self._generator = torch.Generator(device).manual_seed(0)
        self._device = device
        self.dtype = None if quant_type else torch.bfloat16
        self.num_bytes = sum(2 * rows * columns for rows, columns in self._shapes.values())

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        rows, columns = self._shapes[name]
        return (rows,) if columns == 1 else (rows, columns)

    def tensor(self, name: str) -> Tensor:
        return 1 + 0.1 * torch.randn(self.shape(name), generator=self._generator, device=self._device)

    def segment(self, name: str) -> Segment:
        rows, columns = self._shapes[name]
        if not self._quant_type:
            dense = torch.randn(rows, columns, generator=self._generator, device=self._device, dtype=torch.bfloat16)
            return Segment(dense.mul_(columns**-0.5))
        quant_type = "Q6_K" if name.startswith("lm_head") else self._quant_type
        data = random_blocks(rows, columns, quant_type, self._generator, SCALES[quant_type])
        return Segment(data, quant_type)

    def release(self, name: str) -> None: ...

    def close(self) -> None: ...


def _shapes(config: ModelConfig) -> list[tuple[str, tuple[int, int]]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    layer = {
        "input_layernorm": (hidden, 1),
        "post_attention_layernorm": (hidden, 1),
        "self_attn.q_proj": (config.q_size, hidden),
        "self_attn.k_proj": (config.kv_size, hidden),
        "self_attn.v_proj": (config.kv_size, hidden),
        "self_attn.o_proj": (hidden, config.q_size),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    names = [("model.embed_tokens.weight", (config.vocab_size, hidden)), ("model.norm.weight", (hidden, 1))]
    if not config.tie_word_embeddings:
        names.append(("lm_head.weight", (config.vocab_size, hidden)))
    for index in range(config.num_layers):
        names += [(f"model.layers.{index}.{name}.weight", shape) for name, shape in layer.items()]
    return names


def wide_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with as many ids as a model: 0 to 255 are bytes, the rest their own number in brackets."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"[{index}]" for index in range(len(words), vocab_size - 2)]
    hub = HubTokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    hub.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hub.decoder = decoders.ByteLevel()
    hub.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    with tempfile.TemporaryDirectory() as directory:
        hub.save(str(Path(directory) / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>"}
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer.from_directory(directory)


def random_engine(config: ModelConfig, quant_type: str = "", *, weights_on: str = "cuda", **arguments: Any) -> Engine:
    """An Engine of a model's shape with seeded random weights; prompts are token ids."""
    patches: dict[str, Any] = {
        "resolve": lambda model: None,
        "open_checkpoint": lambda files: RandomCheckpoint(config, quant_type, weights_on),
        "read_config": lambda files, checkpoint: config,
        "_read_tokenizer": lambda files, checkpoint: wide_tokenizer(config.vocab_size),
    }
    with mock.patch.multiple(assembly, **patches):
        return Engine("random weights", **arguments)
