"""What a step costs in counts, which no machine's mood can move: verbs, calls, bytes, allocations.

A change that adds a kernel, a copy or an allocation to every step fails here, also where no clock would show it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inferneo_benchmarks import counts
from inferneo_benchmarks.backends import Backend
from inferneo_benchmarks.counts import SequenceWork
from inferneo_benchmarks.models import Storage, weight_bytes
from inferneo_benchmarks.verbs import Operands
from torch.utils._python_dispatch import TorchDispatchMode

from inferneo_core import Engine, SamplingParams, runner
from inferneo_core.cpu_graph import MAX_BURST
from inferneo_core.stream import TokenStream

NUM_LAYERS = 3  # of the tiny model
WARM_UP = 4
# Bytes as packed over bytes as stored: Q4_K's and Q5_K's scales of 6 bits take 8, Q6_K's headers are padded.
LARGEST_PACKING = {"Q4_K": 1.04, "Q5_K": 1.04, "Q6_K": 1.03} | dict.fromkeys(("Q4_0", "Q4_1", "Q5_0"), 1.01)
LARGEST_PACKING |= dict.fromkeys(("Q5_1", "Q8_0", "BF16", "F32"), 1.01)
PARAMS = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
FILTERED = SamplingParams(max_tokens=60, temperature=0.8, top_p=0.9, top_k=40, seed=1, ignore_eos=True)

TinyEngine = Callable[..., Engine]


class CallCounter(TorchDispatchMode):
    """Counts the operators that are called while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(op)] += 1
        return op(*args, **(kwargs or {}))


def decoding(engine: Engine, params: SamplingParams, num_seqs: int) -> list[TokenStream]:
    """Streams past their prompts and past the first steps, which may make what the later ones use."""
    streams = [engine.stream([5, 6, 7, index + 8], params) for index in range(num_seqs)]
    for _ in range(WARM_UP):
        for stream in streams:
            next(stream)
    return streams


@pytest.mark.parametrize("num_seqs", [1, 3])
@pytest.mark.parametrize("params", [PARAMS, FILTERED], ids=["greedy", "filtered"])
def test_burst_of_decode_steps_is_one_call_into_cpp(
    tiny_engine: TinyEngine, params: SamplingParams, num_seqs: int
) -> None:
    engine = tiny_engine(ops="cpu")
    streams = decoding(engine, params, num_seqs)
    steps = engine.stats().steps
    with CallCounter() as counter:
        for _ in range(2 * MAX_BURST):
            for stream in streams:
                next(stream)
    assert engine.stats().steps == steps + 2 * MAX_BURST
    assert sum(counter.calls.values()) == 2, counter.calls
    assert all(name.startswith("inferneo.tape_") for name in counter.calls)


@pytest.mark.parametrize("num_seqs", [1, 3])
@pytest.mark.parametrize("params", [PARAMS, FILTERED], ids=["greedy", "filtered"])
def test_decode_step_allocates_nothing_after_warm_up(
    tiny_engine: TinyEngine, monkeypatch: pytest.MonkeyPatch, params: SamplingParams, num_seqs: int
) -> None:
    engine = tiny_engine(ops="cpu")
    streams = decoding(engine, params, num_seqs)
    # The engine must not see the profiler, or it would run verb by verb.
    monkeypatch.setattr(runner, "trace_ranges", lambda: None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(5):
            for stream in streams:
                next(stream)
        sentinel = torch.empty(12345, dtype=torch.uint8)  # the log works: this one must be in it
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = [event.nbytes() for event in events if event.nbytes() > 0]
    assert len(sentinel) == 12345
    assert len(allocated) == 1, allocated
    assert allocated[0] >= 12345


def test_step_runs_each_verb_once_a_layer(tiny_engine: TinyEngine) -> None:
    tape = tiny_engine(ops="cpu")._runner._tape
    assert tape is not None
    layer = ["qkv_rope_store", "attention", "linear_add", "gate_up_silu", "linear_add"]
    assert list(tape._verbs) == ["embed", *layer * NUM_LAYERS, "lm_head", "sample"]
    assert torch.ops.inferneo.tape_time(tape._tape, False) == len(tape._verbs) - 1  # the sampler is no node


@pytest.mark.parametrize("type_", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "BF16", "F32"])
def test_packed_weight_is_as_small_as_its_file(type_: str) -> None:
    backend = Backend("cpu", type_, num_threads=1)
    packed = backend.ops.prepare(Operands(backend).linear(256, 1024)).weight
    # Scales lie in whole cache lines, and each of the K formats' units has a header of its own.
    assert weight_bytes(256, 1024, type_) <= packed.numel() <= weight_bytes(256, 1024, type_) * LARGEST_PACKING[type_]


@pytest.mark.slow
def test_token_of_the_default_model_moves_no_more_bytes_than_counted(default_model: Path) -> None:
    with Engine(default_model, ops="cpu", num_threads=1, max_model_len=256, kv_cache_memory=2**26) as engine:
        model, config = engine._runner.model, engine.model_config
        weights = [weight for layer in model.layers for weight in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        held = sum(weight.weight.numel() for weight in (*weights, model.head))
        cache = engine._runner.cache.layers[0]
    # 106.2 M weights of 5 bits, 28.3 M of 8.5, and 2 bytes for each of the layers' 155,520 rows.
    assert held == pytest.approx(96_750_000, rel=0.003)
    by_verb = counts.step(config, Storage("Q4_1", 4, cache.k.element_size(), head="Q8_0"), [SequenceWork(1, 100)])
    counted = sum(count.num_bytes for count in by_verb.values())
    activations, cached = 3_000_000, 100 * 2 * 2 * config.kv_size * config.num_layers
    assert held <= counted * 1.005
    assert counted <= held + cached + activations
