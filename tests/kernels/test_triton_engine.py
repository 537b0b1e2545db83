"""The whole engine on Triton kernels gives the tokens of the reference, whatever shares a step."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from inferneo_core import Completion, Engine, SamplingParams
from inferneo_core.batch import SampleOutput, SamplingBatch
from inferneo_core.cuda_graphs import batch_sizes
from inferneo_core.runner import ModelRunner, Pending
from inferneo_core.scheduler import ScheduledBatch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of lanes that a mask discards
]

DEVICE = os.environ.get("INFERNEO_TEST_DEVICE", "cpu")
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
PROMPTS = ([5, 80, 200, 13, 7], [9] * 11, [1], [30, 31, 32])
GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
MIXED = (
    GREEDY,
    SamplingParams(max_tokens=4, seed=3, temperature=0.8, ignore_eos=True),
    SamplingParams(max_tokens=6, seed=4, ignore_eos=True),
    SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True),
)
TinyModel = Callable[..., Path]


@pytest.fixture
def triton_engine(tiny_engine: Any, tiny_model: TinyModel, device: torch.device) -> Callable[..., Engine]:
    """An Engine on Triton kernels, of a tiny model that the reference runs too."""

    def make(**arguments: Any) -> Engine:
        defaults = {"max_num_seqs": 3, "max_model_len": 48, "block_size": 4, "dtype": "float32"}
        options = {"ops": "triton", "device": str(device), **defaults, **arguments}
        engine: Engine = tiny_engine(tiny_model(**SMALL), **options)
        return engine

    return make


def reference(
    tiny_engine: Any, tiny_model: TinyModel, params: Any, prompts: Sequence[Any] = PROMPTS
) -> list[Completion]:
    """Each prompt by itself on TorchOps."""
    engine = tiny_engine(tiny_model(**SMALL), ops="torch", device="cpu", dtype="float32", max_model_len=48)
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    return [engine.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]


def token_ids(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


def test_engine_gives_the_tokens_of_the_reference(triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel) -> None:
    """Four requests, three at a time, in steps of nine tokens: prefills in chunks, beside decodes, decodes alone."""
    engine = triton_engine(max_num_batched_tokens=9)
    completions = engine.generate(PROMPTS, MIXED)
    assert token_ids(completions) == token_ids(reference(tiny_engine, tiny_model, MIXED))
    assert engine._runner._graphs.num_captured >= 1
    stats = engine.stats()
    assert stats.free_blocks + stats.cached_blocks == stats.total_blocks


@pytest.fixture
def launched_ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the first sequence of each step stood that was launched before its tokens were known."""
    starts: list[int] = []
    launch_ahead = ModelRunner.launch_ahead

    def noted(runner: ModelRunner, batch: ScheduledBatch) -> Pending:
        starts.append(batch.sequences[0].start)
        return launch_ahead(runner, batch)

    monkeypatch.setattr(ModelRunner, "launch_ahead", noted)
    return starts


def test_engine_runs_ahead_of_the_tokens(
    triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel, launched_ahead: list[int]
) -> None:
    """A decode whose tokens the host has not seen, past the ends of several blocks."""
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    (completion,) = triton_engine().generate([PROMPTS[0]], params)
    assert token_ids([completion]) == token_ids(reference(tiny_engine, tiny_model, params, PROMPTS[:1]))
    assert len(launched_ahead) >= 8
    assert launched_ahead == sorted(launched_ahead)


PENALISED = (
    SamplingParams(max_tokens=12, temperature=0.0, repetition_penalty=1.6, frequency_penalty=0.7, ignore_eos=True),
    SamplingParams(max_tokens=11, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=12, seed=8, presence_penalty=1.5, frequency_penalty=-0.4, ignore_eos=True),
)


def test_engine_runs_ahead_with_penalties(
    triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel, launched_ahead: list[int]
) -> None:
    """The device counts the tokens that the host has not seen; one sequence of the batch has no penalties."""
    completions = triton_engine().generate(PROMPTS[:3], PENALISED)
    expected = reference(tiny_engine, tiny_model, PENALISED, PROMPTS[:3])
    assert token_ids(completions) == token_ids(expected)
    plain = [SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)] * 3
    assert token_ids(reference(tiny_engine, tiny_model, plain, PROMPTS[:3]))[0] != expected[0].token_ids
    assert len(launched_ahead) >= 8


