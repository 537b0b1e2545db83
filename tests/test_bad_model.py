"""Engines and models that cannot be: arguments, configs and checkpoints, each refused by a typed error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from inferneo_core import (
    BackendUnavailable,
    CacheTooSmall,
    ConfigError,
    CorruptWeights,
    Engine,
    ModelConfig,
    ModelNotFound,
    SamplingParams,
    UnsupportedModel,
)
from inferneo_core.errors import shown
from inferneo_core.rope import inverse_frequencies

HUGE = 10**5000
NAN, INF = float("nan"), float("inf")
HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
GGUF = {
    "general.architecture": "llama",
    "llama.vocab_size": 263,
    "llama.embedding_length": 48,
    "llama.feed_forward_length": 80,
    "llama.block_count": 3,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 512,
    "llama.rope.freq_base": 10000.0,
}
JUNK: list[Any] = [0, -1, 1, 3, 2**31, 2**63, HUGE, 0.0, -1.5, 1e308, NAN, INF, True, False]
JUNK += ["", "6", "llama", [], [6], {}, {"factor": 2.0}]

ROPE_FIELDS = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast")
ROPE_FIELDS += ("beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")


def case_id(value: object) -> str:
    return shown(value).encode("ascii", "replace").decode()[:40]


def refused(error: type[Exception], call: Callable[..., Any], *args: Any, words: str = "", **kwargs: Any) -> None:
    """The call raises exactly that type, and its message holds each of the words."""
    with pytest.raises(error) as raised:
        call(*args, **kwargs)
    message = str(raised.value)
    assert type(raised.value) is error
    assert all(word in message for word in words.split()), message
    assert len(message) < 500


# Engine arguments


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("device", ["", "gpu", "cuda:x", "cuda:-1", "cuda:", "cpu:1", "auto:0", None, 0, b"cpu", ["cpu"]], "cpu, cuda"),
        ("ops", ["", "cuda", None, 1, ["cpu"]], "auto, torch, cpu, triton"),
        ("dtype", ["int8", "fp32", "", None, torch.float32], "auto, float32, bfloat16, float16"),
        ("kv_cache_dtype", ["int4", "fp8", None, 1], "auto, float32, bfloat16, float16, int8"),
        ("kv_cache_memory", [0, -1, 2**63, HUGE, 1.5, "1GB", True], "integer [1,"),
        ("block_size", [0, -16, 1025, 2**40, HUGE, 16.0, "16", None, True], "integer [1, 1024]"),
        ("max_model_len", [0, 1, -1, 2**31, HUGE, 64.0, "64", True], "integer [2,"),
        ("max_num_seqs", [0, -1, 4097, 10**9, 2**63, HUGE, 1.0, "1", None, True], "integer [1, 4096]"),
        ("max_num_batched_tokens", [0, -1, 2**31, HUGE, 1.0, "1", None, True], "integer [1,"),
        ("enable_prefix_caching", [0, 1, "no", None], "True or False"),
        ("batch_invariant", [0, 1, "no", np.array([1, 2])], "True, False or None"),
        ("num_threads", [0, -1, 2**31, HUGE, 1.0, "1", True], "integer [1,"),
    ],
)
def test_engine_argument_is_refused(name: str, values: list[Any], words: str, tiny_model: Any) -> None:
    for value in values:
        refused(ConfigError, Engine, tiny_model(), **{name: value}, words=f"{name} is {words}")


@pytest.mark.parametrize("model", [None, 5, b"model", ["model"], {}], ids=repr)
def test_model_that_is_no_name_is_refused(model: Any) -> None:
    refused(ConfigError, Engine, model, words="model is path name")


@pytest.mark.parametrize("model", ["", "no/such/place", "/no/such/place", "a\0b", "x" * 10_000, Path("nowhere")])
def test_model_that_is_nowhere_is_refused(model: Any) -> None:
    refused(ModelNotFound, Engine, model, words="check the path")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:999"])
def test_missing_gpu_is_named(device: str, tiny_model: Any) -> None:
    refused(BackendUnavailable, Engine, tiny_model(), device=device, words=f"{device} no CUDA device='cpu'")


def test_context_beyond_the_model_is_refused(tiny_model: Any) -> None:
    refused(ConfigError, Engine, tiny_model(), max_model_len=513, words="513; 512 lower max_model_len")


def test_cache_too_small_for_one_sequence_says_what_to_change(tiny_model: Any) -> None:
    block = 2 * 3 * 2 * 8 * 16 * 4  # keys and values of 3 layers, 2 heads, 8 dimensions, 16 tokens, 4 bytes
    too_small = {"kv_cache_memory": 32 * block - 1, "num_threads": 1}
    words = f"{32 * block - 1:,} 31 blocks 512 32 {32 * block:,} kv_cache_memory max_model_len 496"
    refused(CacheTooSmall, Engine, tiny_model(), **too_small, words=words)
    with Engine(tiny_model(), max_model_len=496, **too_small) as engine:
        assert engine.stats().total_blocks == 31
    with Engine(tiny_model(), kv_cache_memory=32 * block, num_threads=1) as engine:
        (completion,) = engine.generate([[1] * 500], SamplingParams(ignore_eos=True))
        assert len(completion.token_ids) == 12


def test_cache_beyond_the_memory_is_refused_before_the_load(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferneo_core.memory.available_memory", lambda: 2**20)
    monkeypatch.setattr("inferneo_core.assembly.load_llama", lambda *_: pytest.fail("loaded before the check"))
    refused(
        ConfigError, Engine, tiny_model(), kv_cache_memory=2**30, words="12,582,912 1,048,576 free lower max_num_seqs"
    )
    refused(CacheTooSmall, Engine, tiny_model(), max_model_len=512, block_size=1024, words="262,144 kv_cache_memory")


def test_context_of_a_giant_config_is_refused_by_its_cache(tiny_model: Any) -> None:
    giant = tiny_model(max_position_embeddings=2**31 - 1)
    refused(CacheTooSmall, Engine, giant, kv_cache_memory=2**24, words="2147483647 max_model_len")
    refused(ConfigError, Engine, giant, kv_cache_memory=2**62, words="free lower max_model_len")
    with Engine(giant, max_model_len=64, kv_cache_memory=2**24, num_threads=1) as engine:
        assert engine.max_model_len == 64


# Configs


both_formats = pytest.mark.parametrize(
    ("base", "read"), [(HF, ModelConfig.from_hf), (GGUF, ModelConfig.from_gguf)], ids=["hf", "gguf"]
)


@both_formats
def test_valid_config_is_read(base: dict[str, Any], read: Any) -> None:
    config = read(base)
    sizes = (config.vocab_size, config.hidden_size, config.num_layers, config.num_kv_heads, config.head_dim)
    assert sizes == (263, 48, 3, 2, 8)


@both_formats
def test_missing_key_is_refused(base: dict[str, Any], read: Any) -> None:
    optional = ("architectures", "hidden_act", "num_key_value", "max_position", "rms_norm_eps", "rope", "head_count_kv")
    needed = [key for key in base if not any(part in key for part in optional)]
    assert len(needed) >= 6
    for key in needed:
        refused(UnsupportedModel, read, {name: value for name, value in base.items() if name != key})


@both_formats
def test_junk_for_any_value_is_refused_or_runs(base: dict[str, Any], read: Any) -> None:
    answers = [reads(read, {**base, key: junk}) for key in base for junk in JUNK]
    assert answers.count(False) > 0.7 * len(answers)


def reads(read: Callable[[dict[str, Any]], ModelConfig], source: dict[str, Any]) -> bool:
    """Whether a config is read; then its RoPE can be computed. All else is UnsupportedModel."""
    try:
        config = read(source)
    except UnsupportedModel:
        return False
    freqs, factor = inverse_frequencies(config, min(config.max_context_len, 4096))
    assert torch.isfinite(freqs).all() and np.isfinite(factor)
    return True


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "Mistral LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "LlamaForCausalLM"),
        ({"architectures": 5}, "5"),
        ({"model_type": "qwen3"}, "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu silu"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq GGUF"),
        ({"quantization_config": "awq"}, "awq GGUF"),
        ({"num_attention_heads": 0}, "num_attention_heads 0; [1,"),
        ({"num_attention_heads": "6"}, "num_attention_heads '6'"),
        ({"num_key_value_heads": 0}, "num_kv_heads 0;"),
        ({"num_key_value_heads": 4}, "6 multiple 4"),
        ({"num_key_value_heads": 7}, "multiple 7"),
        ({"head_dim": 7}, "head_dim 7; even"),
        ({"hidden_size": 54}, "head_dim 9; even"),
        ({"hidden_size": 3}, "head_dim 0;"),
        ({"rms_norm_eps": NAN}, "norm_eps nan"),
        ({"rms_norm_eps": "1e-5"}, "norm_eps '1e-5' number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false' true or false"),
        ({"attention_bias": 1}, "attention_bias 1;"),
        ({"rope_theta": 0}, "theta 0; (1,"),
        ({"rope_theta": "10000"}, "theta '10000'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear' object"),
        ({"rope_scaling": ["linear", 2.0]}, "rope_scaling object"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope linear, dynamic, llama3, yarn"),
        ({"rope_scaling": {"rope_type": 5}}, "5;"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "linear"),
    ],
    ids=case_id,
)
def test_hf_config_is_refused(overrides: dict[str, Any], words: str) -> None:
    refused(UnsupportedModel, ModelConfig.from_hf, {**HF, **overrides}, words=words)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
@pytest.mark.parametrize("field", ROPE_FIELDS)
def test_junk_in_rope_scaling_is_refused_or_runs(kind: str, field: str) -> None:
    good = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 64}
    assert reads(ModelConfig.from_hf, {**HF, "rope_scaling": good})
    for junk in JUNK:
        reads(ModelConfig.from_hf, {**HF, "rope_scaling": {**good, field: junk}})
        reads(ModelConfig.from_hf, {**HF, "head_dim": 2, "rope_parameters": {**good, field: junk}})


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "linear", "factor": 0}, "factor 0; [1,"),
        ({"rope_type": "linear", "factor": -2.0}, "factor -2.0"),
        ({"rope_type": "linear", "factor": "4"}, "factor '4'"),
        ({"rope_type": "linear", "factor": 1e9}, "max_position_embeddings"),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
            "original_max_position_embeddings 0",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 0}, "beta_slow 0"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 40}, "beta_fast 32"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}, "high_freq_factor 4.0"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 0}, "low_freq_factor 0"),
    ],
    ids=case_id,
)
def test_rope_scaling_that_means_nothing_is_refused(scaling: dict[str, Any], words: str) -> None:
    refused(UnsupportedModel, ModelConfig.from_hf, {**HF, "rope_scaling": scaling}, words=words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"general.architecture": "qwen3"}, "qwen3 llama"),
        ({"general.architecture": ["llama"]}, "llama"),
        ({"llama.expert_count": 8}, "8 experts"),
        ({"llama.attention.head_count": [6, 6, 6]}, "head_count [6, 6, 6]; integer"),
        ({"llama.attention.head_count_kv": 0}, "num_kv_heads 0;"),
        ({"llama.feed_forward_length": [80, 80, 80]}, "feed_forward_length [80, 80, 80]"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count 4; (8)"),
        ({"llama.attention.key_length": 7, "llama.rope.dimension_count": 7}, "head_dim 7; even"),
        ({"llama.vocab_size": None}, "vocab_size None"),
        ({"llama.vocab_size": None, "tokenizer.ggml.tokens": 5}, "vocab_size None"),
        ({"llama.vocab_size": None, "tokenizer.ggml.tokens": []}, "vocab_size 0"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope none, linear, yarn"),
        ({"llama.rope.scaling.type": ["yarn"]}, "yarn"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, "factor 0.0"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": "2"}, "factor '2'"),
    ],
    ids=case_id,
)
def test_gguf_metadata_is_refused(overrides: dict[str, Any], words: str) -> None:
    refused(UnsupportedModel, ModelConfig.from_gguf, {**GGUF, **overrides}, words=words)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*HF, "head_dim", "rope_scaling", "quantization_config"]), json_values))
def test_any_json_for_any_value_is_refused_or_runs(changes: dict[str, Any]) -> None:
    reads(ModelConfig.from_hf, {**HF, **changes})


# Checkpoints


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"layers.1.mlp.up_proj.weight": None}, CorruptWeights, "no tensor layers.1.mlp.up_proj.weight"),
        ({"norm.weight": None}, CorruptWeights, "no tensor model.norm.weight"),
        ({"norm.weight": (47,)}, CorruptWeights, "model.norm.weight [47]; [48]"),
        ({"norm.weight": (48, 1)}, CorruptWeights, "model.norm.weight [48, 1]; [48]"),
        ({"norm.weight": ()}, CorruptWeights, "model.norm.weight []; [48]"),
        ({"embed_tokens.weight": (48, 263)}, CorruptWeights, "[48, 263]; [263, 48]"),
        ({"layers.3.mlp.up_proj.weight": (80, 48)}, UnsupportedModel, "1 layers.3.mlp.up_proj.weight"),
        ({"layers.0.self_attn.q_proj.bias": (48,)}, UnsupportedModel, "q_proj.bias"),
        ({"layers.0.self_attn.q_norm.weight": (8,)}, UnsupportedModel, "q_norm"),
    ],
    ids=case_id,
)
def test_checkpoint_that_does_not_fit_its_config_is_refused(
    changes: dict[str, Any], error: type[Exception], words: str, tiny_model: Any, tmp_path: Path
) -> None:
    weights = load_file(tiny_model() / "model.safetensors")
    for name, shape in changes.items():
        if shape is None:
            del weights[f"model.{name}"]
        else:
            weights[f"model.{name}"] = torch.ones(shape)
    save_file(weights, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_model() / name).read_bytes())
    refused(error, Engine, tmp_path, kv_cache_memory=2**23, words=words)


@pytest.mark.parametrize("size", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_config_larger_than_its_checkpoint_is_refused_before_anything_is_allocated(
    size: str, tiny_model: Any, tmp_path: Path
) -> None:
    config = json.loads((tiny_model() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, size: 6 * 2**20, "head_dim": 8}))
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_model() / name).read_bytes())
    with pytest.raises((CorruptWeights, CacheTooSmall)):
        Engine(tmp_path, kv_cache_memory=2**23)
