"""Inferneo: a Llama inference engine. Start with `Engine`; `Engine.stream()` is the product."""

from inferneo_core.async_engine import AsyncEngine, AsyncTokenStream
from inferneo_core.callbacks import ProgressBar, StreamCallback, StreamMetrics, stream_with_callback
from inferneo_core.config import EngineConfig, ModelConfig
from inferneo_core.engine import Engine
from inferneo_core.errors import (
    BackendUnavailable,
    CacheTooSmall,
    ChatTemplateError,
    ConfigError,
    CorruptWeights,
    EngineClosed,
    InferneoError,
    InvalidParameter,
    InvalidPrompt,
    ModelError,
    ModelNotFound,
    PromptTooLong,
    RequestError,
    ShapeError,
    StepFailed,
    UnsafeWeights,
    UnsupportedModel,
)
from inferneo_core.outputs import Completion, EngineStats, FinishReason, Logprob, Timings, TokenOutput
from inferneo_core.profile import Profile, StepProfile, VerbTime
from inferneo_core.sampling_params import SamplingParams
from inferneo_core.stream import TokenStream
from inferneo_core.tokenizer import Tokenizer

__all__ = [
    "AsyncEngine",
    "AsyncTokenStream",
    "BackendUnavailable",
    "CacheTooSmall",
    "ChatTemplateError",
    "Completion",
    "ConfigError",
    "CorruptWeights",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "InferneoError",
    "InvalidParameter",
    "InvalidPrompt",
    "Logprob",
    "ModelConfig",
    "ModelError",
    "ModelNotFound",
    "Profile",
    "ProgressBar",
    "PromptTooLong",
    "RequestError",
    "SamplingParams",
    "ShapeError",
    "StepFailed",
    "StepProfile",
    "StreamCallback",
    "StreamMetrics",
    "Timings",
    "TokenOutput",
    "TokenStream",
    "Tokenizer",
    "UnsafeWeights",
    "UnsupportedModel",
    "VerbTime",
    "stream_with_callback",
]
