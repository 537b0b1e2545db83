"""Engine: what a stream yields, when it ends, and what the engine counts."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from inferneo_core import Engine, SamplingParams, StepFailed, StreamMetrics, TokenOutput, stream_with_callback

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = [5, 80, 200, 13, 7]


def blocks_are_back(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.free_blocks + stats.cached_blocks == stats.total_blocks and stats.running == stats.waiting == 0


def test_stream_yields_one_output_a_token(tiny_engine: Any) -> None:
    engine = tiny_engine()
    outputs = list(engine.stream(PROMPT, GREEDY))
    assert [output.index for output in outputs] == list(range(12))
    assert [output.finish_reason for output in outputs] == [None] * 11 + ["length"]
    assert blocks_are_back(engine)


def test_stream_texts_join_to_the_completion(tiny_engine: Any) -> None:
    engine = tiny_engine()
    stream = engine.stream("Grüße, 世界 🌍", SamplingParams(max_tokens=100, temperature=1.0, seed=3, ignore_eos=True))
    outputs = list(stream)
    completion = stream.completion()
    assert "".join(output.text for output in outputs) == completion.text
    assert completion.text == engine.tokenizer.decode(completion.token_ids)
    assert tuple(output.token_id for output in outputs) == completion.token_ids
    assert completion.prompt_token_ids == tuple(engine.tokenizer.encode("Grüße, 世界 🌍"))


def test_stream_ends_with_an_empty_text_at_an_end_of_text_token(tiny_engine: Any) -> None:
    engine = tiny_engine()
    outputs = list(engine.stream(PROMPT, SamplingParams(max_tokens=9, temperature=0.0, logit_bias={257: 100.0})))
    assert [(output.text, output.token_id, output.finish_reason) for output in outputs] == [("", 257, "stop")]


def test_stream_runs_past_the_end_of_text_when_told(tiny_engine: Any) -> None:
    params = SamplingParams(max_tokens=3, temperature=0.0, logit_bias={257: 100.0}, ignore_eos=True)
    outputs = list(tiny_engine().stream(PROMPT, params))
    assert [output.token_id for output in outputs] == [257] * 3
    assert outputs[-1].finish_reason == "length"


def test_min_tokens_withholds_the_end_of_text(tiny_engine: Any) -> None:
    params = SamplingParams(max_tokens=9, temperature=0.0, logit_bias={257: 100.0}, min_tokens=4)
    outputs = list(tiny_engine().stream(PROMPT, params))
    assert len(outputs) == 5
    assert [output.token_id == 257 for output in outputs] == [False] * 4 + [True]


def test_stop_token_ids_end_the_stream(tiny_engine: Any) -> None:
    engine = tiny_engine()
    (free,) = engine.generate([PROMPT], GREEDY)
    stop_id = free.token_ids[4]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=[stop_id])
    (stopped,) = engine.generate([PROMPT], params)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop_id) + 1]


def test_stop_strings_cut_the_text_and_never_leak(tiny_engine: Any) -> None:
    engine = tiny_engine()
    bias = {i: -100.0 for i in range(263) if engine.tokenizer.token_bytes(i) not in (b"a", b"b", b"c")}
    params = SamplingParams(max_tokens=200, seed=5, logit_bias=bias)
    (free,) = engine.generate([PROMPT], params)
    assert set(free.text) == set("abc")
    for stop in (free.text[20:23], free.text[50:58], "zzz"):
        stopped = SamplingParams(max_tokens=200, seed=5, logit_bias=bias, stop=[stop, "abcabcabcx"])
        stream = engine.stream(PROMPT, stopped)
        outputs = list(stream)
        seen = ""
        for output in outputs:
            seen += output.text
            assert stop not in seen
        expected = free.text.split(stop)[0]
        assert seen == expected == stream.completion().text
        if stop == "zzz":
            assert outputs[-1].finish_reason == "length"
        else:
            assert outputs[-1].finish_reason == "stop"
            assert len(outputs) == len(expected) + len(stop)  # one output a token, up to the one that completed it
    assert blocks_are_back(engine)


def test_seed_fixes_the_draw_and_choice_tells_draws_apart(tiny_engine: Any) -> None:
    engine = tiny_engine()
    params = SamplingParams(max_tokens=30, seed=11, ignore_eos=True)
    first, again = engine.generate([PROMPT, PROMPT], params)
    assert first.token_ids == again.token_ids
    with engine.stream(PROMPT, params, choice=1) as stream:
        other = tuple(output.token_id for output in stream)
    assert other != first.token_ids
    fresh = engine.generate([PROMPT] * 2, SamplingParams(max_tokens=30, ignore_eos=True))
    assert fresh[0].token_ids != fresh[1].token_ids


def test_batch_mates_do_not_change_a_draw(tiny_engine: Any) -> None:
    engine = tiny_engine(max_num_batched_tokens=16)
    params = [SamplingParams(max_tokens=20, seed=i, ignore_eos=True, top_p=0.9, top_k=40) for i in range(9)]
    prompts = [[i + 1] * (3 * i + 1) for i in range(9)]
    alone = [engine.generate([prompt], one)[0].token_ids for prompt, one in zip(prompts, params, strict=True)]
    together = [completion.token_ids for completion in engine.generate(prompts, params)]
    assert alone == together


def test_logprobs_are_those_of_the_raw_logits(tiny_engine: Any) -> None:
    engine = tiny_engine()
    params = SamplingParams(max_tokens=6, temperature=0.7, seed=1, logprobs=3, repetition_penalty=1.3, ignore_eos=True)
    (completion,) = engine.generate([PROMPT], params)
    ids = PROMPT + list(completion.token_ids)
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=3, temperature=0.0)
    (scored,) = engine.generate([ids], scoring)
    assert completion.logprobs is not None and scored.prompt_logprobs is not None
    for ours, theirs in zip(completion.logprobs, scored.prompt_logprobs[len(PROMPT) :], strict=True):
        assert theirs is not None
        assert (ours.token_id, ours.rank) == (theirs.token_id, theirs.rank)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
        assert len(ours.top) == 3


def test_repetition_penalties_follow_the_generated_tokens(tiny_engine: Any) -> None:
    engine = tiny_engine()
    (plain,) = engine.generate([PROMPT], SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
    params = SamplingParams(
        max_tokens=60, temperature=0.0, ignore_eos=True, presence_penalty=2.0, frequency_penalty=2.0,
        logit_bias={1: 30.0, 2: 29.0, 3: 28.0},
    )  # fmt: skip
    (penalised,) = engine.generate([PROMPT], params)
    # 30, 29 and 28 lie so far above all else that greedy decoding walks between them as the penalties grow
    assert penalised.token_ids[:3] != (1, 1, 1)
    assert {1, 2, 3} <= set(penalised.token_ids[:6])
    assert plain.token_ids != penalised.token_ids


def test_eight_streams_take_few_forward_calls(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    calls = 0
    launch = type(engine._runner).launch

    def counted(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return launch(self, *args)

    monkeypatch.setattr(type(engine._runner), "launch", counted)
    streams = [engine.stream([i + 1] * 9, SamplingParams(max_tokens=32, seed=i, ignore_eos=True)) for i in range(8)]
    assert sum(len(list(stream)) for stream in streams) == 8 * 32
    assert calls <= engine.stats().steps <= 40


class Spy(TorchDispatchMode):
    """Notes the names of the operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_stream_reaches_the_compiled_sampler(tiny_engine: Any) -> None:
    engine = tiny_engine()
    engine._runner._tape = None  # verb by verb: on the tape the sampler is a node
    with Spy() as spy:
        assert len(list(engine.stream(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True)))) == 3
    assert spy.seen.count("inferneo.sample.default") == 3


