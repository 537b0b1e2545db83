"""Attention over the paged cache: which kernel serves which sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from inferneo_kernels.attention_decode import attention_decode, head_blocks_of, split_plan
from inferneo_kernels.attention_prefill import attention_prefill

INTERPRETER_SMS = 4  # multiprocessors that the interpreter's CPU stands for


def attention_workspace(max_num_seqs: int, num_heads: int, device: torch.device) -> Tensor:
    """The counters of `attention`: int32 zeros, and zeros again after every call, so that all layers share them."""
    return torch.zeros(max_num_seqs * num_heads, dtype=torch.int32, device=device)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    max_query_len: int,
    max_seq_len: int,
    *,
    batch_invariant: bool = False,
    workspace: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention over the paged cache, scaled by head_dim ** -0.5.

    Sequences with one query token go to the split-KV kernel, the others to the tiled one: one launch where the batch is
    of one kind, two where it is mixed. A sequence of length 0, as padding has, gives zeros.

    Args:
        q: [num_tokens, num_heads, head_dim] bf16, fp16 or fp32.
        k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], any of those dtypes; equal strides.
        query_start_loc: [num_seqs + 1] int32; sequence i owns tokens query_start_loc[i] to query_start_loc[i + 1].
        seq_lens: [num_seqs] int32.
        block_tables: [num_seqs, max_blocks] int32.
        max_query_len, max_seq_len: upper bounds, in tokens. They decide the grid, so a captured graph keeps them.
        batch_invariant: cut a sequence's keys by its own length alone: a decode's bits do not depend on its batch.
        workspace: of `attention_workspace`, for num_seqs sequences or more; None makes one. Calls that share one must
            follow one another on one stream.
    Returns:
        [num_tokens, num_heads * head_dim], dtype of q. Rows of tokens that belong to no sequence are undefined.
    Source: FlashAttention-2, arXiv 2307.08691; PagedAttention, arXiv 2309.06180.
    """
    assert q.stride(2) == 1 and k_cache.stride(3) == 1 and k_cache.stride() == v_cache.stride()
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = seq_lens.shape[0]
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=q.dtype, device=q.device)
    tensors = (out, q, k_cache, v_cache, query_start_loc, seq_lens, block_tables)
    one_kind = max_query_len == 1 or num_tokens == num_seqs * max_query_len
    if max_query_len > 1:
        attention_prefill(*tensors, skip_single=not one_kind)
    if max_query_len == 1 or not one_kind:
        if workspace is None:
            workspace = attention_workspace(num_seqs, num_heads, q.device)
        head_blocks = head_blocks_of(num_heads, k_cache.shape[1])
        plan = split_plan(num_seqs, max_seq_len, head_blocks, _num_sms(q), batch_invariant)
        attention_decode(*tensors, workspace, plan)
    return out


def _num_sms(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return INTERPRETER_SMS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
