"""Bursts: several decode steps in one call. Streams see the tokens, the ends and the errors of single steps."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from inferneo_core import (
    AsyncEngine,
    Completion,
    Engine,
    SamplingParams,
    StepFailed,
    TokenStream,
    cpu_graph,
    stream_with_callback,
)
from inferneo_core.cpu_graph import MAX_BURST
from inferneo_core.runner import Pending
from inferneo_core.scheduler import ScheduledBatch
from inferneo_core.stream_decoder import StreamDecoder

PROMPT = [5, 80, 200, 13, 7]
PROMPTS = [PROMPT, list(range(40, 140)), [1], [9, 9, 8, 7] * 6]
SAMPLED = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """single(call, *args): what the call returns while no engine makes bursts."""

    def run(call: Callable[..., Any], *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(cpu_graph, "MAX_BURST", 1)
            return call(*args)

    return run


def tokens(stream: TokenStream) -> list[int]:
    return [output.token_id for output in stream]


def read(stream: TokenStream) -> tuple[list[int], BaseException | None]:
    """A stream's tokens, and the error that its reading ends with."""
    got: list[int] = []
    try:
        for output in stream:
            got.append(output.token_id)
    except (StepFailed, KeyboardInterrupt) as error:
        return got, error
    return got, None


def answers(engine: Engine, params: list[SamplingParams]) -> list[Any]:
    completions = engine.generate(PROMPTS, params)
    return [(completion.token_ids, completion.text, completion.finish_reason) for completion in completions]


@pytest.mark.parametrize("arguments", [{}, {"block_size": 3}, {"max_num_seqs": 2}, {"num_threads": 2}], ids=str)
@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.0}, {"seed": 5}, {"seed": 5, "top_p": 0.9, "top_k": 30}, {"seed": 5, "logit_bias": {7: 4.0}}],
    ids=str,
)
def test_tokens_are_those_of_single_steps(
    sampling: dict[str, Any], arguments: dict[str, Any], tiny_engine: Any, single: Any
) -> None:
    """Sequences that end at different places: by length, by a stop token, by a stop string."""
    ends = [{"max_tokens": 41}, {"max_tokens": 22}, {"max_tokens": 7}, {"max_tokens": 33}]
    params = [SamplingParams(ignore_eos=True, **sampling, **end) for end in ends]
    (long, _, finish_reason), *_ = single(answers, tiny_engine(**arguments), params)
    assert len(long) == 41 and finish_reason == "length"
    params[0] = SamplingParams(ignore_eos=True, **sampling, max_tokens=41, stop_token_ids=[long[17]])
    plain, bursting = tiny_engine(**arguments), tiny_engine(**arguments)
    assert answers(bursting, params) == single(answers, plain, params)
    assert bursting.stats().generated_tokens == plain.stats().generated_tokens
    assert bursting.stats().cached_blocks == plain.stats().cached_blocks


def test_steps_that_need_the_host_stand_between_bursts(tiny_engine: Any, single: Any) -> None:
    """min_tokens, penalties and log-probabilities beside streams without; they come and go."""
    others: list[dict[str, Any]] = [
        {"min_tokens": 9, "prompt_logprobs": 1},
        {"repetition_penalty": 1.3, "max_tokens": 6},
        {"logprobs": 2, "max_tokens": 11},
    ]
    params = [SamplingParams(**{"max_tokens": 30, "seed": 2, **other}) for other in ({"ignore_eos": True}, *others)]

    def run(engine: Engine) -> list[Any]:
        completions = engine.generate(PROMPTS, params)
        return [(answer.token_ids, answer.logprobs, answer.prompt_logprobs) for answer in completions]

    assert run(tiny_engine()) == single(run, tiny_engine())


def test_prompt_logprobs_are_followed_by_bursts(tiny_engine: Any, single: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=9, seed=1, ignore_eos=True, prompt_logprobs=1)
    (expected,) = single(tiny_engine().generate, [PROMPT], params)
    engine = tiny_engine()
    sizes: list[int] = []
    launch = engine._runner.launch

    def watched(batch: ScheduledBatch) -> Pending:
        sizes.append(batch.num_steps)
        return launch(batch)

    monkeypatch.setattr(engine._runner, "launch", watched)
    (answer,) = engine.generate([PROMPT], params)
    assert (answer.token_ids, answer.prompt_logprobs) == (expected.token_ids, expected.prompt_logprobs)
    assert sizes == [1, 4, 4]


