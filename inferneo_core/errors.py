"""Every error Inferneo raises on purpose. Each message names the value, the limit and the remedy.

InferneoError
├── ConfigError (ValueError)             an Engine argument is impossible
│   └── CacheTooSmall                    the KV cache has no room for one sequence of max_model_len
├── ModelError                           the model's files cannot be used
│   ├── ModelNotFound (FileNotFoundError)    the name resolves to nothing, or a file of it is missing
│   ├── UnsupportedModel                 an architecture, RoPE kind, tensor type or tokenizer we do not run
│   ├── CorruptWeights                   truncated, overlapping, out of range, of the wrong shape, absent
│   └── UnsafeWeights                    pickled weights, or an index that points outside its directory
├── RequestError (ValueError)            one request is refused; the engine goes on
│   ├── InvalidParameter                 a SamplingParams field
│   ├── InvalidPrompt                    empty, of the wrong type, or with ids out of range
│   ├── PromptTooLong                    prompt, or prompt + max_tokens, exceeds max_model_len
│   └── ChatTemplateError                no template, or one that refuses, loops or reaches for what it may not
├── ShapeError (ValueError)              a verb was given tensors that disagree
├── BackendUnavailable (RuntimeError)    the compiled extension, Triton or the device is missing
├── StepFailed (RuntimeError)            a step raised (see __cause__); every stream of its batch gets one
└── EngineClosed (RuntimeError)          the engine was closed, by close() or because its device failed
"""


class InferneoError(Exception):
    """Base of every error in this package."""


class ConfigError(InferneoError, ValueError):
    """An Engine argument is impossible, alone or beside the others."""


class CacheTooSmall(ConfigError):
    """The KV cache cannot hold one sequence of max_model_len tokens."""


class ModelError(InferneoError):
    """The model's files cannot be used."""


class ModelNotFound(ModelError, FileNotFoundError):
    """The model name resolves to nothing, or a file that the model needs is missing."""


class UnsupportedModel(ModelError):
    """The architecture, RoPE kind, tensor type or tokenizer is not one that Inferneo runs."""


class CorruptWeights(ModelError):
    """A weight file is truncated, contradicts itself, or lacks a tensor that the model needs."""


class UnsafeWeights(ModelError):
    """Loading would execute code or leave the model's directory; refused."""


class RequestError(InferneoError, ValueError):
    """One request is refused; the engine and its other streams go on."""


class InvalidParameter(RequestError):
    """A SamplingParams field is out of its range."""


class InvalidPrompt(RequestError):
    """The prompt is empty, of the wrong type, or holds ids outside the vocabulary."""


class PromptTooLong(RequestError):
    """The prompt, or the prompt and max_tokens together, exceeds max_model_len."""


class ChatTemplateError(RequestError):
    """The chat template is absent, refused the messages, or broke its limits."""


class ShapeError(InferneoError, ValueError):
    """A verb was given tensors whose shapes or dtypes disagree."""


class BackendUnavailable(InferneoError, RuntimeError):
    """The compiled extension, Triton or the device that was asked for is missing."""


class StepFailed(InferneoError, RuntimeError):
    """An engine step raised; `__cause__` is what it raised."""


class EngineClosed(InferneoError, RuntimeError):
    """The engine was closed."""


def shown(value: object) -> str:
    """The repr of a value for a message, cut short: what is refused may be a megabyte long, or refuse to be shown."""
    try:
        text = repr(value)
    except Exception:  # an integer of more than 4300 digits, or a class whose __repr__ raises
        return f"<{type(value).__name__} that cannot be shown>"
    return text if len(text) <= 60 else text[:57] + "..."
