"""The public names and signatures. Whoever changes them changes this file, and with it every user's program."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import inferneo
import inferneo_core
from inferneo_core import errors

ERRORS = {
    "InferneoError",
    "ConfigError",
    "CacheTooSmall",
    "ModelError",
    "ModelNotFound",
    "UnsupportedModel",
    "CorruptWeights",
    "UnsafeWeights",
    "RequestError",
    "InvalidParameter",
    "InvalidPrompt",
    "PromptTooLong",
    "ChatTemplateError",
    "ShapeError",
    "BackendUnavailable",
    "StepFailed",
    "EngineClosed",
}

PUBLIC = ERRORS | {
    "Engine",
    "AsyncEngine",
    "AsyncTokenStream",
    "TokenStream",
    "SamplingParams",
    "TokenOutput",
    "Completion",
    "Logprob",
    "Timings",
    "EngineStats",
    "Profile",
    "StepProfile",
    "VerbTime",
    "FinishReason",
    "StreamCallback",
    "stream_with_callback",
    "StreamMetrics",
    "ProgressBar",
    "Tokenizer",
    "ModelConfig",
    "EngineConfig",
}

ENGINE = (
    "model, *, device='auto', ops='auto', dtype='auto', kv_cache_dtype='auto', kv_cache_memory=None, block_size=16, "
    "max_model_len=None, max_num_seqs=64, max_num_batched_tokens=2048, enable_prefix_caching=True, "
    "batch_invariant=None, num_threads=None"
)

# Names and defaults; types are left to mypy.
SIGNATURES = {
    "Engine": ENGINE,
    "AsyncEngine": ENGINE,
    "Engine.stream": "self, prompt, params=None, *, choice=0",
    "Engine.generate": "self, prompts, params=None, *, progress=False",
    "Engine.step": "self",
    "Engine.stats": "self",
    "Engine.close": "self",
    "AsyncEngine.stream": "self, prompt, params=None, *, choice=0, max_unread=None",
    "AsyncEngine.close": "self",
    "TokenStream.close": "self",
    "SamplingParams": (
        "max_tokens=None, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, repetition_penalty=1.0, "
        "presence_penalty=0.0, frequency_penalty=0.0, logit_bias=None, seed=None, stop=(), stop_token_ids=(), "
        "ignore_eos=False, min_tokens=0, logprobs=None, prompt_logprobs=None"
    ),
    "TokenOutput": "text, token_id, index, logprob, top_logprobs, finish_reason, timings",
    "Completion": "text, token_ids, finish_reason, logprobs, prompt_token_ids, prompt_logprobs, timings",
    "Logprob": "token_id, logprob, rank, top",
    "Timings": "queued_ms, prefill_ms, ttft_ms, decode_ms, tokens_per_s, cached_tokens",
    "StreamCallback.on_token": "self, token",
    "StreamCallback.on_complete": "self",
}


def find(path: str) -> object:
    found: object = inferneo_core
    for name in path.split("."):
        found = getattr(found, name)
    return found


def without_types(function: object) -> str:
    assert callable(function)
    signature = inspect.signature(function)
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))[1:-1]


def public_members() -> dict[str, object]:
    """Every public class and function, and every method and property of those classes, by dotted path."""
    found = {name: find(name) for name in sorted(PUBLIC - ERRORS - {"FinishReason"})}
    for name, value in tuple(found.items()):
        if inspect.isclass(value):
            members = {f"{name}.{key}": find(f"{name}.{key}") for key in vars(value) if not key.startswith("_")}
            found |= {path: member for path, member in members.items() if is_code(member)}
    return found


def is_code(member: object) -> bool:
    return inspect.isroutine(member) or isinstance(member, property)


def test_engine_exports_exactly_these_names():
    assert set(inferneo_core.__all__) == PUBLIC
    assert len(inferneo_core.__all__) == len(PUBLIC)
    assert all(hasattr(inferneo_core, name) for name in PUBLIC)


def test_engine_exports_every_error():
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined == ERRORS
    assert all(getattr(inferneo_core, name) is getattr(errors, name) for name in ERRORS)


def test_errors_are_also_what_python_programmers_catch():
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.RequestError, ValueError)
    assert issubclass(errors.ModelNotFound, FileNotFoundError)
    assert issubclass(errors.EngineClosed, RuntimeError)
    assert all(issubclass(getattr(errors, name), errors.InferneoError) for name in ERRORS)


def test_terminal_package_exports_its_clients_and_its_version():
    assert inferneo.__all__ == ["AsyncInferneoClient", "InferneoClient", "__version__"]
    assert inferneo.__version__.count(".") == 2


@pytest.mark.parametrize(("path", "expected"), SIGNATURES.items())
def test_signature_is(path, expected):
    assert without_types(find(path)) == expected


def test_engine_config_has_the_arguments_of_engine():
    fields = {field.name: field.default for field in dataclasses.fields(inferneo_core.EngineConfig)}
    parameters = inspect.signature(inferneo_core.Engine).parameters.values()
    assert fields == {parameter.name: parameter.default for parameter in parameters if parameter.name != "model"}


@pytest.mark.parametrize("name", ["SamplingParams", "TokenOutput", "Completion", "Logprob", "Timings", "EngineStats"])
def test_values_are_frozen(name):
    value = find(name)
    assert dataclasses.is_dataclass(value)
    assert value.__dataclass_params__.frozen


@pytest.mark.parametrize("path", sorted(public_members()))
def test_public_name_has_a_docstring(path):
    doc = inspect.getdoc(public_members()[path])
    assert doc, f"{path} has no docstring"
    assert not doc.startswith(f"{path}("), f"{path} has only the docstring that dataclass wrote"


@pytest.mark.parametrize("path", sorted(path for path, value in public_members().items() if inspect.isroutine(value)))
def test_public_function_takes_no_arbitrary_keywords(path):
    kinds = {parameter.kind for parameter in inspect.signature(public_members()[path]).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


@pytest.mark.parametrize("name", ["Engine", "AsyncEngine", "StreamMetrics", "ProgressBar", "TokenStream", "Tokenizer"])
def test_public_class_takes_no_arbitrary_keywords(name):
    kinds = {parameter.kind for parameter in inspect.signature(find(name)).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
