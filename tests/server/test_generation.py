"""Generation: requests through an engine, as streams and whole, one answer or several."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from inferneo_core import SamplingParams

MESSAGES = [{"role": "user", "content": "Tell me"}]
LONG = "All happy families are alike; each unhappy family is unhappy in its own way. " * 2
FIXED = {"seed": 3, "ignore_eos": True, "max_tokens": 9}


def alone(engine: Any, run: Any, prompt: Any, *, choice: int = 0, **fields: Any) -> list[Any]:
    """The outputs that the engine gives by itself."""

    async def main() -> list[Any]:
        return [output async for output in engine.stream(prompt, SamplingParams(**fields), choice=choice)]

    outputs: list[Any] = run(main())
    return outputs


# One code path


def test_stream_has_one_chunk_a_token_and_the_texts_of_the_engine(async_engine, collect, run, texts):
    engine = async_engine()
    expected = [output.text for output in alone(engine, run, MESSAGES, **FIXED)]
    for transport in ("sse", "websocket"):
        chunks = collect(engine, transport, FIXED)
        assert texts(chunks) == expected
        assert len(chunks) == 1 + 9 + 1
        assert chunks[-1]["choices"][0]["delta"] == {}
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    chunks = collect(engine, "sse", {"prompt": "Tell me", **FIXED})
    assert texts(chunks) == [output.text for output in alone(engine, run, "Tell me", **FIXED)]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 8 + ["length"]


@pytest.mark.parametrize("fields", [{}, {"prompt": "Tell me"}, {"prompt": [5, 6, 7]}])
def test_whole_answer_is_the_stream_joined(fields, async_engine, collect, texts):
    engine = async_engine()
    stream = collect(engine, "sse", {**fields, **FIXED, "stream_options": {"include_usage": True}})
    answer = collect(engine, "http", {**fields, **FIXED})
    (choice,) = answer["choices"]
    assert (choice["text"] if "text" in choice else choice["message"]["content"]) == "".join(texts(stream[:-1]))
    assert choice["finish_reason"] == "length"
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert answer["usage"][name] == stream[-1]["usage"][name]


def test_end_of_text_is_a_chunk_with_empty_text(async_engine, collect, texts):
    fields = {"logit_bias": {"257": 100}, "min_tokens": 2, "max_tokens": 50, "temperature": 0}
    options = {"stream_options": {"include_usage": True}}
    engine = async_engine()
    chunks = collect(engine, "sse", {**fields, **options})
    usage = chunks.pop()["usage"]
    assert len(texts(chunks)) == usage["completion_tokens"] == 3
    assert texts(chunks)[-1] == ""
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    completions = collect(engine, "sse", {"prompt": "x", **fields})
    assert len(texts(completions)) == 3
    assert completions[-1]["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}


def test_text_held_back_for_a_stop_string_still_has_a_chunk_a_token(async_engine, collect, run, texts):
    engine = async_engine()
    whole = "".join(output.text for output in alone(engine, run, "Tell me", seed=3, max_tokens=9, ignore_eos=True))
    stop = next(pair for pair in itertools.starmap(str.__add__, itertools.pairwise(whole)) if "\ufffd" not in pair)
    chunks = collect(engine, "sse", {"prompt": "Tell me", **FIXED, "stop": stop})
    assert "".join(texts(chunks)) == whole[: whole.index(stop)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_usage_counts_the_prompt_once_and_every_token(async_engine, collect):
    answer = collect(async_engine(), "http", {"prompt": [[1, 2, 3], [4, 5]], "n": 2, **FIXED})
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 4 * 9
    assert answer["usage"]["total_tokens"] == 41
    assert answer["timings"]["ttft_ms"] > 0


def test_usage_tells_what_the_prefix_cache_held(async_engine, collect):
    engine = async_engine()
    first, second = (collect(engine, "http", {"prompt": LONG, **FIXED}) for _ in range(2))
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": len(LONG) // 16 * 16}


# Several answers


def test_each_choice_is_drawn_with_its_own_counter(async_engine, collect, run, texts):
    engine = async_engine()
    for prompt in ("short", LONG):
        expected = [[o.text for o in alone(engine, run, prompt, choice=choice, **FIXED)] for choice in range(3)]
        chunks = collect(engine, "sse", {"prompt": prompt, "n": 3, **FIXED})
        assert [texts(chunks, index) for index in range(3)] == expected
        answer = collect(engine, "http", {"prompt": prompt, "n": 3, **FIXED})
        assert [choice["text"] for choice in answer["choices"]] == ["".join(part) for part in expected]
    assert len({tuple(part) for part in expected}) == 3


def test_choices_share_the_blocks_of_their_prompt(async_engine, collect):
    engine = async_engine()
    collect(engine, "http", {"prompt": LONG, "n": 4, **FIXED})
    stats = engine.stats()
    assert stats.prefix_query_tokens == 4 * len(LONG)
    assert stats.prefix_hit_tokens == 3 * (len(LONG) // 16 * 16)


def test_without_a_prefix_cache_choices_start_together(async_engine, collect, texts):
    engine = async_engine(enable_prefix_caching=False)
    chunks = collect(engine, "sse", {"prompt": LONG, "n": 3, **FIXED})
    assert [len(texts(chunks, index)) for index in range(3)] == [9] * 3


def test_prompts_of_a_list_are_answered_as_each_alone(async_engine, collect):
    engine = async_engine()
    answer = collect(engine, "http", {"prompt": [LONG, "b"], "n": 2, **FIXED})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    alone = [collect(engine, "http", {"prompt": prompt, "n": 2, **FIXED})["choices"] for prompt in (LONG, "b")]
    assert [c["text"] for c in answer["choices"]] == [c["text"] for choices in alone for c in choices]


def test_every_choice_of_a_chat_has_a_role_and_an_end(async_engine, collect):
    chunks = collect(async_engine(), "sse", {"n": 2, **FIXED})
    for index in range(2):
        entries = [entry for chunk in chunks for entry in chunk["choices"] if entry["index"] == index]
        assert entries[0]["delta"] == {"role": "assistant", "content": None}
        assert [entry["finish_reason"] for entry in entries] == [None] * 10 + ["length"]


# Scores


@pytest.mark.parametrize("prompt", ["Hi there", LONG, [40, 41, 42]])
def test_echo_with_scores_is_the_same_as_stream_and_whole_for_every_choice(prompt, async_engine, collect, run):
    engine = async_engine()
    fields = {"prompt": prompt, "echo": True, "logprobs": 2, "n": 3, **FIXED}
    (expected,) = run(engine.generate([prompt], SamplingParams(**FIXED, logprobs=2, prompt_logprobs=2)))
    text = prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt)
    answer, chunks = collect(engine, "http", fields), collect(engine, "sse", fields)
    scores = [one and one.logprob for one in (*expected.prompt_logprobs, *expected.logprobs)]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == scores
    for choice in answer["choices"]:
        entries = [entry for chunk in chunks for entry in chunk["choices"] if entry["index"] == choice["index"]]
        assert choice["text"].startswith(text)
        assert "".join(entry["text"] for entry in entries) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for entry in entries for value in entry["logprobs"][name]] == values, name
            assert len(values) == len(expected.prompt_token_ids) + 9


def test_chat_scores_are_the_same_as_stream_and_whole(async_engine, collect, run):
    engine = async_engine()
    fields = {"logprobs": True, "top_logprobs": 3, **FIXED}
    (choice,) = collect(engine, "http", fields)["choices"]
    entries = [chunk["choices"][0]["logprobs"] for chunk in collect(engine, "sse", fields)]
    content = [one for entry in entries if entry is not None for one in entry["content"]]
    assert content == choice["logprobs"]["content"]
    (expected,) = run(engine.generate([MESSAGES], SamplingParams(**FIXED, logprobs=3)))
    assert [one["logprob"] for one in content] == [one.logprob for one in expected.logprobs]
    assert {len(one["top_logprobs"]) for one in content} == {3}


@pytest.mark.parametrize("fields", [{}, {"prompt": LONG}])
def test_prompt_logprobs_come_with_a_whole_answer(fields, async_engine, collect, run):
    engine = async_engine()
    answer = collect(engine, "http", {**fields, **FIXED, "n": 2, "prompt_logprobs": 1})
    (expected,) = run(engine.generate([fields.get("prompt", MESSAGES)], SamplingParams(**FIXED, prompt_logprobs=1)))
    for holder in answer["choices"] if fields else [answer]:
        first, *rest = holder["prompt_logprobs"]
        assert first is None
        for shown, score in zip(rest, expected.prompt_logprobs[1:], strict=True):
            assert shown[str(score.token_id)]["logprob"] == score.logprob
            assert len(shown) in (1, 2)


def test_websocket_omits_nulls_and_every_chunk_has_a_choice(async_engine, collect):
    fields = {**FIXED, "n": 2, "request_id": "mine", "stream_options": {"include_usage": True}}
    chunks = collect(async_engine(), "websocket", fields)
    assert all(len(chunk["choices"]) == 1 and chunk["request_id"] == "mine" for chunk in chunks)
    assert "null" not in json.dumps(chunks)
    assert [index for index, chunk in enumerate(chunks) if "usage" in chunk] == [len(chunks) - 1]
    assert chunks[-1]["usage"]["completion_tokens"] == 18
