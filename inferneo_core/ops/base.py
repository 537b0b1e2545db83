"""The verbs: the seam between the network and the machine.

`Llama.forward` calls only these and views; a backend implements them as well as its machine allows. The seam lies where
the fast kernels fuse, so the network reads as the sentence that they execute: five verbs a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from inferneo_core.batch import AttentionMetadata, DecodeState, SampleOutput, SamplingBatch
from inferneo_core.cache_rows import row_head_dim
from inferneo_core.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Segment:
    """Some rows of a weight, stored in one type.

    Attributes:
        data: dense: [num_rows, in_features] bf16, fp16 or fp32; quantised: [num_rows, bytes_per_row] uint8, each row a
            run of GGUF blocks.
        quant_type: "" for a dense segment, otherwise the GGUF name of the block type, such as "Q4_1".
        row_order: [num_rows] int64; row i of the weight is stored as row row_order[i]; None: in order. GGUF
            interleaves the two halves of every Q and K head; the verbs emit rotate-half order.
    """

    data: Tensor
    quant_type: str = ""
    row_order: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.data.shape[0]


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight [out_features, in_features] as row segments, each with its own type, and an optional bias.

    Attributes:
        segments: the rows in order. Q4_K_M mixes types inside one QKV product, hence several.
        in_features: columns.
        bias: [out_features] in the model dtype, or None.
    """

    segments: tuple[Segment, ...]
    in_features: int
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return sum(segment.num_rows for segment in self.segments)

    @property
    def weight(self) -> Tensor:
        """The one dense [out_features, in_features] tensor of a Linear that `TorchOps.prepare` has made."""
        (segment,) = self.segments
        return segment.data

    @staticmethod
    def stack(parts: Sequence[Linear]) -> Linear:
        """The parts' rows on top of one another: Q, K and V as one product, or gate and up; all with a bias or none."""
        biases = [part.bias for part in parts if part.bias is not None]
        bias = torch.cat(biases) if biases else None
        segments = tuple(segment for part in parts for segment in part.segments)
        return Linear(segments, parts[0].in_features, bias)

    def with_data(self, data: Tensor, bias: Tensor | None) -> Linear:
        """The same product as one dense segment in storage order."""
        return replace(self, segments=(Segment(data),), bias=bias)


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm's weight [hidden_size] and epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """One layer of the paged cache.

    Attributes:
        k: [num_blocks, num_kv_heads, block_size, head_dim], cache dtype; an int8 row is 4 bytes longer (cache_rows).
        v: the same.
    """

    k: Tensor
    v: Tensor

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def block_size(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return row_head_dim(self.k.shape[3], self.k.dtype)


class ForwardOps(Protocol):
    """The verbs of the forward pass: what `Llama.forward` and the output head call."""

    def embed(self, ids: Tensor, w: Linear) -> Tensor:
        """Rows of an embedding table.

        Args:
            ids: [num_tokens] int64, each below w.out_features.
            w: [vocab_size, hidden_size].
        Returns:
            [num_tokens, hidden_size], model dtype.
        """

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
        """RMSNorm, the Q, K and V projections, RoPE on Q and K, and K and V into their cache slots.

        Args:
            x: [num_tokens, hidden_size], model dtype.
            norm: the layer's input RMSNorm.
            w_qkv: [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]: Q, K and V stacked.
            positions: [num_tokens] int64.
            rope: [max_model_len, head_dim] fp32; the cosines of the head_dim / 2 angles, then their sines.
            cache: one layer of the KVCache; written.
            slot_mapping: [num_tokens] int64.
        Returns:
            q: [num_tokens, num_heads, head_dim], model dtype, rotated.
        Raises:
            ShapeError: the arguments disagree on hidden_size, head_dim or num_tokens.
        Source: LLaMA, arXiv 2302.13971; RoPE, arXiv 2104.09864; PagedAttention, arXiv 2309.06180.
        """

    def attention(self, q: Tensor, cache: CacheLayer, metadata: AttentionMetadata) -> Tensor:
        """Causal grouped-query attention over the paged cache, scaled by head_dim ** -0.5.

        Prefill, chunked prefill, prefix hits and decode are this one call; a sequence's last query token sees
        all of its seq_len, the one before it one less, and so on.

        Args:
            q: [num_tokens, num_heads, head_dim], model dtype.
            cache: one layer of the KVCache, with this step's keys and values stored.
            metadata: AttentionMetadata of this step.
        Returns:
            [num_tokens, num_heads * head_dim], model dtype.
        Raises:
            ShapeError: q and the cache disagree on head_dim, or num_heads is no multiple of num_kv_heads.
        Source: FlashAttention-2, arXiv 2307.08691; PagedAttention, arXiv 2309.06180.
        """

    def linear_add(self, x: Tensor, w: Linear, residual: Tensor | None) -> Tensor:
        """A projection, plus the residual stream.

        Args:
            x: [num_tokens, w.in_features], model dtype.
            w: [out_features, in_features].
            residual: [num_tokens, out_features], model dtype; None adds nothing.
        Returns:
            [num_tokens, out_features], model dtype.
        Raises:
            ShapeError: x, w and residual disagree.
        """

    def gate_up_silu(self, x: Tensor, norm: Norm, w_gate_up: Linear) -> Tensor:
        """RMSNorm, the gate and up projections, SiLU(gate) * up.

        Args:
            x: [num_tokens, hidden_size], model dtype.
            norm: the layer's post-attention RMSNorm.
            w_gate_up: [2 * intermediate_size, hidden_size]: gate and up stacked.
        Returns:
            [num_tokens, intermediate_size], model dtype.
        Raises:
            ShapeError: x and the weights disagree on hidden_size.
        Source: GLU variants, arXiv 2002.05202.
        """

    def lm_head(self, x: Tensor, norm: Norm, w_head: Linear) -> Tensor:
        """The final RMSNorm and the output head.

        Args:
            x: [num_rows, hidden_size], model dtype.
            norm: the model's final RMSNorm.
            w_head: [vocab_size, hidden_size].
        Returns:
            logits: [num_rows, vocab_size] fp32.
        Raises:
            ShapeError: x and w_head disagree on hidden_size.
        """


class Ops(ForwardOps, Protocol):
    """What a backend can do. `TorchOps` is the reference that defines the meaning of each verb."""

    name: ClassVar[str]
    dtype: torch.dtype  # of activations, norms and biases
    device: torch.device  # of every tensor the verbs take and return

    def prepare(self, linear: Linear, *, keeps_rows: bool = False) -> Linear:
        """Repack a weight into the backend's own layout; called once a weight, at load.

        Args:
            linear: as the loader made it, its segments views of the mapped file.
            keeps_rows: whether `embed` will read it.
        Returns:
            The same product; the other verbs of this backend accept only what this returned.
        """

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        """Choose one token a row.

        The order: log-probabilities from the raw logits; penalties, biases; then greedy rows take the largest logit;
        the others are scaled by the inverse temperature, filtered by top-k, typical, top-p and min-p, each on the
        renormalised rest, and drawn by Gumbel-max. All ties go to the lowest id. `torch_sampling` defines the bits.

        Args:
            logits: [num_seqs, vocab_size] fp32 or bf16; not changed.
            batch: one row of parameters a sequence.
        Returns:
            SampleOutput.
        Raises:
            ShapeError: logits and batch disagree on num_seqs, or token_counts on vocab_size.
        Source: Gumbel-max, arXiv 1411.0030; Philox, doi 10.1145/2063384.2063405; top-p, arXiv 1904.09751;
            min-p, arXiv 2407.01082; typical, arXiv 2202.00666; repetition penalty, arXiv 1909.05858.
        """

    def next_tokens(self, x: Tensor, norm: Norm, w_head: Linear, rows: Tensor, batch: SamplingBatch) -> SampleOutput:
        """`sample(lm_head(x[rows]))`, free to fuse: a plain draw need never write the logits.

        Args:
            x: [num_tokens, hidden_size], model dtype.
            norm: the model's final RMSNorm.
            w_head: [vocab_size, hidden_size].
            rows: [num_seqs] int64.
            batch: one row of parameters a sequence.
        Returns:
            SampleOutput.
        """

    def score(self, logits: Tensor, targets: Tensor, num_logprobs: int) -> SampleOutput:
        """Log-probabilities of given tokens: how prompts are scored.

        Args:
            logits: [num_rows, vocab_size] fp32 or bf16.
            targets: [num_rows] int64, the tokens to score.
            num_logprobs: how many of the most likely tokens to report a row, from 0.
        Returns:
            SampleOutput with token_ids = targets and every other field set.
        """


@runtime_checkable
class GraphOps(Ops, Protocol):
    """A backend that can record a whole decode step and repeat it without the host's help."""

    def advance(self, state: DecodeState, token_ids: Tensor, block_size: int) -> None:
        """Make the tokens just drawn the next step's input: ids, positions, slots and lengths move on by one token,
        the tokens are counted where there are penalties, and biases that have run out are set to 0.

        Args:
            state: changed in place, but for rows to spare.
            token_ids: [num_rows] int64, the drawn tokens; -1 (none could be drawn) goes on as token 0.
            block_size: tokens a cache block.
        """

    def capture(self, step: Callable[[], SampleOutput]) -> Callable[[], SampleOutput]:
        """Record the kernels that `step` launches; returns what launches them all again and gives their output.

        `step` has run before, so that everything it launches is compiled. Its output is overwritten by each replay.
        """


def check_shape(name: str, tensor: Tensor, *shape: int | None) -> None:
    """Raise ShapeError unless `tensor` has this shape; None stands for any size."""
    actual = tuple(tensor.shape)
    if len(actual) != len(shape) or any(want not in (None, got) for want, got in zip(shape, actual, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ShapeError(f"{name} has shape {list(actual)}; it must be [{wanted}]")
