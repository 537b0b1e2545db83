"""TorchOps: the reference. It defines what every verb means; readable, slow, right."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from inferneo_core.batch import AttentionMetadata, SampleOutput, SamplingBatch
from inferneo_core.cache_rows import from_rows, to_rows
from inferneo_core.errors import ShapeError
from inferneo_core.ops import torch_sampling
from inferneo_core.ops.base import CacheLayer, Linear, Norm, Segment, check_shape
from inferneo_core.weights.dequant import dequantize

QUERY_SLAB = 256  # query rows that attend at once: bounds the scores at num_heads * 256 * seq_len fp32


class TorchOps:
    """The verbs of `ops/base.py` (where their contracts stand) in plain torch, on any device.

    Args:
        dtype: the model dtype; weights are dequantised to it and activations carry it. Norms, attention scores and
            logits are computed in fp32 whatever it is.
        device: where the weights go.
    """

    name: ClassVar[str] = "torch"

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.dtype = dtype
        self.device = torch.device(device)

    def prepare(self, linear: Linear, *, keeps_rows: bool = False) -> Linear:
        bias = None if linear.bias is None else linear.bias.to(self.device, self.dtype)
        if len(linear.segments) == 1:
            (segment,) = linear.segments
            if not segment.quant_type and segment.row_order is None:  # a dense weight in order may stay where it is
                return linear.with_data(segment.data.to(self.device, self.dtype), bias)
        weight = torch.empty(linear.out_features, linear.in_features, dtype=self.dtype, device=self.device)
        row = 0
        for segment in linear.segments:
            weight[row : row + segment.num_rows] = _dense(segment)
            row += segment.num_rows
        return linear.with_data(weight, bias)

    def embed(self, ids: Tensor, w: Linear) -> Tensor:
        return F.embedding(ids, w.weight)

    def qkv_rope_store(
        self,
        x: Tensor,
        norm: Norm,
        w_qkv: Linear,
        positions: Tensor,
        rope: Tensor,
        cache: CacheLayer,
        slot_mapping: Tensor,
    ) -> Tensor:
        num_tokens, num_kv_heads, head_dim = x.shape[0], cache.num_kv_heads, cache.head_dim
        check_shape("x", x, num_tokens, w_qkv.in_features)
        check_shape("positions", positions, num_tokens)
        check_shape("slot_mapping", slot_mapping, num_tokens)
        check_shape("rope", rope, None, head_dim)
        num_heads = w_qkv.out_features // head_dim - 2 * num_kv_heads
        if num_heads < 1 or w_qkv.out_features % head_dim:
            raise ShapeError(
                f"w_qkv has {w_qkv.out_features} rows; they must be (num_heads + 2 * {num_kv_heads}) * {head_dim}"
            )
        qkv = _project(rms_norm(x, norm), w_qkv).view(num_tokens, -1, head_dim)
        q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)  # [num_tokens, heads, head_dim] each
        cos_sin = rope[positions]  # [num_tokens, head_dim]
        blocks, offsets = slot_mapping // cache.block_size, slot_mapping % cache.block_size
        cache.k[blocks, :, offsets] = to_rows(rotate(k, cos_sin), cache.k.dtype)
        cache.v[blocks, :, offsets] = to_rows(v, cache.v.dtype)
        return rotate(q, cos_sin)

    def attention(self, q: Tensor, cache: CacheLayer, metadata: AttentionMetadata) -> Tensor:
        num_tokens, num_heads, head_dim = q.shape
        check_shape("q", q, num_tokens, None, cache.head_dim)
        if num_heads % cache.num_kv_heads:
            raise ShapeError(f"q has {num_heads} heads; they must be a multiple of num_kv_heads ({cache.num_kv_heads})")
        out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
        starts, seq_lens = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        for seq, seq_len in enumerate(seq_lens):
            rows = slice(starts[seq], starts[seq + 1])
            blocks = metadata.block_tables[seq, : -(-seq_len // cache.block_size)].long()
            k, v = (_gather(side, blocks, seq_len) for side in (cache.k, cache.v))
            first_position = seq_len - (rows.stop - rows.start)
            for start in range(rows.start, rows.stop, QUERY_SLAB):
                slab = slice(start, min(start + QUERY_SLAB, rows.stop))
                out[slab] = _attend(q[slab], k, v, first_position + start - rows.start)
        return out.view(num_tokens, num_heads * head_dim)

    def linear_add(self, x: Tensor, w: Linear, residual: Tensor | None) -> Tensor:
        check_shape("x", x, None, w.in_features)
        if residual is None:
            return _project(x, w)
        check_shape("residual", residual, x.shape[0], w.out_features)
        return residual + _project(x, w)

    def gate_up_silu(self, x: Tensor, norm: Norm, w_gate_up: Linear) -> Tensor:
        check_shape("x", x, None, w_gate_up.in_features)
        gate, up = _project(rms_norm(x, norm), w_gate_up).chunk(2, dim=1)  # [num_tokens, intermediate_size] each
        return F.silu(gate) * up

    def lm_head(self, x: Tensor, norm: Norm, w_head: Linear) -> Tensor:
        check_shape("x", x, None, w_head.in_features)
        return _project(rms_norm(x, norm), w_head).float()

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        return torch_sampling.sample(logits, batch)

    def score(self, logits: Tensor, targets: Tensor, num_logprobs: int) -> SampleOutput:
        return torch_sampling.score(logits, targets, num_logprobs)

    def next_tokens(self, x: Tensor, norm: Norm, w_head: Linear, rows: Tensor, batch: SamplingBatch) -> SampleOutput:
        return self.sample(self.lm_head(x[rows], norm, w_head), batch)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x / rms(x) * weight, computed in fp32. Source: arXiv 1910.07467."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + norm.eps)
    return (x32 * scale).to(x.dtype) * norm.weight


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate-half RoPE in fp32.

    Args:
        x: [num_tokens, heads, head_dim].
        cos_sin: [num_tokens, head_dim] fp32; cosines, then sines.
    Returns:
        The shape and dtype of x.
    """
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)  # [num_tokens, 1, head_dim / 2] each
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _project(x: Tensor, w: Linear) -> Tensor:
    return F.linear(x, w.weight, w.bias)


