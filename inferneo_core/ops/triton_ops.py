"""TritonOps: the verbs as Triton kernels (`kernels/inferneo_kernels/`), on an NVIDIA GPU.

Each method checks its shapes once and hands plain tensors to a launcher. Beyond the vendor's GEMM at large numbers of
tokens, which the launchers call, there is no torch arithmetic here or below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
from inferneo_kernels import (
    advance as advancing,
    attention as attending,
    elementwise,
    embedding,
    head_draw,
    linear,
    sampling,
    scoring,
)
from inferneo_kernels.quant_layout import Weight, dense, merge, repack
from torch import Tensor

from inferneo_core.batch import (
    NUM_FLOATS,
    NUM_INTS,
    AttentionMetadata,
    DecodeState,
    SampleOutput,
    SamplingBatch,
)
from inferneo_core.config import MAX_NUM_SEQS
from inferneo_core.errors import BackendUnavailable, ShapeError
from inferneo_core.ops.base import CacheLayer, Linear, Norm, Segment, check_shape
from inferneo_core.ops.torch_sampling import check_logits

MIN_CAPABILITY = (8, 0)  # asynchronous copies and bf16 tensor cores came with sm_80


@dataclass(frozen=True, slots=True)
class PackedLinear(Linear):
    """A Linear in the kernels' layout: its rows in as few Weights as their types allow; it has no segments left."""

    weights: tuple[Weight, ...] = ()

    @property
    def out_features(self) -> int:
        return sum(weight.num_rows for weight in self.weights)


