"""What benchmarks/counts.py counts, against counts made by hand."""

from __future__ import annotations

import pytest
from inferneo_benchmarks import counts
from inferneo_benchmarks.counts import Count, SequenceWork
from inferneo_benchmarks.models import MODELS, Storage, weight_bytes

from inferneo_core.config import ModelConfig, RopeConfig

# vocab 10, hidden 4, intermediate 6, 2 layers, 2 heads of 2, 1 of keys and values
TINY = ModelConfig(10, 4, 6, 2, 2, 1, 2, 1e-5, 64, RopeConfig())
FP32 = Storage("F32", activation_bytes=4, cache_bytes=2)


@pytest.mark.parametrize(
    ("type_", "bytes_a_row"),
    [
        ("F32", 2048),
        ("BF16", 1024),
        ("Q4_0", 16 * 18),
        ("Q4_1", 16 * 20),
        ("Q8_0", 16 * 34),
        ("Q4_K", 288),
        ("Q6_K", 420),
    ],
)
def test_weight_bytes_are_those_of_the_file(type_: str, bytes_a_row: int) -> None:
    assert weight_bytes(3, 512, type_) == 3 * bytes_a_row


def test_weight_bytes_refuses_a_part_of_a_block() -> None:
    with pytest.raises(ValueError, match="576 columns; Q4_K stores whole blocks of 256"):
        weight_bytes(1, 576, "Q4_K")


def test_qkv_rope_store_counts_norm_products_rotation_and_cache() -> None:
    # Weight [8, 4]: 128 bytes. Norm: 16. A token: x and q 16 each, k and v 8, cosines and sines 8, position, slot 16.
    # Products 2 * 8 * 4 a token; rotation 3 for each of 6 values; norm 4 for each of 4.
    assert counts.qkv_rope_store(TINY, FP32, 3) == Count(128 + 16 + 3 * (16 + 16 + 8 + 8 + 16), 3 * (64 + 18 + 16))


def test_attention_counts_the_pairs_that_the_mask_leaves() -> None:
    # Queries 2 and 1 of sequences of 3 and 5: keys 2 + 3, and 5. Two products of 2 * 2 * head_dim each, 2 heads.
    work = [SequenceWork(2, 3), SequenceWork(1, 5)]
    assert [sequence.num_pairs for sequence in work] == [5, 5]
    # Keys and values of 8 tokens, 2 values of 2 bytes each; queries and outputs of 3 tokens, 4 values of 4 bytes.
    assert counts.attention(TINY, FP32, work) == Count(8 * 2 * 2 * 2 + 3 * 2 * 16, (5 + 5) * 2 * 2 * 2 * 2)


@pytest.mark.parametrize(("query_len", "seq_len"), [(1, 1), (1, 9), (5, 5), (3, 8)])
def test_pairs_equal_the_ones_of_a_causal_mask(query_len: int, seq_len: int) -> None:
    first = seq_len - query_len
    drawn = sum(1 for query in range(query_len) for key in range(seq_len) if key <= first + query)
    assert SequenceWork(query_len, seq_len).num_pairs == drawn


def test_linear_add_counts_weight_input_residual_and_sum() -> None:
    assert counts.linear_add(FP32, 3, 4, 6) == Count(4 * 6 * 4 + 3 * (6 + 4 + 4) * 4, 3 * (2 * 4 * 6 + 4))


def test_gate_up_silu_counts_both_projections() -> None:
    weight, norm, tokens = 12 * 4 * 4, 16, 3 * (4 + 6) * 4
    assert counts.gate_up_silu(TINY, FP32, 3) == Count(weight + norm + tokens, 3 * (2 * 12 * 4 + 4 * 4 + 5 * 6))


def test_lm_head_writes_fp32_logits() -> None:
    assert counts.lm_head(TINY, FP32, 2) == Count(10 * 4 * 4 + (1 + 2) * 16 + 2 * 10 * 4, 2 * (2 * 10 * 4 + 4 * 4))


def test_lm_head_may_be_stored_in_its_own_type() -> None:
    storage = Storage("F32", 4, 2, head="BF16")
    assert counts.lm_head(TINY, FP32, 1).num_bytes - counts.lm_head(TINY, storage, 1).num_bytes == 10 * 4 * 2


def test_embed_reads_only_its_rows() -> None:
    assert counts.embed(TINY, FP32, 3) == Count(3 * (8 + 16 + 16), 0)


def test_sample_reads_each_logit_once() -> None:
    assert counts.sample(10, 3) == Count(3 * (40 + 8), 30)


def test_score_writes_a_logprob_a_rank_and_the_listed_tokens() -> None:
    assert counts.score(10, 3, 2) == Count(3 * (40 + 8 + 4 + 8 + 2 * (8 + 4)), 3 * 10 * 3)


def test_step_is_the_sum_of_its_verbs_over_the_layers() -> None:
    work = [SequenceWork(2, 3), SequenceWork(1, 5)]
    step = counts.step(TINY, FP32, work)
    assert list(step) == ["embed", "qkv_rope_store", "attention", "linear_add", "gate_up_silu", "lm_head", "sample"]
    # Two layers: all tokens, then the last one of each sequence.
    added = [counts.linear_add(FP32, n, 4, 4) + counts.linear_add(FP32, n, 4, 6) for n in (3, 2)]
    assert step["linear_add"] == added[0] + added[1]
    last = [SequenceWork(1, 3), SequenceWork(1, 5)]
    assert step["attention"] == counts.attention(TINY, FP32, work) + counts.attention(TINY, FP32, last)
    assert step["lm_head"] == counts.lm_head(TINY, FP32, 2)  # one row a sequence


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("smollm2-135m", 134.5e6), ("llama-3.2-1b", 1.236e9), ("llama-3.1-8b", 8.03e9), ("llama-3.1-70b", 70.6e9)],
)
def test_models_have_the_published_number_of_parameters(name: str, parameters: float) -> None:
    config = MODELS[name]
    layer = config.hidden_size * (2 * config.q_size + 2 * config.kv_size + 3 * config.intermediate_size + 2)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    assert tables + config.num_layers * layer + config.hidden_size == pytest.approx(parameters, rel=2e-3)
