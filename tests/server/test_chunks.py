"""The JSON of chunks and answers: shapes, nulls, log-probabilities, echo. The shapes are checked by the openai SDK."""

from __future__ import annotations

import math
from typing import Any

import pytest
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tokenizers import Tokenizer as HubTokenizer, decoders, models

from inferneo.server.chunks import ChatWriter, CompletionWriter, EncodedPrompt, Envelope, Usage, omit_nulls
from inferneo.server.logprobs import Scored, TextOffsets, chat_logprobs, completion_logprobs, prompt_logprobs
from inferneo.server.requests import Plan
from inferneo_core import Completion, Logprob, SamplingParams, Timings, Tokenizer, TokenOutput
from inferneo_core.stream_decoder import StreamDecoder

TIMINGS = Timings(queued_ms=1.0, prefill_ms=2.0, ttft_ms=3.0, decode_ms=4.0, tokens_per_s=5.0, cached_tokens=0)
USAGE = Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=4)
A, B, C, D = range(32, 36)  # of the tiny model, whose tokens are bytes


@pytest.fixture(scope="session")
def tokenizer(chat_model):
    return Tokenizer.from_directory(chat_model)


@pytest.fixture(scope="session")
def space_stripping_tokenizer(tmp_path_factory):
    """A tokenizer in SentencePiece's manner: "▁" is a space, and decoding drops the first."""
    backend = HubTokenizer(models.BPE(vocab={"▁a": 0, "▁b": 1, "c": 2, "<unk>": 3}, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    directory = tmp_path_factory.mktemp("sp")
    backend.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text('{"vocab_size": 4}')
    return Tokenizer.from_directory(directory)


def make_plan(**fields: Any) -> Plan:
    defaults = {
        "is_chat": True,
        "model": "tiny",
        "request_id": None,
        "prompts": ("x",),
        "params": SamplingParams(),
        "num_choices": 1,
        "echo": False,
        "num_prompt_logprobs": None,
        "include_usage": False,
        "continuous_usage": False,
    }
    return Plan(**{**defaults, **fields})


def output(token_id: int, text: str, *, index: int = 0, finish_reason: Any = None, logprob: Any = None) -> TokenOutput:
    top = None if logprob is None else ((token_id, logprob), (7, -9.0))
    return TokenOutput(text, token_id, index, logprob, top, finish_reason, TIMINGS)


def completion(token_ids: list[int], text: str, logprobs: Any = None) -> Completion:
    return Completion(text, tuple(token_ids), "length", logprobs, (1, 2), None, TIMINGS)


PROMPT = EncodedPrompt([1, 2], "")


# Shapes and nulls


def test_chat_begins_with_a_role_without_content_and_ends_with_an_empty_delta(tokenizer):
    writer = ChatWriter(2, make_plan(), tokenizer)
    first = writer.write(output(A, "A"), PROMPT)
    last = writer.write(output(257, "", index=1, finish_reason="stop"), PROMPT)
    base = {"index": 2, "logprobs": None, "finish_reason": None}
    assert first == [
        {**base, "delta": {"role": "assistant", "content": None}},
        {**base, "delta": {"content": "A"}},
    ]
    assert last == [{**base, "delta": {"content": ""}}, {**base, "delta": {}, "finish_reason": "stop"}]


def test_completion_has_the_finish_reason_on_its_last_token(tokenizer):
    writer = CompletionWriter(0, make_plan(is_chat=False), tokenizer)
    entries = writer.write(output(A, "A", finish_reason="length"), PROMPT)
    assert entries == [{"index": 0, "text": "A", "logprobs": None, "finish_reason": "length"}]


@pytest.mark.parametrize("is_chat", [True, False])
def test_chunks_and_answers_are_what_the_sdk_reads(is_chat, tokenizer):
    plan = make_plan(is_chat=is_chat, params=SamplingParams(logprobs=1), include_usage=True, request_id="mine")
    envelope = Envelope(plan, is_stream=True, omits_nulls=False)
    writer = (ChatWriter if is_chat else CompletionWriter)(0, plan, tokenizer)
    entries = writer.write(output(A, "A", finish_reason="length", logprob=-0.5), PROMPT)
    chunks = [envelope.chunk(entry, None) for entry in entries]
    envelope.end(chunks, USAGE, TIMINGS)
    assert [len(chunk["choices"]) for chunk in chunks] == [1] * len(entries) + [0]
    assert all(chunk["id"] == envelope.id and chunk["request_id"] == "mine" for chunk in chunks)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * len(entries)
    chunk_type = ChatCompletionChunk if is_chat else OpenAICompletion
    for chunk in chunks:
        chunk_type.model_validate(chunk, strict=True)
    entry = writer.whole(completion([A], "A", (Logprob(A, -0.5, 1, ((A, -0.5),)),)), PROMPT)
    answer = Envelope(plan, is_stream=False, omits_nulls=False).whole([entry], USAGE, TIMINGS)
    read = (ChatCompletion if is_chat else OpenAICompletion).model_validate(answer, strict=True)
    assert read.usage is not None and read.usage.prompt_tokens_details is not None
    assert (read.usage.total_tokens, read.usage.prompt_tokens_details.cached_tokens) == (7, 2)
    assert answer["timings"]["ttft_ms"] == 3.0


def test_without_include_usage_no_chunk_speaks_of_it(tokenizer):
    envelope = Envelope(make_plan(), is_stream=True, omits_nulls=False)
    chunks = [envelope.chunk({"index": 0}, None)]
    envelope.end(chunks, USAGE, TIMINGS)
    assert len(chunks) == 1 and "usage" not in chunks[0]


def test_where_nulls_are_omitted_the_usage_comes_with_the_last_choice():
    envelope = Envelope(make_plan(include_usage=True), is_stream=True, omits_nulls=True)
    delta = {"role": "assistant", "content": None}
    chunks = [envelope.chunk({"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}, None)]
    assert chunks[0]["choices"] == [{"index": 0, "delta": {"role": "assistant"}}]
    assert "usage" not in chunks[0]
    envelope.end(chunks, USAGE, TIMINGS)
    assert len(chunks) == 1 and chunks[0]["usage"]["completion_tokens"] == 4


def test_continuous_usage_is_in_every_chunk():
    envelope = Envelope(make_plan(continuous_usage=True), is_stream=True, omits_nulls=False)
    assert envelope.chunk({}, USAGE)["usage"] == USAGE.to_json()


def test_nulls_are_omitted_from_objects_and_kept_in_lists():
    value = {"a": None, "b": [None, {"c": None, "d": 0}], "e": {"f": None}, "g": ""}
    assert omit_nulls(value) == {"b": [None, {"d": 0}], "e": {}, "g": ""}


# Log-probabilities


def test_chat_logprobs_show_text_bytes_and_the_most_likely(tokenizer):
    half = tokenizer.encode("🌍")[0]
    shown = chat_logprobs([Scored(A, -0.5, ((B, -0.1), (half, -2.0)))], tokenizer)
    (entry,) = shown["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("A", -0.5, [65])
    assert [(top["token"], top["bytes"]) for top in entry["top_logprobs"]] == [("B", [66]), ("\ufffd", [240])]


def test_special_token_is_shown_by_its_name(tokenizer):
    (entry,) = chat_logprobs([Scored(257, -0.5, ())], tokenizer)["content"]
    assert (entry["token"], entry["bytes"]) == ("</s>", list(b"</s>"))


def test_impossible_token_has_a_finite_logprob(tokenizer):
    (entry,) = chat_logprobs([Scored(A, -math.inf, ())], tokenizer)["content"]
    assert entry["logprob"] == -9999.0


def test_completion_logprobs_are_lists_with_the_chosen_token_among_the_top(tokenizer):
    scored = [Scored(A, None, ()), Scored(B, -3.0, ((C, -0.2), (D, -0.4))), Scored(C, -0.1, ((C, -0.1),))]
    shown = completion_logprobs(scored, TextOffsets(tokenizer), tokenizer, has_top=True)
    assert shown == {
        "tokens": ["A", "B", "C"],
        "token_logprobs": [None, -3.0, -0.1],
        "top_logprobs": [None, {"C": -0.2, "D": -0.4, "B": -3.0}, {"C": -0.1}],
        "text_offset": [0, 1, 2],
    }
    assert completion_logprobs(scored, TextOffsets(tokenizer), tokenizer, has_top=False)["top_logprobs"] is None


def test_of_two_tokens_that_read_alike_the_likelier_is_shown(tokenizer):
    first, second = tokenizer.encode("🌍")[:2]
    scored = [Scored(second, -3.0, ((first, -0.2), (second, -3.0)))]
    shown = completion_logprobs(scored, TextOffsets(tokenizer), tokenizer, has_top=True)
    assert shown["top_logprobs"] == [{"\ufffd": -0.2}]


def test_text_offsets_count_whole_characters(tokenizer):
    offsets = TextOffsets(tokenizer)
    token_ids = [*tokenizer.encode("é🌍!"), 257, A]
    assert [offsets.push(token_id) for token_id in token_ids] == [0, 0, 1, 1, 1, 1, 2, 3, 3]


def test_prompt_logprobs_are_shaped_as_in_vllm(tokenizer):
    shown = prompt_logprobs([None, Logprob(B, -2.0, 5, ((C, -0.1), (D, -0.2)))], 1, tokenizer)
    assert shown == [
        None,
        {
            str(C): {"logprob": -0.1, "rank": 1, "decoded_token": "C"},
            str(B): {"logprob": -2.0, "rank": 5, "decoded_token": "B"},
        },
    ]


# Echo


def test_echo_comes_before_the_first_token_with_the_scores_of_the_prompt(tokenizer):
    plan = make_plan(is_chat=False, echo=True, params=SamplingParams(logprobs=1, prompt_logprobs=1))
    prompt = EncodedPrompt([72, 105], "Hi", (None, Logprob(105, -1.0, 2, ((72, -0.5),))))
    writer = CompletionWriter(0, plan, tokenizer)
    echo, first = writer.write(output(A, "A", logprob=-0.5), prompt)
    (second,) = writer.write(output(B, "B", index=1, logprob=-0.5, finish_reason="length"), prompt)
    assert (echo["text"], first["text"], second["text"]) == ("Hi", "A", "B")
    assert echo["logprobs"]["token_logprobs"] == [None, -1.0]
    assert [entry["logprobs"]["text_offset"] for entry in (echo, first, second)] == [[0, 1], [2], [3]]
    logprobs = (Logprob(A, -0.5, 1, ((A, -0.5), (7, -9.0))), Logprob(B, -0.5, 1, ((B, -0.5), (7, -9.0))))
    whole = CompletionWriter(0, plan, tokenizer).whole(completion([A, B], "AB", logprobs), prompt)
    assert whole["text"] == "HiAB"
    for name, parts in whole["logprobs"].items():
        assert parts == echo["logprobs"][name] + first["logprobs"][name] + second["logprobs"][name], name


def test_echo_keeps_the_space_that_decoding_strips(space_stripping_tokenizer):
    tokenizer = space_stripping_tokenizer
    assert tokenizer.strips_space
    plan = make_plan(is_chat=False, echo=True, params=SamplingParams(logprobs=0, prompt_logprobs=0))
    prompt = EncodedPrompt([0, 2], "ac", (None, Logprob(2, -1.0, 1, ())))
    decoder = StreamDecoder(tokenizer)
    outputs = [output(token_id, decoder.push(token_id), logprob=-0.5) for token_id in (1, 2, 0)]
    writer = CompletionWriter(0, plan, tokenizer)
    entries = [entry for one in outputs for entry in writer.write(one, prompt)]
    assert "".join(entry["text"] for entry in entries) == tokenizer.decode([0, 2, 1, 2, 0]) == "ac bc a"
    assert [entry["logprobs"]["text_offset"] for entry in entries] == [[0, 1], [2], [4], [5]]
