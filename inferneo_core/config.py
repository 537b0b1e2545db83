"""ModelConfig: what a checkpoint is. EngineConfig: how it is run. Both frozen, both checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from inferneo_core.errors import ConfigError, UnsupportedModel

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
DEVICES = ("auto", "cpu", "cuda")
OPS_NAMES = ("auto", "torch", "cpu", "triton")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_BLOCK_SIZE = 1024


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
        attention_factor: "yarn" multiplies cosines and sines by it; None derives it from factor, mscale and mscale_all_dim.
        truncate: "yarn" rounds the ramp's bounds outwards.
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
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UnsupportedModel(f"the model's {field.name} is {value!r}; it is a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim is {self.head_dim}; RoPE needs an even one")

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
            UnsupportedModel: not a Llama, an activation or RoPE kind that Llama does not use, or a size is absent.
        """
        architectures = config.get("architectures") or []
        if config.get("model_type") != "llama" or architectures not in ([], ["LlamaForCausalLM"]):
            found = architectures[0] if architectures else config.get("model_type")
            raise UnsupportedModel(f"architecture is {found}; Inferneo runs LlamaForCausalLM")
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"hidden_act is {config['hidden_act']}; Inferneo runs silu")
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "unknown")
            raise UnsupportedModel(f"weights are quantised by {method}; use a dense checkpoint or a GGUF file")
        num_heads = _require(config, "num_attention_heads", "config.json")
        hidden_size = _require(config, "hidden_size", "config.json")
        return ModelConfig(
            vocab_size=_require(config, "vocab_size", "config.json"),
            hidden_size=hidden_size,
            intermediate_size=_require(config, "intermediate_size", "config.json"),
            num_layers=_require(config, "num_hidden_layers", "config.json"),
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or hidden_size // max(num_heads, 1),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rope=_rope_from_hf(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )

    @staticmethod
    def from_gguf(metadata: Mapping[str, Any], tensor_names: frozenset[str] = frozenset()) -> ModelConfig:
        """Read a GGUF file's metadata; `tensor_names` (canonical) tell whether the head and biases exist.

        Raises:
            UnsupportedModel: not the llama architecture, an unknown RoPE scaling, or a size is absent.
        """
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise UnsupportedModel(f"architecture is {architecture}; Inferneo runs llama")
        if metadata.get("llama.expert_count"):
            raise UnsupportedModel(f"the model has {metadata['llama.expert_count']} experts; Inferneo runs dense Llamas")

        def need(key: str) -> Any:
            return _require(metadata, f"llama.{key}", "the GGUF metadata")

        num_heads, hidden_size = need("attention.head_count"), need("embedding_length")
        head_dim = metadata.get("llama.attention.key_length") or hidden_size // max(num_heads, 1)
        if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
            raise UnsupportedModel(
                f"rope.dimension_count is {metadata['llama.rope.dimension_count']}; it must be head_dim ({head_dim})"
            )
        vocab_size = metadata.get("llama.vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ()))
        return ModelConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=need("feed_forward_length"),
            num_layers=need("block_count"),
            num_heads=num_heads,
            num_kv_heads=metadata.get("llama.attention.head_count_kv") or num_heads,
            head_dim=head_dim,
            norm_eps=float(need("attention.layer_norm_rms_epsilon")),
            max_position_embeddings=need("context_length"),
            rope=_rope_from_gguf(metadata),
            tie_word_embeddings="lm_head.weight" not in tensor_names,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in tensor_names,
            mlp_bias="model.layers.0.mlp.gate_proj.bias" in tensor_names,
        )


def _require(source: Mapping[str, Any], key: str, where: str) -> Any:
    if source.get(key) is None:
        raise UnsupportedModel(f"{where} has no {key}; a Llama needs it")
    return source[key]


def _rope_from_hf(config: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 writes rope_parameters; before it, rope_theta beside an optional rope_scaling.
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(f"RoPE kind is {kind}; Inferneo runs {', '.join(ROPE_KINDS)}")
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel("partial_rotary_factor is not 1; a Llama rotates whole heads")
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    original = scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings", 2048)
    factor = scaling.get("factor")
    if factor is None:  # yarn checkpoints may leave it to the ratio of the context lengths
        factor = config.get("max_position_embeddings", 2048) / original if kind == "yarn" else 1.0
    names = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale")
    given = {name: scaling[name] for name in (*names, "mscale_all_dim", "truncate") if scaling.get(name) is not None}
    rope = RopeConfig(kind, float(theta), float(factor), int(original), **given)
    if rope.factor < 1.0:
        raise UnsupportedModel(f"RoPE factor is {rope.factor}; it is at least 1")
    return rope


def _rope_from_gguf(metadata: Mapping[str, Any]) -> RopeConfig:
    kind = metadata.get("llama.rope.scaling.type", "none")
    kinds: dict[str, RopeKind] = {"none": "default", "linear": "linear", "yarn": "yarn"}
    if kind not in kinds:
        raise UnsupportedModel(f"RoPE scaling is {kind}; Inferneo runs {', '.join(kinds)} from GGUF")
    context_length = metadata.get("llama.context_length", 2048)
    return RopeConfig(
        kind=kinds[kind],
        theta=float(metadata.get("llama.rope.freq_base", 10000.0)),
        factor=float(metadata.get("llama.rope.scaling.factor", 1.0)),
        original_max_position_embeddings=metadata.get("llama.rope.scaling.original_context_length", context_length),
        attention_factor=metadata.get("llama.rope.scaling.attn_factor"),
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an Engine runs its model; the arguments of `Engine`, checked.

    Args:
        device: "auto" takes the GPU where there is one; "cpu", "cuda" or "cuda:N" by hand.
        ops: "auto" takes the device's own kernels; "torch", "cpu" or "triton" by hand.
        dtype: of activations; "auto" keeps a dense checkpoint's own, and takes float32 for quantised ones on the CPU.
        kv_cache_dtype: "auto" is dtype.
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
        device = self.device.partition(":")[0] if isinstance(self.device, str) else self.device
        _one_of("device", device, DEVICES)
        _one_of("ops", self.ops, OPS_NAMES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, DTYPES)
        _at_least_one("kv_cache_memory", self.kv_cache_memory, optional=True)
        _at_least_one("block_size", self.block_size)
        if self.block_size > MAX_BLOCK_SIZE:
            raise ConfigError(f"block_size is {self.block_size}; it is at most {MAX_BLOCK_SIZE}")
        _at_least_one("max_model_len", self.max_model_len, optional=True)
        _at_least_one("max_num_seqs", self.max_num_seqs)
        _at_least_one("max_num_batched_tokens", self.max_num_batched_tokens)
        _at_least_one("num_threads", self.num_threads, optional=True)
        if self.batch_invariant not in (None, True, False):
            raise ConfigError(f"batch_invariant is {self.batch_invariant!r}; it is True, False or None")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it is one of {', '.join(choices)}")


def _at_least_one(name: str, value: object, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it is a positive integer" + (" or None" if optional else ""))
