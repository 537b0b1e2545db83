"""How many kernels a decode step launches: on a GPU, each one more costs a microsecond of every token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from inferneo_core import Engine, SamplingParams

NUM_LAYERS = 3  # of the tiny model
OUTSIDE_THE_LAYERS = ("_embed_kernel", "_rms_norm_kernel", "_head_draw_kernel", "_merge_kernel", "_advance_kernel")


@pytest.fixture
def launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts launches by the kernel's name."""
    if device.type != "cpu":
        pytest.skip("launches are counted in the interpreter")
    found: Counter[str] = Counter()
    launch = interpreter.GridExecutor.__call__

    def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
        found[executor.fn.__name__] += 1
        return launch(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return found


def test_decode_step_launches_five_kernels_a_layer(tiny_engine: Callable[..., Engine], launches: Counter[str]) -> None:
    engine = tiny_engine(ops="triton", dtype="float32")
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with engine.stream([5, 6, 7], params) as stream:
        next(stream)
        next(stream)
        launches.clear()
        before = engine.stats().steps
        next(stream)
        steps = engine.stats().steps - before
    assert steps == 1
    outside = sum(launches[name] for name in OUTSIDE_THE_LAYERS)
    assert sum(launches.values()) - outside == 5 * NUM_LAYERS, launches  # one kernel a verb
    assert outside <= len(OUTSIDE_THE_LAYERS), launches