def test_step_is_one_call_into_the_extension(tiny_engine: Any) -> None:
    engine = tiny_engine(max_num_batched_tokens=4)  # the prompt takes steps of its own, from which nothing is drawn
    params = SamplingParams(max_tokens=3, ignore_eos=True, top_p=0.9, repetition_penalty=1.1, logprobs=2, min_tokens=1)
    with Spy() as spy:
        assert len(list(engine.stream([*PROMPT, 7, 8, 9], params))) == 3
    calls = [name for name in spy.seen if name.startswith("inferneo.")]
    assert calls == ["inferneo.tape_step.default"] * engine.stats().steps
    assert len(calls) >= 4


def test_closing_frees_the_blocks(tiny_engine: Any) -> None:
    engine = tiny_engine()
    stream = engine.stream(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    stream.close()
    assert blocks_are_back(engine)
    assert list(stream) == []
    assert stream.finish_reason == "abort"
    assert stream.completion().finish_reason == "abort"
    assert len(stream.completion().token_ids) == 1
    assert engine.stats().aborts == 1


def test_dropping_a_stream_frees_the_blocks(tiny_engine: Any) -> None:
    engine = tiny_engine()
    for _ in engine.stream(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True)):
        break
    gc.collect()
    assert blocks_are_back(engine)


def test_callback_is_called_once_a_token_and_once_at_the_end(tiny_engine: Any) -> None:
    calls: list[Any] = []

    class Callback:
        def on_token(self, token: str) -> None:
            calls.append(token)

        def on_complete(self) -> None:
            calls.append(None)

    completion = stream_with_callback(tiny_engine(), PROMPT, Callback(), GREEDY)
    assert calls[-1] is None and None not in calls[:-1]
    assert len(calls) == 13
    assert "".join(calls[:-1]) == completion.text


def test_callback_that_returns_false_stops_the_stream(tiny_engine: Any) -> None:
    calls: list[Any] = []

    class Callback:
        def on_token(self, token: str) -> bool:
            calls.append(token)
            return len(calls) < 3

        def on_complete(self) -> None:
            calls.append(None)

    engine = tiny_engine()
    completion = stream_with_callback(engine, PROMPT, Callback(), GREEDY)
    assert len(calls) == 4 and calls[-1] is None
    assert completion.finish_reason == "abort"
    assert blocks_are_back(engine)