def test_penalty_counts_survive_what_interrupts_the_run(
    triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel, launched_ahead: list[int]
) -> None:
    """Arrivals that make steps mixed, a stream closed in flight, and preemption while the device has counted a token
    that is then dropped: each sequence's counts are those of its own accepted tokens."""
    engine = triton_engine(max_num_seqs=3, max_model_len=32, kv_cache_memory=10 * 1024)  # 10 blocks of 4 tokens
    params = [
        SamplingParams(max_tokens=16, temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.3, ignore_eos=True),
        SamplingParams(max_tokens=12, seed=2, presence_penalty=0.9, repetition_penalty=0.8, ignore_eos=True),
        SamplingParams(max_tokens=14, temperature=0.0, frequency_penalty=0.6, ignore_eos=True),
    ]
    streams = []
    for prompt, one in zip(PROMPTS, params, strict=False):
        streams.append(engine.stream(prompt, one))
        for _ in range(3):
            engine.step()
    doomed = engine.stream(PROMPTS[3], params[0])
    outputs = [[output.token_id for output in stream] for stream in streams[::-1]][::-1]
    doomed.close()
    assert [tuple(ids) for ids in outputs] == token_ids(reference(tiny_engine, tiny_model, params, PROMPTS[:3]))
    assert engine.stats().preemptions >= 1
    assert len(launched_ahead) >= 8


def test_interrupted_step_counts_its_token_once(
    triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A KeyboardInterrupt while the host waits: the device has drawn and counted, and does both again."""
    waits = iter(range(100))
    wait = Pending.wait

    def interrupted(pending: Pending) -> SampleOutput | None:
        output = wait(pending)
        if next(waits) in (3, 6):
            raise KeyboardInterrupt
        return output

    monkeypatch.setattr(Pending, "wait", interrupted)
    stream, outputs, num_interrupts = triton_engine().stream(PROMPTS[0], PENALISED[0]), list[int](), 0
    while len(outputs) < PENALISED[0].max_tokens:
        try:
            outputs.append(next(stream).token_id)
        except KeyboardInterrupt:
            num_interrupts += 1
    monkeypatch.undo()
    assert num_interrupts == 2
    assert [tuple(outputs)] == token_ids(reference(tiny_engine, tiny_model, PENALISED[0], PROMPTS[:1]))


def test_min_tokens_and_biases_end_on_the_device(
    triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel, launched_ahead: list[int]
) -> None:
    """The end of text becomes possible in steps that the host has launched without a look at the tokens."""
    eos = {257: 100.0}
    params = (
        SamplingParams(max_tokens=14, temperature=0.0, min_tokens=9, logit_bias=eos),
        SamplingParams(max_tokens=14, temperature=0.0, min_tokens=12, logit_bias={**eos, 5: 3.0}),
        SamplingParams(max_tokens=14, temperature=0.0, logit_bias={7: 2.5}, ignore_eos=True),
    )
    completions = triton_engine().generate(PROMPTS[:3], params)
    assert token_ids(completions) == token_ids(reference(tiny_engine, tiny_model, params, PROMPTS[:3]))
    assert [len(completion.token_ids) for completion in completions] == [10, 13, 14]
    assert [completion.finish_reason for completion in completions] == ["stop", "stop", "length"]
    assert len(launched_ahead) >= 8


def test_token_computed_past_a_stop_is_dropped(triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel) -> None:
    """One sequence stops while the step after is in flight; its neighbour goes on as if nothing had been."""
    long = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    free = reference(tiny_engine, tiny_model, long, PROMPTS[:2])
    stop_id = free[0].token_ids[4]
    stopping = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, stop_token_ids=[stop_id])
    engine = triton_engine()
    completions = engine.generate(PROMPTS[:2], [stopping, long])
    assert completions[0].finish_reason == "stop"
    assert completions[0].token_ids == free[0].token_ids[: free[0].token_ids.index(stop_id) + 1]
    assert completions[1].token_ids == free[1].token_ids
    assert engine.stats().generated_tokens == sum(len(one.token_ids) for one in completions)
    stats = engine.stats()
    assert stats.free_blocks + stats.cached_blocks == stats.total_blocks


def test_stream_closed_in_flight_leaves_its_neighbour_alone(
    triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel
) -> None:
    long = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    engine = triton_engine()
    first, second = (engine.stream(prompt, long) for prompt in PROMPTS[:2])
    for _ in range(3):
        next(first)
    first.close()
    (expected,) = reference(tiny_engine, tiny_model, long, PROMPTS[1:2])
    assert tuple(output.token_id for output in second) == expected.token_ids
    engine.step()  # what was in flight as the last stream ended
    stats = engine.stats()
    assert stats.free_blocks + stats.cached_blocks == stats.total_blocks


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=3, seed=5, top_p=0.8, top_k=9, logprobs=2, logit_bias={7: 3.0}, ignore_eos=True),
        SamplingParams(max_tokens=4, temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.4, ignore_eos=True),
        SamplingParams(max_tokens=4, temperature=0.0, min_tokens=2, logit_bias={257: 100.0}),
    ],
    ids=["filters, biases and log-probabilities", "penalties", "min_tokens"],
)
def test_engine_honours_what_a_request_asks_for(
    params: SamplingParams, triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel
) -> None:
    (completion,) = triton_engine().generate(PROMPTS[:1], params)
    (expected,) = reference(tiny_engine, tiny_model, params, PROMPTS[:1])
    assert completion.token_ids == expected.token_ids
    assert (completion.logprobs is None) == (expected.logprobs is None)
    for one, other in zip(completion.logprobs or (), expected.logprobs or (), strict=True):
        assert abs(one.logprob - other.logprob) < 1e-4
        assert [token_id for token_id, _ in one.top] == [token_id for token_id, _ in other.top]


def test_prompt_logprobs_are_those_of_the_reference(
    triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel
) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    (completion,) = triton_engine().generate(PROMPTS[:1], params)
    (expected,) = reference(tiny_engine, tiny_model, params, PROMPTS[:1])
    assert completion.prompt_logprobs is not None and expected.prompt_logprobs is not None
    for one, other in zip(completion.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert one is not None and other is not None
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert abs(one.logprob - other.logprob) < 1e-4


def specialization(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[object, ...]:
    """What Triton compiles a launch for: types, values of 1 and multiples of 16 where it looks at them, constants."""
    names = inspect.signature(kernel.fn).parameters
    given = {**dict(zip(names, args, strict=False)), **{key: options[key] for key in options if key in names}}
    key: list[object] = [kernel.fn.__module__, kernel.fn.__name__]
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif "constexpr" in str(kernel.fn.__annotations__.get(name)) or value is None:
            key.append((name, value))
        elif isinstance(value, int):
            seen = () if name in (kernel.kwargs["do_not_specialize"] or ()) else (value == 1, value % 16 == 0)
            key.append((name, value.bit_length() > 31, *seen))
        else:
            key.append((name, type(value)))
    return (*key, *sorted((name, value) for name, value in options.items() if name not in names and name != "grid"))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> set[tuple[object, ...]]:
    """The specializations of every launch so far."""
    seen: set[tuple[object, ...]] = set()
    run = interpreter.InterpretedFunction.run

    def noted(kernel: Any, *args: Any, **options: Any) -> None:
        seen.add(specialization(kernel, args, options))
        run(kernel, *args, **options)

    def copied(batch: SamplingBatch, device: torch.device) -> SamplingBatch:
        """As on its way to a GPU: at an address of its own, not in the middle of the host's arrays."""
        return to_device(replace(batch, floats=batch.floats.clone(), ints=batch.ints.clone()), device)

    to_device = SamplingBatch.to
    monkeypatch.setattr(SamplingBatch, "to", copied)
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", noted)
    return seen


def unforeseen(launches: set[tuple[object, ...]], foreseen: set[tuple[object, ...]]) -> list[object]:
    """Each specialization that was not foreseen, as its kernel and what sets it apart from the nearest that was."""
    found = []
    for key in launches - foreseen:
        same = [other for other in foreseen if other[:2] == key[:2]]
        nearest = max(same, key=lambda other: len(set(other) & set(key)), default=())
        found.append((*key[:2], [item for item in key if item not in nearest]))
    return found


EVERYTHING = (
    PENALISED[0],
    SamplingParams(max_tokens=5, seed=5, top_p=0.8, top_k=9, logprobs=2, min_tokens=2, logit_bias={7: 3.0}),
    SamplingParams(max_tokens=5, seed=6, ignore_eos=True),
    SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=3, presence_penalty=0.5, min_p=0.1, ignore_eos=True),
)


