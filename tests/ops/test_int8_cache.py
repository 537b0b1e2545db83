"""The cache in int8: what a row holds, that C++ stores the reference's bits, and how far attention may lead away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inferneo_core import SamplingParams
from inferneo_core.batch import AttentionMetadata
from inferneo_core.cache_rows import SCALE_BYTES, from_rows, row_elements, to_rows
from inferneo_core.config import ModelConfig, RopeConfig
from inferneo_core.kv_cache import KVCache, block_bytes
from inferneo_core.ops.base import CacheLayer, Linear, Norm, Segment
from inferneo_core.ops.cpu_ops import CpuOps
from inferneo_core.ops.torch_ops import TorchOps

EPS = 1e-5
ENGINES: tuple[dict[str, Any], ...] = (  # of a tiny model on CpuOps: all give the same bits
    {"block_size": 1},
    {"block_size": 32, "num_threads": 3},
    {"max_num_batched_tokens": 7},
    {"max_num_batched_tokens": 13, "max_num_seqs": 3, "enable_prefix_caching": False},
)


def test_row_is_its_codes_and_their_scale() -> None:
    rows = to_rows(torch.tensor([254.0, -127.0, 1.0, 3.0, 5.0, -0.9]), torch.int8)
    assert rows[:-SCALE_BYTES].tolist() == [127, -64, 0, 2, 2, 0]  # -63.5, 0.5, 1.5 and 2.5 go to the even side
    assert rows[-SCALE_BYTES:].clone().view(torch.float32).item() == 2.0
    assert from_rows(rows).tolist() == [254.0, -128.0, 0.0, 4.0, 4.0, 0.0]


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 3e4, 1e30])
@pytest.mark.parametrize("shape", [(5, 123), (1, 1), (2, 3, 64)])
def test_row_lies_within_half_a_scale(shape: tuple[int, ...], magnitude: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])) * magnitude
    bound = x.abs().amax(dim=-1, keepdim=True) / 254
    assert ((from_rows(to_rows(x, torch.int8)) - x).abs() <= bound * (1 + 1e-5)).all()


def test_row_without_a_usable_scale() -> None:
    tiny = 2.0**-149  # the smallest float: a 127th of it is none
    x = torch.tensor([[0.0, 0.0], [tiny, -tiny], [1.0, float("nan")], [float("-inf"), 1.0]])
    back = from_rows(to_rows(x, torch.int8))
    assert back[:2].abs().max() == 0.0
    assert back[2:].isnan().all()


def stored(ops: CpuOps | TorchOps, x: Tensor, dtype: torch.dtype, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of x as two KV heads have them in the cache, one row a token: [num_tokens, 2, elements]."""
    num_tokens, width = x.shape
    generator = torch.Generator().manual_seed(head_dim)
    weight = torch.randn(6 * head_dim, width, generator=generator)
    angles = torch.arange(num_tokens)[:, None] * 0.3 ** torch.arange(head_dim // 2)
    rope, places = torch.cat([angles.cos(), angles.sin()], dim=1), torch.arange(num_tokens)
    shape = (-(-num_tokens // 3), 2, 3, row_elements(head_dim, dtype))
    cache = CacheLayer(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
    linear = ops.prepare(Linear((Segment(weight),), width))
    ops.qkv_rope_store(x, Norm(torch.ones(width), EPS), linear, places, rope, cache, places)
    k, v = (side.transpose(1, 2).flatten(0, 1)[:num_tokens] for side in (cache.k, cache.v))
    return k, v


@pytest.mark.parametrize("head_dim", [14, 64, 80, 2])
def test_stored_rows_are_those_of_the_definition(cpu: CpuOps, head_dim: int) -> None:
    x = torch.randn(11, 48, generator=torch.Generator().manual_seed(1))
    x[3] = 0.0
    for wide, rows in zip(stored(cpu, x, torch.float32, head_dim), stored(cpu, x, torch.int8, head_dim), strict=True):
        assert torch.equal(rows, to_rows(wide, torch.int8))
    x[5, 7] = float("nan")
    for rows in stored(cpu, x, torch.int8, head_dim):
        is_nan = from_rows(rows).isnan()
        assert is_nan[5].all()
        assert not is_nan[torch.arange(11) != 5].any()


@pytest.mark.parametrize("head_dim", [14, 64])
def test_reference_stores_what_the_definition_says(head_dim: int) -> None:
    x, ops = torch.randn(7, 48, generator=torch.Generator().manual_seed(2)), TorchOps()
    for wide, rows in zip(stored(ops, x, torch.float32, head_dim), stored(ops, x, torch.int8, head_dim), strict=True):
        assert torch.equal(rows, to_rows(wide, torch.int8))


@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (14, 5), (80, 16)])
@pytest.mark.parametrize("seq_len", [1, 77, 600])
def test_attention_stays_within_the_stated_error(cpu: CpuOps, head_dim: int, block_size: int, seq_len: int) -> None:
    """Scores move by at most d, so weights by a factor within exp(+-2d), and values by half a scale."""
    generator = torch.Generator().manual_seed(seq_len)
    num_blocks = -(-seq_len // block_size)
    k, v = (torch.randn(num_blocks, 2, block_size, head_dim, generator=generator) for _ in range(2))
    q = torch.randn(1, 6, head_dim, generator=generator) / 4
    starts, lens = torch.tensor([0, 1]).int(), torch.tensor([seq_len]).int()
    tables = torch.arange(num_blocks).int()[None]
    metadata = AttentionMetadata(starts, lens, tables, 1, seq_len)
    exact = TorchOps().attention(q.double(), CacheLayer(k, v), metadata).view(6, head_dim)
    cache = CacheLayer(to_rows(k, torch.int8), to_rows(v, torch.int8))
    actual = cpu.attention(q, cache, metadata).view(6, head_dim)

    of_heads = [side.transpose(0, 1).flatten(1, 2)[:, :seq_len].abs().amax(dim=(1, 2)) for side in (k, v)]
    largest_k, largest_v = (most.repeat_interleave(3).double() for most in of_heads)  # [num_heads]
    moved = q[0].abs().sum(dim=-1) * largest_k / 254 * head_dim**-0.5
    bound = torch.expm1(2 * moved) * largest_v + largest_v / 254
    error = (actual - exact).abs().amax(dim=-1)
    assert (error <= bound + 1e-5).all(), (error, bound)
    assert (error < 0.05).all()  # the bound is the worst case: errors cancel


def test_cache_takes_head_dim_and_four_bytes_a_row() -> None:
    config = ModelConfig(
        vocab_size=9, hidden_size=28, intermediate_size=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=14,
        norm_eps=EPS, max_position_embeddings=64, rope=RopeConfig(),
    )  # fmt: skip
    assert block_bytes(config, 5, torch.int8) == 2 * 3 * 1 * 5 * (14 + 4)
    cache = KVCache(config, 7, 5, torch.int8, torch.device("cpu"))
    assert cache.num_bytes == 7 * block_bytes(config, 5, torch.int8)
    assert [layer.head_dim for layer in cache.layers] == [14] * 3


@pytest.mark.parametrize("arguments", ENGINES, ids=str)
def test_engine_gives_the_same_bits_for_any_batch(arguments: dict[str, Any], tiny_engine: Any) -> None:
    params = SamplingParams(max_tokens=20, seed=5, logprobs=0, ignore_eos=True)
    prompts = [[*range(5, 60)], [9] * 11, [1], [*range(5, 40), 200], [30, 31, 32]]
    alone = tiny_engine(ops="cpu", kv_cache_dtype="int8")
    expected = [alone.generate([prompt], params)[0] for prompt in prompts]
    engine = tiny_engine(ops="cpu", kv_cache_dtype="int8", **arguments)
    for _ in range(2):  # the second time from the prefix cache, where there is one
        for one, other in zip(expected, engine.generate(prompts, params), strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == other.logprobs


def test_engine_on_int8_follows_the_reference(tiny_engine: Any, tiny_model: Any) -> None:
    """Both store the same codes but where they round at a tie; the log-probabilities tell int8 from fp32."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    prompt = [int(token) for token in torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(3))]

    def logprobs(ops: str, dtype: str) -> Tensor:
        engine = tiny_engine(tiny_model(), ops=ops, dtype="float32", kv_cache_dtype=dtype)
        (completion,) = engine.generate([prompt], params)
        return torch.tensor([one.logprob for one in completion.prompt_logprobs[1:]])

    reference, cpu, wide = logprobs("torch", "int8"), logprobs("cpu", "int8"), logprobs("torch", "float32")
    assert (reference - wide).abs().max() > 1e-3
    assert (reference - cpu).abs().mean() < (reference - wide).abs().mean() / 4
    assert (reference - wide).abs().mean() < 0.05
