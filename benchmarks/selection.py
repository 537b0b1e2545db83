"""Which backend runs which model in which type: the parameters that the verbs' benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
from inferneo_benchmarks.models import MODELS


class Choice(NamedTuple):
    """Attributes: backend, model and type of the weights; tokens or rows that a call has; whether only a full run asks
    for it."""

    backend: str
    model: str
    weights: str
    tokens: tuple[int, ...]
    is_full: bool = False


QUICK = (
    Choice("cpu", "smollm2-135m", "Q4_1", (1, 8, 128)),
    Choice("cpu", "llama-3.2-1b", "Q4_K", (1,)),
    Choice("torch", "smollm2-135m", "F32", (1, 128)),
    Choice("triton", "llama-3.2-1b", "BF16", (1, 16, 2048)),
    Choice("triton", "llama-3.1-8b", "BF16", (1, 16, 2048)),
    Choice("triton", "llama-3.1-8b", "Q4_K", (1, 16, 2048)),
)
FULL = (
    *(Choice("cpu", "smollm2-135m", kind, (1, 4, 32, 512)) for kind in ("Q4_1", "Q8_0", "BF16")),
    *(Choice("cpu", "llama-3.2-1b", kind, (1, 8, 128)) for kind in ("Q4_K", "Q6_K", "Q8_0")),
    *(Choice("cpu", model, "Q4_K", (1, 8)) for model in ("llama-3.1-8b", "llama-3.1-70b")),
    Choice("torch", "llama-3.2-1b", "BF16", (1, 128)),
    *(Choice("triton", model, "BF16", (1, 8, 64, 512)) for model in ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b")),
    *(Choice("triton", "llama-3.1-8b", kind, (1, 8, 64, 512)) for kind in ("Q4_K", "Q8_0", "Q6_K")),
)


def parameters(tokens_of: Callable[[Choice], Iterable[Any]] = lambda choice: choice.tokens) -> pytest.MarkDecorator:
    """A parametrization over (backend, model, weights, size): the quick choices, and the full ones marked so.

    Args:
        tokens_of: the sizes of a choice; its tokens, unless a verb counts in something else.
    """
    known: set[str] = set()
    found = []
    for choice in (*QUICK, *(choice._replace(is_full=True) for choice in FULL)):
        for size in tokens_of(choice):
            name = f"{choice.backend}-{choice.model}-{choice.weights}-{size}"
            if name in known:
                continue
            known.add(name)
            on = [pytest.mark.backend(choice.backend), pytest.mark.model(choice.model)]
            on += [pytest.mark.full] if choice.is_full else []
            values = (choice.backend, MODELS[choice.model], choice.weights, size)
            found.append(pytest.param(*values, id=name, marks=on))
    return pytest.mark.parametrize(("backend", "config", "weights", "size"), found)