def test_every_token_is_one_output_in_order(tiny_engine: Any, single: Any) -> None:
    engine = tiny_engine()
    first, second = engine.stream(PROMPT, SAMPLED), engine.stream(PROMPTS[3], SAMPLED)
    outputs = list(first)
    assert [output.index for output in outputs] == list(range(20))
    assert [output.finish_reason for output in outputs] == [None] * 19 + ["length"]
    assert [output.token_id for output in outputs] == single(lambda: tokens(tiny_engine().stream(PROMPT, SAMPLED)))
    assert "".join(output.text for output in outputs) == first.completion().text
    assert [output.index for output in second] == list(range(20))


def test_stop_string_ends_a_stream_in_the_middle_of_a_burst(watched_engine: Any, single: Any) -> None:
    engine = watched_engine()
    whole = single(lambda: engine.generate([PROMPT], GREEDY))[0]
    for cut in range(3, 8):
        stop = engine.tokenizer.decode(whole.token_ids[cut - 2 : cut])
        if not stop:
            continue
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, stop=[stop])
        expected, got = (run(engine.generate, [PROMPT], params)[0] for run in (single, lambda f, *a: f(*a)))
        assert (got.text, got.token_ids, got.finish_reason) == (expected.text, expected.token_ids, "stop")


def test_tokens_past_an_end_are_not_in_the_prefix_cache(watched_engine: Any, single: Any) -> None:
    engine = watched_engine(block_size=2)
    whole = single(lambda: tokens(watched_engine().stream(PROMPT, GREEDY)))
    stopping = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, stop_token_ids=[whole[1]])
    ended = tokens(engine.stream(PROMPT, stopping))
    assert len(ended) == whole.index(whole[1]) + 1
    engine.generate([[*PROMPT, *whole, 3]], SamplingParams(max_tokens=1, seed=1))
    # All that was accepted but the last token, whose key and value nobody needed, in whole blocks.
    assert engine.stats().prefix_hit_tokens == (len(PROMPT) + len(ended) - 1) // 2 * 2


@pytest.mark.parametrize("place", range(1, 6))
def test_nan_in_a_burst_fails_its_stream_alone(place: int, tiny_model: Any, tiny_engine: Any, tmp_path: Path) -> None:
    """The token drawn at `place` has an embedding of NaN; the burst goes on for the other stream."""
    short = SamplingParams(max_tokens=7, seed=8, ignore_eos=True)
    expected, other = tokens(tiny_engine().stream(PROMPT, SAMPLED)), tokens(tiny_engine().stream([1], short))
    poison = expected[place]
    assert poison not in [*PROMPT, *expected[:place], *other]
    shutil.copytree(tiny_model(), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][poison] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = tiny_engine(tmp_path)
    failing, healthy = engine.stream(PROMPT, SAMPLED), engine.stream([1], short)
    got, error = read(failing)
    assert got == expected[: place + 1]
    assert isinstance(error, StepFailed)
    assert f"no token can be drawn at position {len(PROMPT) + place + 1}: the logits hold a NaN" in str(error)
    assert read(healthy) == (other, None)
    stats = engine.stats()
    assert stats.aborts == 1 and stats.free_blocks + stats.cached_blocks == stats.total_blocks


def test_request_that_comes_during_a_burst_is_admitted_right_after_it(tiny_engine: Any) -> None:
    engine = tiny_engine()
    stream = engine.stream(PROMPT, SAMPLED)
    next(stream), next(stream)
    assert stream.num_unread == MAX_BURST - 1
    late = engine.stream(PROMPTS[2], SAMPLED)
    steps = engine.stats().steps
    assert next(late).index == 0
    assert engine.stats().steps == steps + 1
    assert stream.num_unread == MAX_BURST  # served by the same step


def test_pause_and_close_hold_after_a_burst(watched_engine: Any) -> None:
    engine = watched_engine()
    stream, other = engine.stream(PROMPT, SAMPLED), engine.stream(PROMPTS[2], SAMPLED)
    next(stream), next(stream)
    stream.pause()
    for _ in range(5):
        engine.step()
    assert stream.num_unread == MAX_BURST - 1
    stream.close()
    assert len(tokens(other)) == 20
    assert len(stream.completion().token_ids) == 2