def test_serving_compiles_and_captures_nothing_that_warm_up_has_not(
    triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel, launches: set[tuple[object, ...]]
) -> None:
    """Prompts in chunks, beside decodes, and whatever a request may ask for. Warm-up leaves no trace in the cache."""
    engine = triton_engine(max_num_seqs=2, max_model_len=24, max_num_batched_tokens=5)
    engine._runner.warm_up(max_num_batched_tokens=5, max_num_seqs=2, max_model_len=24)
    foreseen, captured = set(launches), engine._runner._graphs.num_captured
    assert captured == 4 * len(batch_sizes(2))
    plain = engine.generate(PROMPTS[2:], MIXED[:2])
    assert engine._runner._graphs.num_captured == captured
    assert token_ids(plain) == token_ids(reference(tiny_engine, tiny_model, MIXED[:2], PROMPTS[2:]))
    completions = engine.generate(PROMPTS, EVERYTHING)
    if DEVICE == "cpu":  # a GPU's compiler is asked by benchmarks/gpu/golden.py
        assert foreseen
        assert unforeseen(launches, foreseen) == []
    assert token_ids(completions) == token_ids(reference(tiny_engine, tiny_model, EVERYTHING))


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 9, 64, 100, 256, 300, 4096])
def test_batch_sizes_rise_to_the_limit(max_num_seqs: int) -> None:
    sizes = batch_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for num_seqs in range(1, max_num_seqs + 1):
        size = next(size for size in sizes if size >= num_seqs)
        assert size - num_seqs <= max(7, num_seqs // 4)
