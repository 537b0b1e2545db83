"""Every verb of TritonOps in bf16 and fp16 against fp64, beside TorchOps in the same dtype: at most twice its error."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from inferneo_benchmarks.gpu.measure import relative_error, require, write
from torch import Tensor

from inferneo_core.batch import AttentionMetadata
from inferneo_core.ops.base import CacheLayer, Linear, Norm, Ops, Segment
from inferneo_core.ops.torch_ops import TorchOps
from inferneo_core.ops.triton_ops import TritonOps

HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2048, 8192, 32, 8, 64


def tensor(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda") * scale


def metadata(num_tokens: int) -> AttentionMetadata:
    """Two sequences: a decode at 1,000 tokens, and the other tokens as a chunk behind a prefix of 500."""

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    chunk = num_tokens - 1
    lens = (1000, 500 + chunk) if chunk else (1000,)
    tables = torch.arange(256, dtype=torch.int32, device="cuda").flip(0).view(2, 128)[: len(lens)]
    starts = ints(0, 1, num_tokens) if chunk else ints(0, 1)
    return AttentionMetadata(starts, ints(*lens), tables, max(1, chunk), max(lens))


def exact_norm(x: Tensor, norm: Norm) -> Tensor:
    x64 = x.double()
    return x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()


def exact_attention(q: Tensor, cache: CacheLayer, data: AttentionMetadata) -> Tensor:
    out = []
    for index, seq_len in enumerate(data.seq_lens.tolist()):
        start, end = data.query_start_loc[index : index + 2].tolist()
        k, v = (
            side[data.block_tables[index].long()].transpose(0, 1).flatten(1, 2)[:, :seq_len].double()
            for side in (cache.k, cache.v)
        )
        group = NUM_HEADS // NUM_KV_HEADS
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        mask = torch.ones(end - start, seq_len, dtype=torch.bool, device="cuda").tril(seq_len - (end - start))
        heads = q[start:end].double().transpose(0, 1)
        out.append(F.scaled_dot_product_attention(heads, k, v, attn_mask=mask).transpose(0, 1).flatten(1))
    return torch.cat(out)


def errors(dtype: torch.dtype, num_tokens: int) -> dict[str, tuple[float, float]]:
    """(TritonOps' error, TorchOps' error) of each verb."""
    weights = {
        "out": tensor(HIDDEN, HIDDEN, scale=HIDDEN**-0.5, seed=1).to(dtype),
        "gate_up": tensor(2 * INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5, seed=2).to(dtype),
    }
    x, norm = tensor(num_tokens, HIDDEN, seed=3).to(dtype), Norm(1 + tensor(HIDDEN, scale=0.1, seed=4).to(dtype), 1e-5)
    q = tensor(num_tokens, NUM_HEADS, HEAD_DIM, seed=5).to(dtype)
    cache = CacheLayer(*(tensor(256, NUM_KV_HEADS, 16, HEAD_DIM, seed=seed).to(dtype) for seed in (6, 7)))
    data = metadata(num_tokens)
    gate, up = (exact_norm(x, norm) @ weights["gate_up"].double().T).chunk(2, 1)
    cases: dict[str, tuple[Callable[[Ops, dict[str, Linear]], Tensor], Tensor]] = {
        "linear_add": (
            lambda ops, w: ops.linear_add(x, w["out"], x),
            x.double() @ weights["out"].double().T + x.double(),
        ),
        "gate_up_silu": (lambda ops, w: ops.gate_up_silu(x, norm, w["gate_up"]), F.silu(gate) * up),
        "lm_head": (lambda ops, w: ops.lm_head(x, norm, w["out"]), exact_norm(x, norm) @ weights["out"].double().T),
        "attention": (lambda ops, w: ops.attention(q, cache, data), exact_attention(q, cache, data)),
    }
    backends = TritonOps(dtype, torch.device("cuda")), TorchOps(dtype, "cuda")
    found = {}
    for name, (verb, exact) in cases.items():
        triton_error, torch_error = (
            relative_error(
                verb(ops, {key: ops.prepare(Linear((Segment(w),), HIDDEN)) for key, w in weights.items()}), exact
            )
            for ops in backends
        )
        found[name] = (triton_error, torch_error)
    return found


def main() -> None:
    result = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_tokens in (1, 2, 16, 33, 200):
            for verb, (actual, reference) in errors(dtype, num_tokens).items():
                name = f"{verb} {str(dtype).removeprefix('torch.')} {num_tokens}"
                result[name] = [actual, reference]
                require(
                    actual <= 2 * reference + 1e-6, f"{name}: error {actual:.2e}; the reference's is {reference:.2e}"
                )
    write(errors_triton_and_torch=result)


if __name__ == "__main__":
    main()