def _dense(segment: Segment) -> Tensor:
    """A segment's rows in order, dense: fp32 where it was quantised."""
    data = segment.data if segment.row_order is None else segment.data[segment.row_order]
    return dequantize(data, segment.quant_type) if segment.quant_type else data


def _gather(side: Tensor, blocks: Tensor, seq_len: int) -> Tensor:
    """One sequence's keys or values as [num_kv_heads, seq_len, head_dim] fp32."""
    pages = side[blocks].transpose(0, 1)  # [num_kv_heads, num_blocks, block_size, row_elements]
    return from_rows(pages.flatten(1, 2)[:, :seq_len])


def _attend(q: Tensor, k: Tensor, v: Tensor, first_position: int) -> Tensor:
    """Causal softmax attention of some tokens of one sequence over the sequence.

    Args:
        q: [query_len, num_heads, head_dim], the tokens from first_position on.
        k, v: [num_kv_heads, seq_len, head_dim] fp32.
    Returns:
        [query_len, num_heads, head_dim], dtype of q.
    """
    query_len, num_heads, head_dim = q.shape
    num_kv_heads, seq_len, _ = k.shape
    grouped = q.float().view(query_len, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)
    scores = grouped @ k[:, None].transpose(-1, -2) * head_dim**-0.5  # [num_kv_heads, group, query_len, seq_len]
    positions = torch.arange(seq_len, device=q.device)
    future = positions > positions[first_position : first_position + query_len, None]  # [query_len, seq_len]
    attended: Tensor = scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v[:, None]
    return attended.permute(2, 0, 1, 3).reshape(query_len, num_heads, head_dim).to(q.dtype)
