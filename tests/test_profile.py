"""Engine.profile and the ranges of torch's profiler: which verbs they show, and that they change nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inferneo_core import Engine, EngineClosed, PromptTooLong, SamplingParams
from inferneo_core.profile import ObservedOps, StepObserver, trace_ranges

NUM_LAYERS = 3  # of the tiny model
LAYER_VERBS = {"qkv_rope_store": 1, "attention": 1, "linear_add": 2, "gate_up_silu": 1}
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
PROMPT = [5, 6, 7, 8, 9, 10, 11]

TinyEngine = Callable[..., Engine]


def calls_of_a_step(ops: str) -> dict[str, int]:
    layers = {verb: times * NUM_LAYERS for verb, times in LAYER_VERBS.items()}
    return {"embed": 1, **layers, **({"lm_head": 1, "sample": 1} if ops == "cpu" else {"next_tokens": 1})}


@pytest.fixture(params=["cpu", "torch"])
def ops(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_profile_times_every_verb_of_every_step(tiny_engine: TinyEngine, ops: str) -> None:
    profile = tiny_engine(ops=ops).profile(PROMPT, PARAMS)
    assert [step.kind for step in profile.steps] == ["prefill"] + ["decode"] * 4
    assert [(step.num_tokens, step.num_seqs) for step in profile.steps] == [(7, 1)] + [(1, 1)] * 4
    for step in profile.steps:
        assert {verb.verb: verb.num_calls for verb in step.verbs} == calls_of_a_step(ops)
        assert all(verb.seconds >= 0 for verb in step.verbs)
        assert sum(verb.seconds for verb in step.verbs) <= step.seconds


def test_profile_gives_the_answer_that_a_stream_gives(tiny_engine: TinyEngine, ops: str) -> None:
    engine = tiny_engine(ops=ops)
    (expected,) = engine.generate([PROMPT], PARAMS)
    profile = engine.profile(PROMPT, PARAMS)
    assert profile.completion.token_ids == expected.token_ids
    assert profile.completion.finish_reason == "length"


def test_profile_sees_the_chunks_of_a_prompt(tiny_engine: TinyEngine, ops: str) -> None:
    engine = tiny_engine(ops=ops, max_num_batched_tokens=3)
    assert [step.num_tokens for step in engine.profile(PROMPT, PARAMS).of_kind("prefill")] == [3, 3]


def test_profile_leaves_the_engine_as_it_was(tiny_engine: TinyEngine, ops: str) -> None:
    engine = tiny_engine(ops=ops)
    engine.profile(PROMPT, PARAMS)
    assert engine._runner._observer is None
    with pytest.raises(PromptTooLong):
        engine.profile([5] * 10_000, PARAMS)
    assert engine._runner._observer is None
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    assert stats.free_blocks + stats.cached_blocks == stats.total_blocks


def test_profile_of_a_closed_engine_is_refused(tiny_engine: TinyEngine) -> None:
    engine = tiny_engine()
    engine.close()
    with pytest.raises(EngineClosed):
        engine.profile(PROMPT, PARAMS)


def test_profile_prints_a_table_by_kind_of_step(tiny_engine: TinyEngine) -> None:
    text = str(tiny_engine().profile(PROMPT, PARAMS))
    assert re.search(r"^prefill: 1 steps of 7 tokens, median [\d.]+ ms$", text, re.MULTILINE)
    assert re.search(r"^decode: 4 steps of 1 tokens", text, re.MULTILINE)
    assert re.search(r"^  linear_add +6 x +[\d.]+ ms +\d+%$", text, re.MULTILINE)
    assert text.count("everything else") == 2


def test_profile_times_a_step_that_scores_its_prompt(tiny_engine: TinyEngine) -> None:
    profile = tiny_engine().profile(PROMPT, SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=1))
    prefill = profile.steps[0]
    assert {verb.verb: verb.num_calls for verb in prefill.verbs} == calls_of_a_step("torch")  # verb by verb


# The trace


def ranges(engine: Engine) -> Counter[str]:
    """Names of the ranges in a trace of one decode step."""
    with engine.stream(PROMPT, PARAMS) as stream:
        next(stream)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            next(stream)
    return Counter(event.name for event in profiler.events() if "::" not in event.name)


def test_trace_has_a_range_a_verb(tiny_engine: TinyEngine, ops: str) -> None:
    found = ranges(tiny_engine(ops=ops))
    expected = {**calls_of_a_step("torch")}
    assert {verb: found[verb] for verb in expected} == expected


def test_trace_changes_no_token(tiny_engine: TinyEngine, ops: str) -> None:
    engine = tiny_engine(ops=ops)
    (expected,) = engine.generate([PROMPT], PARAMS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        (traced,) = engine.generate([PROMPT], PARAMS)
    assert traced.token_ids == expected.token_ids


def test_no_range_is_opened_without_a_profiler(tiny_engine: TinyEngine, ops: str, monkeypatch: Any) -> None:
    engine = tiny_engine(ops=ops)
    assert trace_ranges() is None

    def refuse(*args: object) -> None:
        raise AssertionError("a verb was wrapped though nobody looks")

    monkeypatch.setattr(ObservedOps, "__init__", refuse)
    monkeypatch.setattr(StepObserver, "around", refuse)
    (answer,) = engine.generate([PROMPT], PARAMS)
    assert len(answer.token_ids) == 5


@pytest.mark.slow
def test_default_model_spends_its_steps_in_the_verbs(default_model: Path) -> None:
    with Engine(default_model, ops="cpu", num_threads=1, max_model_len=256, kv_cache_memory=2**26) as engine:
        profile = engine.profile("The capital of France is", SamplingParams(max_tokens=2, temperature=0.0))
    assert profile.completion.text.startswith(" Paris")
    assert {verb.verb: verb.num_calls for verb in profile.steps[-1].verbs} == {
        "embed": 1,
        "qkv_rope_store": 30,
        "attention": 30,
        "linear_add": 60,
        "gate_up_silu": 30,
        "lm_head": 1,
        "sample": 1,
    }