def test_answer_that_nobody_reads_is_whole(tiny_engine: Any) -> None:
    engine = tiny_engine()
    stream = engine.stream(PROMPT, SAMPLED)
    while engine.step():
        pass
    assert stream.num_unread == len(stream.completion().token_ids) == SAMPLED.max_tokens
    assert stream.completion().finish_reason == "length"


def test_callback_that_stops_gets_the_answer_that_it_was_handed(tiny_engine: Any, single: Any) -> None:
    class Three:
        def __init__(self) -> None:
            self.texts: list[str] = []

        def on_token(self, token: str) -> bool:
            self.texts.append(token)
            return len(self.texts) < 3

        def on_complete(self) -> None:
            pass

    callback, plain = Three(), Three()
    completion = stream_with_callback(tiny_engine(), PROMPT, callback, SAMPLED)
    expected = single(stream_with_callback, tiny_engine(), PROMPT, plain, SAMPLED)
    assert len(completion.token_ids) == 3 and completion.finish_reason == "abort"
    assert completion.token_ids == expected.token_ids
    assert completion.text == expected.text == "".join(callback.texts)


def interrupt_after(engine: Engine, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """As a signal that arrives while a call of the tape runs: Python sees it once the call has returned."""
    graph, calls = engine._runner._tape, []
    for name in ("_step", "_again"):
        original = getattr(graph, name)

        def interrupted(*args: Any, original: Any = original) -> Any:
            result = original(*args)
            calls.append(result)
            if len(calls) == call:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(graph, name, interrupted)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_interrupt_in_a_burst_leaves_the_streams_whole(
    call: int, watched_engine: Any, monkeypatch: pytest.MonkeyPatch, single: Any
) -> None:
    engine = watched_engine(block_size=4)
    streams = [engine.stream(prompt, SAMPLED) for prompt in (PROMPT, [1])]
    interrupt_after(engine, monkeypatch, call)
    got: list[int] = []
    interrupts = 0
    while len(got) < 20:
        try:
            got.append(next(streams[0]).token_id)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1
    expected = [single(tokens, watched_engine().stream(prompt, SAMPLED)) for prompt in (PROMPT, [1])]
    assert [got, tokens(streams[1])] == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LookupError("mine")], ids=["interrupt", "error"])
def test_failure_between_the_tokens_of_a_burst_loses_none_in_silence(
    error: BaseException, watched_engine: Any, monkeypatch: pytest.MonkeyPatch, single: Any
) -> None:
    engine = watched_engine()
    expected = single(tokens, engine.stream(PROMPT, SAMPLED))
    push, calls = StreamDecoder.push, []

    def failing(self: StreamDecoder, token_id: int) -> str:
        calls.append(token_id)
        if len(calls) == 4:
            raise error
        return push(self, token_id)

    monkeypatch.setattr(StreamDecoder, "push", failing)
    stream = engine.stream(PROMPT, SAMPLED)
    got, raised = read(stream)
    if raised is error:
        rest, raised = read(stream)
        got += rest
    assert isinstance(raised, StepFailed)
    assert got == expected[:3]


def test_profile_splits_a_burst_into_its_steps(tiny_engine: Any) -> None:
    engine = tiny_engine()
    profile = engine.profile(PROMPT, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
    decodes = profile.of_kind("decode")
    assert len(decodes) == 11 == engine.stats().steps - 1
    for step in decodes:
        assert {verb.verb: verb.num_calls for verb in step.verbs}["attention"] == 3
        assert 0 < sum(verb.seconds for verb in step.verbs) <= step.seconds


def test_async_streams_get_the_tokens_of_single_steps(tiny_model: Any, tiny_engine: Any, single: Any) -> None:
    async def main() -> list[Completion]:
        async with AsyncEngine(tiny_model(), kv_cache_memory=8 * 2**20, num_threads=1) as engine:
            return await engine.generate(PROMPTS, SAMPLED)

    expected = single(lambda: tiny_engine().generate(PROMPTS, SAMPLED))
    assert [answer.token_ids for answer in asyncio.run(main())] == [answer.token_ids for answer in expected]


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_default_model_draws_the_tokens_of_single_steps(
    params: SamplingParams, default_model: Path, single: Any
) -> None:
    def run() -> list[Any]:
        with Engine(default_model, kv_cache_memory=2**26, max_model_len=512) as engine:
            prompts = [list(range(1000, 1000 + length)) for length in (1, 5, 33)]
            return [answer.token_ids for answer in engine.generate(prompts, params)]

    assert run() == single(run)
