"""The whole engine on Triton kernels gives the tokens of the reference, whatever shares a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from inferneo_core import Completion, Engine, SamplingParams
from inferneo_core.cuda_graphs import batch_sizes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of lanes that a mask discards
]

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


def test_engine_runs_ahead_of_the_tokens(
    triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode whose tokens the host has not seen, past the ends of several blocks."""
    engine = triton_engine()
    launched: list[int] = []
    launch_ahead = type(engine._runner).launch_ahead
    monkeypatch.setattr(
        type(engine._runner),
        "launch_ahead",
        lambda runner, batch: launched.append(batch.sequences[0].start) or launch_ahead(runner, batch),
    )
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    (completion,) = engine.generate([PROMPTS[0]], params)
    assert token_ids([completion]) == token_ids(reference(tiny_engine, tiny_model, params, PROMPTS[:1]))
    assert len(launched) >= 8
    assert launched == sorted(launched)


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


def test_warm_up_foresees_what_serving_captures(triton_engine: Any, tiny_engine: Any, tiny_model: TinyModel) -> None:
    """It leaves no trace in the cache, so the tokens after it are the reference's."""
    engine = triton_engine(max_num_seqs=2, max_model_len=24)
    engine._runner.warm_up(max_num_batched_tokens=3, max_num_seqs=2, max_model_len=24)
    foreseen = engine._runner._graphs.num_captured
    assert foreseen == 2 * len(batch_sizes(2)) + 1
    completions = engine.generate(PROMPTS[2:], MIXED[:2])
    assert engine._runner._graphs.num_captured == foreseen
    assert token_ids(completions) == token_ids(reference(tiny_engine, tiny_model, MIXED[:2], PROMPTS[2:]))


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 9, 64, 100, 256, 300, 4096])
def test_batch_sizes_rise_to_the_limit(max_num_seqs: int) -> None:
    sizes = batch_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for num_seqs in range(1, max_num_seqs + 1):
        size = next(size for size in sizes if size >= num_seqs)
        assert size - num_seqs <= max(7, num_seqs // 4)
