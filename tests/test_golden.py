"""The default model against transformers on the same weights: greedy texts, whatever shares the batch and the cache.

The golden file is transformers' own greedy decoding of the weights as the `gguf` package dequantises them. `pytest
tests/test_golden.py --record` writes it anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inferneo_core import Completion, Engine, SamplingParams

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden" / "smollm2_greedy.json"
NUM_TOKENS = 64
MIN_MARGIN = 1e-3  # between the two largest logits, at every step of every prompt
MAX_QUANTISED_GAP = 0.5  # how near a tie CpuOps, whose activations are quantised, may leave the reference's text
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)

CANDIDATE_PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "The three laws of thermodynamics are",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "To make a good cup of tea, first",
    "In 1969, the first human beings",
    "The quick brown fox",
    "SELECT name, age FROM",
    "Dear Sir or Madam,\n\nI am writing to",
    "<|im_start|>user\nName five rivers of Europe.<|im_end|>\n<|im_start|>assistant\n",
    "import numpy as np\n\n",
    "A long time ago, scientists believed that",
)


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest, default_engine: Engine, default_model: Path) -> list[dict[str, Any]]:
    if request.config.getoption("--record"):
        GOLDEN.write_text(json.dumps(record(default_engine, default_model), indent=1, ensure_ascii=False) + "\n")
    entries: list[dict[str, Any]] = json.loads(GOLDEN.read_text())
    return entries


def record(engine: Engine, model_path: Path) -> list[dict[str, Any]]:
    """The first eight prompts whose greedy path never comes near a tie, as transformers decodes them."""
    oracle = transformers_model(model_path)
    entries: list[dict[str, Any]] = []
    for prompt in CANDIDATE_PROMPTS:
        ids = torch.tensor([engine.tokenizer.encode(prompt)])
        out = oracle.generate(
            ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        top = torch.stack(out.logits)[:, 0].topk(2).values  # [NUM_TOKENS, 2]
        margin = float((top[:, 0] - top[:, 1]).min())
        print(f"{margin:.5f}  {prompt!r}")
        if margin > MIN_MARGIN and len(entries) < 8:
            token_ids = out.sequences[0, ids.shape[1] :].tolist()
            text = engine.tokenizer.decode(token_ids)
            entries.append({"prompt": prompt, "margin": margin, "token_ids": token_ids, "text": text})
    assert len(entries) == 8
    return entries


def transformers_model(model_path: Path) -> Any:
    """transformers' Llama with the weights of a GGUF file, dequantised by the gguf package."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    layer_names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    state = {}
    for tensor in gguf.GGUFReader(model_path).tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        kind, *rest = tensor.name.removesuffix(".weight").split(".")
        if kind == "blk":
            layer, name = rest
            if name in ("attn_q", "attn_k"):  # GGUF interleaves the halves of a head
                weight = weight.view(-1, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
            state[f"model.layers.{layer}.{layer_names[name]}.weight"] = weight
        else:
            state[{"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[kind]] = weight
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


@pytest.fixture
def make_engine(default_model: Path) -> Iterator[Any]:
    engines: list[Engine] = []

    def make(**arguments: Any) -> Engine:
        defaults = {"ops": "torch", "dtype": "float32", "kv_cache_memory": 2**28, "max_model_len": 256}
        engines.append(Engine(default_model, **{**defaults, **arguments}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def check(golden: list[dict[str, Any]], completions: list[Completion]) -> None:
    for entry, completion in zip(golden, completions, strict=True):
        assert completion.text == entry["text"], entry["prompt"]
        assert list(completion.token_ids) == entry["token_ids"], entry["prompt"]
        assert completion.finish_reason == "length"


def check_logprobs(expected: list[Completion], completions: list[Completion]) -> None:
    for one, other in zip(expected, completions, strict=True):
        assert one.logprobs is not None and other.logprobs is not None
        pairs = zip(one.logprobs, other.logprobs, strict=True)
        assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 1e-4


@pytest.fixture(scope="module")
def alone(golden: list[dict[str, Any]], default_engine: Engine) -> list[Completion]:
    """Each prompt by itself: no batch mates."""
    return [default_engine.generate([entry["prompt"]], GREEDY)[0] for entry in golden]


def test_margins_are_far_from_a_tie(golden: list[dict[str, Any]]) -> None:
    print("smallest top-2 margin:", min(entry["margin"] for entry in golden))
    assert len(golden) == 8
    assert all(entry["margin"] > MIN_MARGIN for entry in golden)


def test_greedy_texts_equal_transformers(golden: list[dict[str, Any]], alone: list[Completion]) -> None:
    check(golden, alone)


@pytest.mark.parametrize(
    "arguments",
    [
        {"block_size": 1},
        {"block_size": 32},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 13, "max_num_seqs": 3, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_greedy_texts_do_not_depend_on_the_batch(
    arguments: dict[str, Any], golden: list[dict[str, Any]], alone: list[Completion], make_engine: Any
) -> None:
    together = make_engine(**arguments).generate([entry["prompt"] for entry in golden], GREEDY)
    check(golden, together)
    check_logprobs(alone, together)


def test_greedy_texts_do_not_depend_on_a_prefix_hit(
    golden: list[dict[str, Any]], alone: list[Completion], make_engine: Any
) -> None:
    engine = make_engine(block_size=4)
    prompts = [entry["prompt"] for entry in golden]
    engine.generate(prompts, GREEDY)
    again = engine.generate(prompts, GREEDY)
    assert all(completion.timings.cached_tokens >= 4 for completion in again)
    assert engine.stats().prefix_hit_rate > 0.2
    check(golden, again)
    check_logprobs(alone, again)


def test_greedy_texts_do_not_depend_on_preemption(
    golden: list[dict[str, Any]], alone: list[Completion], make_engine: Any
) -> None:
    block_bytes = 2 * 30 * 3 * 64 * 8 * 4  # of 8 tokens in fp32
    engine = make_engine(block_size=8, kv_cache_memory=30 * block_bytes, max_model_len=120, enable_prefix_caching=False)
    completions = engine.generate([entry["prompt"] for entry in golden], GREEDY)
    assert engine.stats().preemptions >= 3
    check(golden, completions)
    check_logprobs(alone, completions)


def test_cpu_texts_leave_the_reference_only_near_a_tie(
    golden: list[dict[str, Any]], default_engine: Engine, make_engine: Any
) -> None:
    engine = make_engine(ops="cpu")
    for entry, ours in zip(golden, engine.generate([entry["prompt"] for entry in golden], GREEDY), strict=True):
        pairs = enumerate(zip(ours.token_ids, entry["token_ids"], strict=True))
        step = next((step for step, (token_id, expected) in pairs if token_id != expected), None)
        if step is None:
            continue
        shared = list(ours.prompt_token_ids) + entry["token_ids"][:step]
        (at,) = default_engine.generate([shared], SamplingParams(max_tokens=1, temperature=0.0, logprobs=5))
        assert at.logprobs is not None
        logprobs = dict(at.logprobs[0].top)
        gap = logprobs[entry["token_ids"][step]] - logprobs[ours.token_ids[step]]
        print(f"{entry['prompt']!r} parts at token {step}, where the reference's gap is {gap:.4f}")
        assert 0.0 <= gap < MAX_QUANTISED_GAP


def test_cpu_bits_do_not_depend_on_the_batch(golden: list[dict[str, Any]], make_engine: Any) -> None:
    prompts = [entry["prompt"] for entry in golden]
    alone = make_engine(ops="cpu", num_threads=1)
    expected = [alone.generate([prompt], GREEDY)[0] for prompt in prompts]
    assert all(completion.logprobs for completion in expected)
    block_bytes = 2 * 30 * 3 * 64 * 8 * 4  # of 8 tokens in fp32
    small = {"block_size": 8, "kv_cache_memory": 30 * block_bytes, "max_model_len": 120, "enable_prefix_caching": False}
    for arguments in (
        {"block_size": 1},
        {"block_size": 32, "num_threads": 2},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 13, "max_num_seqs": 3, "enable_prefix_caching": False},
        {**small, "kv_cache_dtype": "float32"},
    ):
        engine = make_engine(ops="cpu", **arguments)
        for _ in range(2):  # the second time from the prefix cache, where there is one
            for one, other in zip(expected, engine.generate(prompts, GREEDY), strict=True):
                assert one.token_ids == other.token_ids, arguments
                assert one.logprobs == other.logprobs, arguments
    assert engine.stats().preemptions >= 3  # the last one's, whose cache is small
