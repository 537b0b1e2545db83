"""The network against transformers: log-probabilities of every prompt position, through the paged cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from inferneo_core import Engine, ModelConfig, SamplingParams
from inferneo_core.config import RopeConfig
from inferneo_core.rope import inverse_frequencies

PROMPT_LEN = 150  # beyond the original context of the scaled RoPE configurations below

CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 14},
    "one_layer_odd_sizes": {"num_hidden_layers": 1, "intermediate_size": 77, "vocab_size": 259},
    "rope_linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "rope_llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "rope_yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "rope_yarn_mscale": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.8,
            "mscale_all_dim": 1.3,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
        }
    },
    "rope_theta": {"rope_theta": 500000.0},
}


def prompt_ids(vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, vocab_size, (PROMPT_LEN,), generator=generator).tolist()


def oracle_logprobs(directory: Path, ids: list[int]) -> torch.Tensor:
    """[len(ids) - 1] log-probabilities that transformers gives each token after the first."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_prompt_logprobs_match_transformers(name: str, tiny_model: Any, tiny_engine: Any) -> None:
    directory = tiny_model(**CONFIGS[name])
    ids = prompt_ids(CONFIGS[name].get("vocab_size", 263))
    expected = oracle_logprobs(directory, ids)
    for chunk in (1, 7, 512):
        engine: Engine = tiny_engine(directory, max_num_batched_tokens=chunk)
        (completion,) = engine.generate([ids], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2))
        assert completion.prompt_logprobs is not None and completion.prompt_logprobs[0] is None
        ours = torch.tensor([entry.logprob for entry in completion.prompt_logprobs[1:]])
        assert [entry.token_id for entry in completion.prompt_logprobs[1:]] == ids[1:]
        assert (ours - expected).abs().max() < 1e-4, f"chunks of {chunk} tokens"


@pytest.mark.parametrize("name", ["gqa", "rope_llama3", "biases"])
def test_greedy_tokens_match_transformers(name: str, tiny_model: Any, tiny_engine: Any) -> None:
    from transformers import LlamaForCausalLM

    directory = tiny_model(**CONFIGS[name])
    ids = prompt_ids(263)[:20]
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = model.generate(
        torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    (completion,) = tiny_engine(directory).generate([ids], params)
    assert list(completion.token_ids) == expected[0, len(ids) :].tolist()


def test_dynamic_rope_follows_its_definition() -> None:
    """NTK-aware: theta * (factor * L / L0 - (factor - 1)) ** (d / (d - 2)), with L fixed at load."""
    rope = RopeConfig("dynamic", theta=10000.0, factor=4.0)
    config = ModelConfig(100, 64, 64, 1, 4, 4, 16, 1e-5, 128, rope)
    theta = 10000.0 * (4.0 * 512 / 128 - 3.0) ** (16 / 14)
    expected = [theta ** (-2 * i / 16) for i in range(8)]
    freqs, attention_factor = inverse_frequencies(config, max_model_len=512)
    torch.testing.assert_close(freqs, torch.tensor(expected))
    assert attention_factor == 1.0
    assert config.max_context_len == 512
    within, _ = inverse_frequencies(config, max_model_len=100)
    torch.testing.assert_close(within, torch.tensor([10000.0 ** (-2 * i / 16) for i in range(8)]))


def test_dynamic_rope_runs_beyond_the_trained_length(tiny_model: Any, tiny_engine: Any) -> None:
    directory = tiny_model(max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    engine: Engine = tiny_engine(directory)
    assert engine.max_model_len == 256
    (completion,) = engine.generate([prompt_ids(263)], SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
    assert len(completion.token_ids) == 5