def test_callback_that_raises_aborts_and_propagates(tiny_engine: Any) -> None:
    class Callback:
        def on_token(self, token: str) -> None:
            raise LookupError("mine")

        def on_complete(self) -> None:
            raise AssertionError("never after an exception")

    engine = tiny_engine()
    with pytest.raises(LookupError, match="mine"):
        stream_with_callback(engine, PROMPT, Callback(), GREEDY)
    gc.collect()
    assert blocks_are_back(engine)


def test_metrics_count_what_was_streamed(tiny_engine: Any) -> None:
    metrics = StreamMetrics()
    assert metrics.get_metrics() is None
    metrics.start()
    stream_with_callback(tiny_engine(), PROMPT, metrics, GREEDY)
    measured = metrics.get_metrics()
    assert measured is not None
    assert measured["total_tokens"] == 12
    assert measured["total_time"] > 0
    assert measured["tokens_per_second"] == pytest.approx(12 / measured["total_time"])
    assert 0 < measured["interval_p50_ms"] <= measured["interval_p90_ms"] <= measured["interval_p99_ms"]
    assert 0 < measured["ttft_ms"] < measured["total_time"] * 1e3


def test_timings_add_up(tiny_engine: Any) -> None:
    outputs: list[TokenOutput] = list(tiny_engine().stream(PROMPT, GREEDY))
    last = outputs[-1].timings
    assert last.ttft_ms == pytest.approx(last.queued_ms + last.prefill_ms)
    assert last.tokens_per_s == pytest.approx(11 / last.decode_ms * 1e3)
    assert outputs[0].timings.decode_ms == 0.0
    assert last.cached_tokens == 0


def test_prefix_hits_are_counted(tiny_engine: Any) -> None:
    engine = tiny_engine(block_size=8)
    prompt = list(range(50))
    engine.generate([prompt], GREEDY)
    (second,) = engine.generate([prompt], GREEDY)
    assert second.timings.cached_tokens == 48
    stats = engine.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (100, 48)
    assert stats.prefix_hit_rate == pytest.approx(0.48)


def test_stats_count_tokens_and_steps(tiny_engine: Any) -> None:
    engine = tiny_engine()
    engine.generate([PROMPT, PROMPT[:2]], GREEDY)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.steps) == (7, 24, 12)
    assert stats.tokens_per_s > 0


def test_paused_stream_yields_to_others_and_resumes_when_read(tiny_engine: Any) -> None:
    engine = tiny_engine()
    (expected,) = engine.generate([PROMPT], GREEDY)
    slow = engine.stream(PROMPT, GREEDY)
    tokens = [next(slow).token_id for _ in range(3)]
    slow.pause()
    assert len(list(engine.stream(PROMPT[::-1], GREEDY))) == 12
    assert engine.stats().waiting == 1
    tokens += [output.token_id for output in slow]
    assert tuple(tokens) == expected.token_ids
    assert blocks_are_back(engine)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_decoder_text_equals_decode_for_random_streams(data: st.DataObject, shared_engine: Engine) -> None:
    prompt = data.draw(st.lists(st.integers(0, 257), min_size=1, max_size=40))
    params = SamplingParams(
        max_tokens=data.draw(st.integers(1, 40)),
        seed=data.draw(st.integers(0, 2**63)),
        temperature=data.draw(st.sampled_from([0.0, 1.0, 3.0])),
        top_k=data.draw(st.integers(0, 5)),
        ignore_eos=data.draw(st.booleans()),
    )
    stream = shared_engine.stream(prompt, params)
    outputs = list(stream)
    text = "".join(output.text for output in outputs)
    assert text == shared_engine.tokenizer.decode([output.token_id for output in outputs])
    assert text == stream.completion().text
    assert blocks_are_back(shared_engine)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_engine_runs_in_each_dtype(dtype: str, tiny_model: Any, tiny_engine: Any) -> None:
    stored = getattr(torch, dtype)
    engine = tiny_engine(tiny_model(dtype=stored))
    assert engine._runner.cache.layers[0].k.dtype == stored
    (completion,) = engine.generate([PROMPT], GREEDY)
    assert len(completion.token_ids) == 12


def test_stream_without_a_drawable_token_fails_alone(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    (expected,) = engine.generate([PROMPT], GREEDY)
    engine._runner._tape = None  # verb by verb
    ops = engine._runner.ops
    lm_head = ops.lm_head

    def broken(x: torch.Tensor, norm: Any, w_head: Any) -> torch.Tensor:
        logits = lm_head(x, norm, w_head).clone()
        if len(logits) == 2:
            logits[0, 5] = float("nan")
        return logits

    monkeypatch.setattr(ops, "lm_head", broken)
    first, second = engine.stream(PROMPT, GREEDY), engine.stream(PROMPT, GREEDY)
    tokens = [output.token_id for output in second]
    with pytest.raises(StepFailed, match=r"position 5.*NaN"):
        list(first)
    assert tuple(tokens) == expected.token_ids
    assert blocks_are_back(engine)
