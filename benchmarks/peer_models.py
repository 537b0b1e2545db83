"""The default model in the formats that other engines want, for compare_peers.py: made once, kept in a directory.

    hf/            dense bf16 safetensors, for transformers, and for what follows from it
    onnx-int4/     onnxruntime-genai's own int4 build of it
    q4_0.gguf      llama.cpp's own Q4_0, the format it is fastest in

The weights are the GGUF file's, dequantised; those who quantise them again compute a slightly different model.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from inferneo_core.config import ModelConfig
from inferneo_core.gguf_tokenizer import spec_from_gguf
from inferneo_core.weights import resolve
from inferneo_core.weights.dequant import dequantize
from inferneo_core.weights.gguf import read_gguf

REQUANTISE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
source, target = (path.encode() for path in sys.argv[1:])
sys.exit(llama_cpp.llama_model_quantize(source, target, ctypes.byref(params)))
"""


class PeerModels:
    """Makes what is missing in a directory.

    Args:
        directory: where the models are kept.
        python: the interpreter that has the peers; each builds its own format.
    """

    def __init__(self, directory: Path, python: str) -> None:
        source = resolve("smollm2-135m-instruct").gguf_path
        assert source is not None
        self.gguf = source
        self._directory = directory
        self._python = python

    def dense(self) -> Path:
        """A Hugging Face directory in bf16."""
        return self._made("hf", self._write_dense)

    def onnx(self) -> Path:
        """onnxruntime-genai's int4 model for the CPU."""
        return self._made("onnx-int4", self._build_onnx)

    def q4_0(self) -> Path:
        """llama.cpp's Q4_0 of the same weights."""
        return self._made("q4_0.gguf", lambda path: self._run("-c", REQUANTISE, str(self.gguf), str(path)))

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        path, unfinished = self._directory / name, self._directory / f"{name}.unfinished"
        if not path.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            make(unfinished)
            unfinished.rename(path)
        return path

    def _run(self, *args: str) -> None:
        result = subprocess.run([self._python, *args], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{args[0]} {args[1]:.40} failed: {(result.stderr or result.stdout).strip()[-400:]}")

    def _write_dense(self, path: Path) -> None:
        from safetensors.torch import save_file

        checkpoint = read_gguf(self.gguf)
        config = ModelConfig.from_gguf(checkpoint.metadata(), checkpoint.names())
        weights = {}
        for name in checkpoint.names():
            if len(checkpoint.shape(name)) == 1:
                weights[name] = checkpoint.tensor(name).bfloat16()
                continue
            segment = checkpoint.segment(name)
            dense = dequantize(segment.data, segment.quant_type) if segment.quant_type else segment.data.float()
            weights[name] = (dense if segment.row_order is None else dense[segment.row_order]).bfloat16().contiguous()
        path.mkdir(exist_ok=True)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        description = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
            "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim, "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.norm_eps, "rope_theta": config.rope.theta, "hidden_act": "silu",
            "tie_word_embeddings": config.tie_word_embeddings, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps(description, indent=1))
        spec_from_gguf(checkpoint.metadata()).backend.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')

    def _build_onnx(self, path: Path) -> None:
        builder = ("-m", "onnxruntime_genai.models.builder")
        self._run(*builder, "-i", str(self.dense()), "-o", str(path), "-p", "int4", "-e", "cpu", "-c", f"{path}.cache")