class TritonOps:
    """The GPU backend. Quantised weights stay quantised; the kernels unpack them in registers.

    With TRITON_INTERPRET=1 in the environment when this module is first imported, the same kernels run in Triton's
    interpreter on the CPU, slowly: that is how they are tested where there is no GPU.

    Args:
        dtype: of activations, norms and dense weights.
        device: where the weights go.
        batch_invariant: one regime and one split of the keys for every batch, so that a token's bits do not depend on
            what else is in it; slower, most of all in prefill.

    Raises:
        BackendUnavailable: the device and the way the kernels were made do not fit, or the GPU is too old.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, dtype: torch.dtype, device: torch.device, *, batch_invariant: bool = False) -> None:
        _check_device(device)
        self.dtype = dtype
        self.device = device
        self._batch_invariant = batch_invariant
        self._regime: linear.Regime = "tile" if batch_invariant else "auto"
        self._workspace: Tensor | None = None  # the attention kernels' counters, zero between calls
        self._pool: Any = None  # the memory that all captured graphs share

    def prepare(self, linear: Linear, *, keeps_rows: bool = False) -> PackedLinear:
        weights = merge([self._pack(segment) for segment in linear.segments])
        bias = None if linear.bias is None else linear.bias.to(self.device, self.dtype)
        return PackedLinear((), linear.in_features, bias, weights)

    def _pack(self, segment: Segment) -> Weight:
        data = segment.data if segment.row_order is None else segment.data[segment.row_order]
        if segment.quant_type:
            return repack(data.to(self.device), segment.quant_type)
        return dense(data.to(self.device, self.dtype))

    def embed(self, ids: Tensor, w: Linear) -> Tensor:
        check_shape("ids", ids, None)
        (weight,) = _weights(w)
        return embedding.embed(ids, weight, self.dtype)

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
        num_tokens, head_dim = x.shape[0], cache.head_dim
        check_shape("x", x, num_tokens, w_qkv.in_features)
        check_shape("positions", positions, num_tokens)
        check_shape("slot_mapping", slot_mapping, num_tokens)
        check_shape("rope", rope, None, head_dim)
        if w_qkv.out_features % head_dim or w_qkv.out_features <= 2 * cache.num_kv_heads * head_dim:
            raise ShapeError(
                f"w_qkv has {w_qkv.out_features} rows; they must be (num_heads + 2 * {cache.num_kv_heads}) * {head_dim}"
            )
        return linear.qkv_rope_store(
            x,
            norm.weight,
            norm.eps,
            _weights(w_qkv),
            w_qkv.bias,
            positions,
            rope,
            cache.k,
            cache.v,
            slot_mapping,
            regime=self._regime,
        )

    def attention(self, q: Tensor, cache: CacheLayer, metadata: AttentionMetadata) -> Tensor:
        num_tokens, num_heads, _ = q.shape
        check_shape("q", q, num_tokens, None, cache.head_dim)
        if num_heads % cache.num_kv_heads:
            raise ShapeError(f"q has {num_heads} heads; they must be a multiple of num_kv_heads ({cache.num_kv_heads})")
        if self._workspace is None:
            self._workspace = attending.attention_workspace(MAX_NUM_SEQS, num_heads, self.device)
        return attending.attention(
            q,
            cache.k,
            cache.v,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_tables,
            metadata.max_query_len,
            metadata.max_seq_len,
            batch_invariant=self._batch_invariant,
            workspace=self._workspace,
        )

    def linear_add(self, x: Tensor, w: Linear, residual: Tensor | None) -> Tensor:
        check_shape("x", x, None, w.in_features)
        if residual is not None:
            check_shape("residual", residual, x.shape[0], w.out_features)
        return linear.linear_add(x, _weights(w), w.bias, residual, regime=self._regime)

    def gate_up_silu(self, x: Tensor, norm: Norm, w_gate_up: Linear) -> Tensor:
        check_shape("x", x, None, w_gate_up.in_features)
        weights = _weights(w_gate_up)
        return linear.gate_up_silu(x, norm.weight, norm.eps, weights, w_gate_up.bias, regime=self._regime)

    def lm_head(self, x: Tensor, norm: Norm, w_head: Linear) -> Tensor:
        check_shape("x", x, None, w_head.in_features)
        return linear.lm_head(x, norm.weight, norm.eps, _weights(w_head), w_head.bias, regime=self._regime)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        check_logits(logits)
        _check_batch(batch, logits.shape[0], logits.shape[1])
        return SampleOutput(
            *sampling.sample(
                logits,
                batch.floats,
                batch.ints,
                batch.token_counts,
                batch.bias_start,
                batch.bias_ids,
                batch.bias_values,
                batch.num_logprobs,
                has_filters=batch.has_filters,
            )
        )

    def score(self, logits: Tensor, targets: Tensor, num_logprobs: int) -> SampleOutput:
        check_logits(logits)
        check_shape("targets", targets, logits.shape[0])
        if not 0 <= num_logprobs <= logits.shape[1]:
            raise ShapeError(f"num_logprobs is {num_logprobs}; it is in [0, {logits.shape[1]}] (the vocabulary)")
        return SampleOutput(*scoring.score(logits, targets, num_logprobs))

    def next_tokens(self, x: Tensor, norm: Norm, w_head: Linear, rows: Tensor, batch: SamplingBatch) -> SampleOutput:
        num_seqs, weights = rows.shape[0], _weights(w_head)
        # A batch-invariant draw has its logits from lm_head always: what a mate asks for must not change the kernel.
        draws_in_head = not batch.has_filters and batch.num_logprobs < 0 and not self._batch_invariant
        if draws_in_head and len(weights) == 1:
            _check_batch(batch, num_seqs, w_head.out_features)
            normalised = elementwise.rms_norm(x, norm.weight, norm.eps, rows)
            parameters = (batch.floats, batch.ints, batch.token_counts)
            biases = (batch.bias_start, batch.bias_ids, batch.bias_values)
            token_ids = head_draw.head_draw(normalised, weights[0], w_head.bias, *parameters, *biases)
            return SampleOutput(token_ids)
        # Each token of a pure decode step is drawn after, so there the rows are x itself.
        chosen = x if num_seqs == x.shape[0] else embedding.embed(rows, x)
        return self.sample(self.lm_head(chosen, norm, w_head), batch)

    def advance(self, state: DecodeState, token_ids: Tensor, block_size: int) -> None:
        moved = advancing.DecodeState(
            token_ids=state.token_ids,
            positions=state.positions,
            slot_mapping=state.slot_mapping,
            seq_lens=state.seq_lens,
            block_tables=state.block_tables,
            sampling_ints=state.sampling_ints,
            token_counts=state.token_counts,
            bias_start=state.bias_start,
            bias_values=state.bias_values,
            bias_steps=state.bias_steps,
            ring=state.ring,
            step=state.step,
        )
        advancing.advance(token_ids, moved, block_size)

    def capture(self, step: Callable[[], SampleOutput]) -> Callable[[], SampleOutput]:
        if self.device.type != "cuda":
            return step  # the interpreter launches nothing that could be recorded
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the device, as loading another model, does not break the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()

        def replay() -> SampleOutput:
            graph.replay()
            return output

        return replay


def _weights(w: Linear) -> tuple[Weight, ...]:
    assert isinstance(w, PackedLinear), "TritonOps.prepare made no such weight"
    return w.weights


def _check_batch(batch: SamplingBatch, num_seqs: int, vocab_size: int) -> None:
    """Shapes only: a look at the values would make the host wait for the device."""
    check_shape("floats", batch.floats, num_seqs, NUM_FLOATS)
    check_shape("ints", batch.ints, num_seqs, NUM_INTS)
    if batch.token_counts is not None:
        check_shape("token_counts", batch.token_counts, None, vocab_size)
    if batch.num_logprobs > vocab_size:
        raise ShapeError(f"num_logprobs is {batch.num_logprobs}; it is at most {vocab_size} (the vocabulary)")
    given = [part is not None for part in (batch.bias_start, batch.bias_ids, batch.bias_values)]
    if any(given) and not all(given):
        raise ShapeError("bias_start, bias_ids and bias_values must be given together")
    if batch.bias_start is not None:
        check_shape("bias_start", batch.bias_start, num_seqs + 1)


def _check_device(device: torch.device) -> None:
    is_compiled = isinstance(elementwise._add_kernel, triton.runtime.JITFunction)
    if device.type == "cpu" and is_compiled:
        raise BackendUnavailable(
            "ops is 'triton' but device is cpu: Triton kernels run on a CUDA GPU, and on a CPU only in Triton's "
            "interpreter, for tests (use ops='cpu', or set TRITON_INTERPRET=1 before Python starts)"
        )
    if device.type == "cuda" and not is_compiled:
        raise BackendUnavailable(
            f"ops is 'triton' and device is {device}, but TRITON_INTERPRET was set when the kernels were imported: "
            "they would run on the CPU (unset TRITON_INTERPRET)"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        raise BackendUnavailable(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; ops='triton' needs "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer (use ops='torch')"
        )
