"""ModelConfig: what a checkpoint is. EngineConfig: how it is run. Both frozen, both checked once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from inferneo_core.errors import ConfigError, UnsupportedModel, shown

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
OPS_NAMES = ("auto", "torch", "cpu", "triton")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = (*DTYPES, "int8")
MAX_BLOCK_SIZE = 1024
MAX_NUM_SEQS = 4096  # each has a row of parameters, and of penalty counts as wide as the vocabulary
MAX_INT = 2**31 - 1
MAX_THREADS = 256
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding and its scaling; fields that the kind does not use keep their defaults.

    Attributes:
        kind: "default", "linear", "dynamic", "llama3" or "yarn".
        theta: base of the geometric series of wavelengths.
        factor: how many times longer the context is made.
        original_max_position_embeddings: context length before scaling ("llama3", "yarn").
        low_freq_factor, high_freq_factor: the band that "llama3" blends.
        beta_fast, beta_slow: rotations that bound the ramp of "yarn".
        attention_factor: "yarn" multiplies cosines and sines by it; None derives it from
            factor, mscale and mscale_all_dim.
        truncate: "yarn" rounds the ramp's bounds outwards.

    Raises:
        UnsupportedModel: a value is of the wrong type, or the kind has no meaning with it.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_number("RoPE theta", self.theta, 1.0, 1e12, open_below=True)
        _check_number("RoPE factor", self.factor, 1.0, MAX_INT)
        _check_number("RoPE mscale", self.mscale, 0.0, 1e3)
        _check_number("RoPE mscale_all_dim", self.mscale_all_dim, 0.0, 1e3)
        if self.attention_factor is not None:
            _check_number("RoPE attention_factor", self.attention_factor, 0.0, 1e3, open_below=True)
        _check_flag("RoPE truncate", self.truncate)
        if self.kind in ("llama3", "yarn"):
            _check_int("RoPE original_max_position_embeddings", self.original_max_position_embeddings)
        if self.kind == "llama3":
            _check_number("RoPE low_freq_factor", self.low_freq_factor, 0.0, 1e6, open_below=True)
            _check_number("RoPE high_freq_factor", self.high_freq_factor, self.low_freq_factor, 1e6, open_below=True)
        if self.kind == "yarn":
            _check_number("RoPE beta_slow", self.beta_slow, 0.0, 1e6, open_below=True)
            _check_number("RoPE beta_fast", self.beta_fast, self.beta_slow, 1e6)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Llama.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: its sizes.
        norm_eps: epsilon of every RMSNorm.
        max_position_embeddings: the context length it was made for, in tokens.
        rope: RopeConfig.
        tie_word_embeddings: the output head is the embedding table.
        attention_bias, mlp_bias: whether those projections have biases.

    Raises:
        UnsupportedModel: a value is of the wrong type or out of its range.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":
                _check_int(field.name, getattr(self, field.name))
            elif field.type == "bool":
                _check_flag(field.name, getattr(self, field.name))
        _check_number("norm_eps", self.norm_eps, 0.0, 1.0, open_below=True)
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim is {self.head_dim}; RoPE needs an even one")
        if self.head_dim < 4 and self.rope.kind == "dynamic":  # its exponent is head_dim / (head_dim - 2)
            raise UnsupportedModel(f"head_dim is {self.head_dim}; dynamic RoPE needs at least 4")
        _check_int("max_position_embeddings times the RoPE factor", self.max_context_len)

    @property
    def q_size(self) -> int:
        """num_heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim

    @property
    def max_context_len(self) -> int:
        """Tokens that the model can attend to, its RoPE scaling included."""
        if self.rope.kind in ("linear", "dynamic"):  # their configs state the length before scaling
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.kind == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_max_position_embeddings * self.rope.factor))
        return self.max_position_embeddings

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> ModelConfig:
        """Read a parsed config.json.

        Raises:
            UnsupportedModel: not a Llama, an activation or RoPE kind that Llama does not use, or a size is absent or
                impossible.
        """
        architectures = _or(config.get("architectures"), [])
        if config.get("model_type") != "llama" or architectures not in ([], ["LlamaForCausalLM"]):
            found = architectures or config.get("model_type")
            raise UnsupportedModel(f"architecture is {shown(found)}; Inferneo runs LlamaForCausalLM")
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"hidden_act is {shown(config['hidden_act'])}; Inferneo runs silu")
        quantization = config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
            raise UnsupportedModel(f"weights are quantised by {shown(method)}; use a dense checkpoint or a GGUF file")
        num_heads = _size(config, "num_attention_heads", "config.json")
        hidden_size = _size(config, "hidden_size", "config.json")
        return ModelConfig(
            vocab_size=_size(config, "vocab_size", "config.json"),
            hidden_size=hidden_size,
            intermediate_size=_size(config, "intermediate_size", "config.json"),
            num_layers=_size(config, "num_hidden_layers", "config.json"),
            num_heads=num_heads,
            num_kv_heads=_or(config.get("num_key_value_heads"), num_heads),
            head_dim=_or(config.get("head_dim"), hidden_size // num_heads),
            norm_eps=_or(config.get("rms_norm_eps"), 1e-6),
            max_position_embeddings=_hf_context_length(config),
            rope=_rope_from_hf(config),
            tie_word_embeddings=_or(config.get("tie_word_embeddings"), False),
            attention_bias=_or(config.get("attention_bias"), False),
            mlp_bias=_or(config.get("mlp_bias"), False),
        )

    @staticmethod
    def from_gguf(metadata: Mapping[str, Any], tensor_names: frozenset[str] = frozenset()) -> ModelConfig:
        """Read a GGUF file's metadata; `tensor_names` (canonical) tell whether the head and biases exist.

        Raises:
            UnsupportedModel: not the llama architecture, an unknown RoPE scaling, or a size is absent or impossible.
        """
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise UnsupportedModel(f"architecture is {shown(architecture)}; Inferneo runs llama")
        experts = metadata.get("llama.expert_count")
        if experts:
            raise UnsupportedModel(f"the model has {shown(experts)} experts; Inferneo runs dense Llamas")

        def size(key: str) -> int:
            return _size(metadata, f"llama.{key}", "the GGUF metadata")

        num_heads, hidden_size = size("attention.head_count"), size("embedding_length")
        head_dim = _or(metadata.get("llama.attention.key_length"), hidden_size // num_heads)
        rotated = _or(metadata.get("llama.rope.dimension_count"), head_dim)
        if rotated != head_dim:
            raise UnsupportedModel(f"rope.dimension_count is {shown(rotated)}; it must be head_dim ({shown(head_dim)})")
        tokens = metadata.get("tokenizer.ggml.tokens")
        return ModelConfig(
            vocab_size=_or(metadata.get("llama.vocab_size"), len(tokens) if isinstance(tokens, list) else None),
            hidden_size=hidden_size,
            intermediate_size=size("feed_forward_length"),
            num_layers=size("block_count"),
            num_heads=num_heads,
            num_kv_heads=_or(metadata.get("llama.attention.head_count_kv"), num_heads),
            head_dim=head_dim,
            norm_eps=_require(metadata, "llama.attention.layer_norm_rms_epsilon", "the GGUF metadata"),
            max_position_embeddings=size("context_length"),
            rope=_rope_from_gguf(metadata),
            tie_word_embeddings="lm_head.weight" not in tensor_names,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in tensor_names,
            mlp_bias="model.layers.0.mlp.gate_proj.bias" in tensor_names,
        )


def _require(source: Mapping[str, Any], key: str, where: str) -> Any:
    if source.get(key) is None:
        raise UnsupportedModel(f"{where} has no {key}; a Llama needs it")
    return source[key]


def _size(source: Mapping[str, Any], key: str, where: str) -> int:
    size = _require(source, key, where)
    _check_int(key, size)
    return int(size)


def _or(value: Any, default: Any) -> Any:
    """The default for what is absent or null; a zero is a value, and refused later."""
    return default if value is None else value


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_INT:
        raise UnsupportedModel(f"the model's {name} is {shown(value)}; it is an integer in [1, {MAX_INT}]")


def _check_number(name: str, value: object, low: float, high: float, *, open_below: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and low <= value <= high) or (open_below and value == low):  # type: ignore[operator]
        bracket = "(" if open_below else "["
        raise UnsupportedModel(f"the model's {name} is {shown(value)}; it is a number in {bracket}{low:g}, {high:g}]")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UnsupportedModel(f"the model's {name} is {shown(value)}; it is true or false")


def _hf_context_length(config: Mapping[str, Any]) -> int:
    length = _or(config.get("max_position_embeddings"), 2048)
    _check_int("max_position_embeddings", length)
    return int(length)


def _rope_from_hf(config: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 writes rope_parameters; before it, rope_theta beside an optional rope_scaling.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise UnsupportedModel(f"rope_scaling is {shown(scaling)}; it is an object")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(f"RoPE kind is {shown(kind)}; Inferneo runs {', '.join(ROPE_KINDS)}")
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel("partial_rotary_factor is not 1; a Llama rotates whole heads")
    context_length = _hf_context_length(config)
    original = _or(scaling.get("original_max_position_embeddings"), context_length)
    _check_int("RoPE original_max_position_embeddings", original)
    factor = scaling.get("factor")
    if factor is None:  # yarn checkpoints may leave it to the ratio of the context lengths
        factor = context_length / original if kind == "yarn" else 1.0
    names = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale")
    given = {name: scaling[name] for name in (*names, "mscale_all_dim", "truncate") if scaling.get(name) is not None}
    theta = _or(scaling.get("rope_theta"), _or(config.get("rope_theta"), 10000.0))
    return RopeConfig(kind, theta, factor, original, **given)


def _rope_from_gguf(metadata: Mapping[str, Any]) -> RopeConfig:
    name = metadata.get("llama.rope.scaling.type", "none")
    kinds: dict[object, RopeKind] = {"none": "default", "linear": "linear", "yarn": "yarn"}
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UnsupportedModel(f"RoPE scaling is {shown(name)}; Inferneo runs {', '.join(map(str, kinds))} from GGUF")
    return RopeConfig(
        kind=kind,
        theta=metadata.get("llama.rope.freq_base", 10000.0),
        factor=metadata.get("llama.rope.scaling.factor", 1.0),
        original_max_position_embeddings=metadata.get(
            "llama.rope.scaling.original_context_length", metadata.get("llama.context_length", 2048)
        ),
        attention_factor=metadata.get("llama.rope.scaling.attn_factor"),
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an Engine runs its model; the arguments of `Engine`, checked.

    Args:
        device: "auto" takes the GPU where there is one; "cpu", "cuda" or "cuda:N" by hand.
        ops: "auto" takes the device's own kernels; "torch", "cpu" or "triton" by hand.
        dtype: of activations; "auto" keeps a dense checkpoint's own, and takes float32 for quantised ones on the CPU.
            The CPU backend computes in float32 whatever it is.
        kv_cache_dtype: "auto" is dtype; on the CPU backend the dense checkpoint's own, and bfloat16 for quantised ones.
            "int8", not with ops="triton", takes head_dim + 4 bytes a token and KV head for keys and as many for values,
            some half of bfloat16; each number lies at most 1/254 of its row's largest from what it was. On the default
            model the mean KL divergence from the fp32 reference is then 0.0056 nats a token, with bfloat16 0.0045.
        kv_cache_memory: bytes for keys and values; None is a share of the free memory.
        block_size: tokens a cache block.
        max_model_len: tokens of prompt and output a sequence; None is the model's own limit.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens a step.
        enable_prefix_caching: reuse cached blocks of equal prefixes.
        batch_invariant: CUDA only: the same bits whatever the batch; None is the backend's default.
        num_threads: CPU threads; None takes the cores this process may use.

    Raises:
        ConfigError: a value is of the wrong type or out of its range.
    """

    device: str = "auto"
    ops: str = "auto"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    kv_cache_memory: int | None = None
    block_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    batch_invariant: bool | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or _DEVICE.fullmatch(self.device) is None:
            raise ConfigError(f"device is {shown(self.device)}; it is one of auto, cpu, cuda, cuda:N")
        _one_of("ops", self.ops, OPS_NAMES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _in_range("kv_cache_memory", self.kv_cache_memory, 1, 2**63 - 1, optional=True)
        _in_range("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        _in_range("max_model_len", self.max_model_len, 2, MAX_INT, optional=True)  # a prompt token and one to generate
        _in_range("max_num_seqs", self.max_num_seqs, 1, MAX_NUM_SEQS)
        _in_range("max_num_batched_tokens", self.max_num_batched_tokens, 1, MAX_INT)
        _in_range("num_threads", self.num_threads, 1, MAX_THREADS, optional=True)
        if not isinstance(self.enable_prefix_caching, bool):
            raise ConfigError(f"enable_prefix_caching is {shown(self.enable_prefix_caching)}; it is True or False")
        if self.batch_invariant is not None and not isinstance(self.batch_invariant, bool):
            raise ConfigError(f"batch_invariant is {shown(self.batch_invariant)}; it is True, False or None")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} is {shown(value)}; it is one of {', '.join(choices)}")


def _in_range(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        remedy = " (None is the default)" if optional else ""
        raise ConfigError(f"{name} is {shown(value)}; it is an integer in [{low}, {high}]{remedy}")
