"""The tokenizer: encoding a page of text, decoding it token by token as a stream does, and filling a chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from inferneo_benchmarks.timing import CpuMeter, measure

from inferneo_core import Tokenizer
from inferneo_core.stream_decoder import StreamDecoder
from inferneo_core.weights import open_checkpoint, resolve

pytestmark = [pytest.mark.backend("cpu"), pytest.mark.model("smollm2-135m")]
TEXT = "The quick brown fox, über 12 lazy dogs, says: 你好 🙂.\n" * 200


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    checkpoint = open_checkpoint(resolve("smollm2-135m-instruct"))
    yield Tokenizer.from_gguf(checkpoint.metadata())
    checkpoint.close()


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--budget"))


def test_encode(
    benchmark: Any, record: Callable[..., Any], cpu_meter: CpuMeter, tokenizer: Tokenizer, budget: float
) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    samples = measure(benchmark, cpu_meter, lambda: tokenizer.encode(TEXT), probe="python", budget_s=budget)
    one = record("tokenizer", samples, cpu_meter, "python")
    one.facts["mb_per_s"] = round(len(TEXT.encode()) / one.median_s / 1e6, 2)


def test_decode_as_a_stream(
    benchmark: Any, record: Callable[..., Any], cpu_meter: CpuMeter, tokenizer: Tokenizer, budget: float
) -> None:
    token_ids = tokenizer.encode(TEXT)[:1000]

    def decode() -> str:
        decoder = StreamDecoder(tokenizer, ())
        return "".join(decoder.push(token_id) for token_id in token_ids)

    assert TEXT.startswith(decode()[:100])
    samples = measure(benchmark, cpu_meter, decode, probe="python", num_calls=len(token_ids), budget_s=budget)
    record("tokenizer", samples, cpu_meter, "python")


def test_chat_template(
    benchmark: Any, record: Callable[..., Any], cpu_meter: CpuMeter, tokenizer: Tokenizer, budget: float
) -> None:
    messages = [{"role": role, "content": TEXT[:200]} for role in ("user", "assistant") * 4]
    messages.append({"role": "user", "content": "And then?"})

    def fill() -> object:
        return tokenizer.apply_chat_template(messages)

    assert fill()
    samples = measure(benchmark, cpu_meter, fill, probe="python", budget_s=budget)
    record("tokenizer", samples, cpu_meter, "python")
