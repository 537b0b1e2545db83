"""The linear verbs: projections with their norms, rotations, cache writes, activations and residuals.

Each launcher takes x [num_tokens, in_features] and serves it in one of four regimes:

| regime | a program holds | weights go through | made for |
|---|---|---|---|
| gemv | 1 token | fp32 multiply-adds | num_tokens = 1 |
| tile | 16 tokens | tensor cores | up to 16 |
| wide | 64 tokens | tensor cores | quantised weights up to 64 |
| vendor | all | the vendor's GEMM, between elementwise kernels | the rest |

"auto" takes the first that SWITCH_OVER admits. Any regime is right for any number of tokens, and within gemv, tile and
wide a token's result does not depend on its neighbours to the last bit: a batch-invariant engine names "tile" always.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from inferneo_kernels.elementwise import add_, rms_norm, rope_store, silu_mul
from inferneo_kernels.linear_kernels import gate_up_silu_kernel, linear_kernel, qkv_rope_store_kernel
from inferneo_kernels.quant_decode import dequantize_into
from inferneo_kernels.quant_layout import FORMATS, Weight

Regime = Literal["auto", "gemv", "tile", "wide", "vendor"]

# The most tokens that a regime serves under "auto"; the vendor's GEMM serves more. Defaults: tensor cores pad tokens to
# 16, and a quantised weight is worth unpacking in registers until the products outweigh the bytes saved.
SWITCH_OVER: MappingProxyType[str, dict[Regime, int]] = MappingProxyType(
    {"dense": {"gemv": 1, "tile": 16}, "quantised": {"gemv": 1, "tile": 16, "wide": 64}}
)
BLOCK_M: MappingProxyType[Regime, int] = MappingProxyType({"gemv": 1, "tile": 16, "wide": 64})

# Elements dequantised at once for the vendor's GEMM: 128 MiB in bf16 bounds the scratch at any vocabulary.
SCRATCH_ELEMENTS = 1 << 26


class Tiling(NamedTuple):
    """A kernel's configuration: weight rows, tokens and columns a program, warps, and loads in flight."""

    block_n: int
    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


def choose_regime(weights: Sequence[Weight], num_tokens: int) -> Regime:
    """The regime of "auto": the first that SWITCH_OVER admits for so many tokens."""
    kind = "quantised" if any(weight.quant_type for weight in weights) else "dense"
    admitted = (regime for regime, limit in SWITCH_OVER[kind].items() if num_tokens <= limit)
    return next(admitted, "vendor")


def choose_tiling(weight: Weight, regime: Regime, dtype: torch.dtype) -> Tiling:
    """A configuration by the weight's shape and type and the model dtype; never by the number of tokens.

    Registers and spills are those of `make aot-report`; which shape is fastest waits for a GPU.
    """
    bits = FORMATS[weight.quant_type].bits if weight.quant_type else 0
    num_rows, block_m = weight.num_rows, BLOCK_M[regime]
    if regime == "gemv" and not bits:
        # Eight columns a thread and four rows: 71 registers. Any shape in which two warps share a column makes Triton
        # move the weights through shared memory on every step.
        num_warps = 4 if weight.in_features >= 1024 else 2
        return Tiling(4, block_m, 256 * num_warps, num_warps, 1)
    if regime == "gemv":
        # A quad a thread and row. 8 rows share the work on x; 5 and 6 bits take 240 registers for 8, 168 for 4.
        columns = 512 if bits == 8 else 1024  # of a warp
        num_warps = 2 if weight.in_features >= 2 * columns else 1
        return Tiling(8 if bits in (4, 8) and num_rows > 8192 else 4, block_m, columns * num_warps, num_warps, 1)
    if dtype == torch.float32:  # no tensor cores: larger tiles spill
        return Tiling(32, 16, 256 if bits else 64, 4, 3)
    if regime == "wide":  # 4 warps, or 256 columns of wider codes, spill on sm_80 and sm_120
        return Tiling(64, block_m, 256 if bits == 4 else 128 if bits else 64, 8, 3)
    # Few rows make few programs, so their tiles are narrow: 2048 rows still occupy 128 SMs. 64 is wgmma's long side.
    block_n = 16 if num_rows <= 4096 else 32 if num_rows <= 8192 else 64
    if bits:
        return Tiling(block_n, block_m, 256, 4, 3 if block_n == 64 else 4)
    return Tiling(block_n, block_m, 128 if block_n == 64 else 256, 4, 4)


def linear_add(
    x: Tensor, weights: Sequence[Weight], bias: Tensor | None, residual: Tensor | None, *, regime: Regime = "auto"
) -> Tensor:
    """x @ weight.T + bias + residual.

    Args:
        x: [num_tokens, in_features], model dtype, innermost stride 1.
        weights: the rows, in as few Weights as their types allow (`quant_layout.merge`).
        bias: [out_features], model dtype, or None.
        residual: [num_tokens, out_features], model dtype, innermost stride 1, or None.
        regime: which way; "auto" by SWITCH_OVER.
    Returns:
        [num_tokens, out_features], model dtype.
    """
    regime = choose_regime(weights, x.shape[0]) if regime == "auto" else regime
    out = _empty(x, sum(weight.num_rows for weight in weights))
    if regime == "vendor":
        return _vendor(x, weights, bias, residual, out)
    return _linear(x, None, 0.0, weights, bias, residual, out, regime)


def lm_head(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weights: Sequence[Weight],
    bias: Tensor | None,
    *,
    regime: Regime = "auto",
) -> Tensor:
    """rms_norm(x) @ weight.T + bias, never rounded to the model dtype.

    Args:
        x: [num_rows, hidden_size], model dtype, innermost stride 1.
        norm_weight, eps: the RMSNorm's, [hidden_size] in the model dtype.
        weights, bias, regime: as in linear_add.
    Returns:
        [num_rows, vocab_size] fp32.
    """
    regime = choose_regime(weights, x.shape[0]) if regime == "auto" else regime
    logits = _empty(x, sum(weight.num_rows for weight in weights), torch.float32)
    if x.dtype != torch.float32 and not (x.is_cuda and bias is None):  # no other vendor GEMM widens its result
        regime = "wide" if regime == "vendor" else regime
    if regime == "vendor":
        return _vendor(rms_norm(x, norm_weight, eps), weights, bias, None, logits)
    return _linear(x, norm_weight, eps, weights, bias, None, logits, regime)


def gate_up_silu(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weights: Sequence[Weight],
    bias: Tensor | None,
    *,
    regime: Regime = "auto",
) -> Tensor:
    """silu(gate) * up of the stacked projections of rms_norm(x).

    Args:
        x: [num_tokens, hidden_size], model dtype, innermost stride 1.
        norm_weight, eps: the RMSNorm's, [hidden_size] in the model dtype.
        weights: [2 * intermediate_size, hidden_size], gate's rows before up's.
        bias: [2 * intermediate_size], model dtype, or None.
        regime: as in linear_add.
    Returns:
        [num_tokens, intermediate_size], model dtype.
    """
    regime = choose_regime(weights, x.shape[0]) if regime == "auto" else regime
    num_rows = sum(weight.num_rows for weight in weights)
    if regime == "vendor":
        return silu_mul(_vendor(rms_norm(x, norm_weight, eps), weights, bias, None, _empty(x, num_rows)))
    if len(weights) > 1:  # gate and up of different types: no program can hold both
        return silu_mul(_linear(x, norm_weight, eps, weights, bias, None, _empty(x, num_rows), regime))
    (weight,) = weights
    tiling = choose_tiling(weight, regime, x.dtype)
    out = _empty(x, num_rows // 2)
    gate_up_silu_kernel[_grid(num_rows, x.shape[0], tiling)](
        x,
        norm_weight,
        *weight.planes,
        bias,
        out,
        eps,
        x.shape[0],
        num_rows // 2,
        weight.in_features,
        x.stride(0),
        out.stride(0),
        **launch_constants(x, weight, tiling),
    )
    return out


def qkv_rope_store(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weights: Sequence[Weight],
    bias: Tensor | None,
    positions: Tensor,
    rope: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    regime: Regime = "auto",
) -> Tensor:
    """RMSNorm, the Q, K and V projections, RoPE on Q and K, K and V into their slots.

    Args:
        x: [num_tokens, hidden_size], model dtype, innermost stride 1.
        norm_weight, eps: the RMSNorm's, [hidden_size] in the model dtype.
        weights: [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]; each Weight holds whole heads.
        bias: one entry a row, model dtype, or None.
        positions: [num_tokens] int64.
        rope: [max_model_len, head_dim] fp32, contiguous; cosines, then sines.
        k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], of equal strides, the innermost 1; written.
        slot_mapping: [num_tokens] int64; -1 writes nothing.
        regime: as in linear_add.
    Returns:
        q: [num_tokens, num_heads, head_dim], model dtype, rotated.
    """
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(3) == 1
    regime = choose_regime(weights, x.shape[0]) if regime == "auto" else regime
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    num_rows = sum(weight.num_rows for weight in weights)
    num_heads = num_rows // head_dim - 2 * num_kv_heads
    if regime == "vendor":
        qkv = _vendor(rms_norm(x, norm_weight, eps), weights, bias, None, _empty(x, num_rows))
        return rope_store(qkv, positions, rope, k_cache, v_cache, slot_mapping, num_heads)
    q = torch.empty(x.shape[0], num_heads, head_dim, dtype=x.dtype, device=x.device)
    first_head = 0
    for weight in weights:
        tiling = choose_tiling(weight, regime, x.dtype)
        qkv_rope_store_kernel[_grid(weight.num_rows, x.shape[0], tiling)](
            x,
            norm_weight,
            *weight.planes,
            bias,
            positions,
            rope,
            slot_mapping,
            q,
            k_cache,
            v_cache,
            eps,
            x.shape[0],
            weight.num_rows,
            first_head,
            num_heads,
            num_kv_heads,
            weight.in_features,
            x.stride(0),
            q.stride(0),
            *k_cache.stride()[:3],
            block_size,
            HEAD_DIM=head_dim,
            **launch_constants(x, weight, tiling),
        )
        first_head += weight.num_rows // head_dim
    return q


def _linear(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weights: Sequence[Weight],
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    regime: Regime,
) -> Tensor:
    """out = norm(x) @ weight.T + bias + residual, a launch a Weight."""
    row = 0
    for weight in weights:
        rows = slice(row, row + weight.num_rows)
        tiling = choose_tiling(weight, regime, x.dtype)
        linear_kernel[_grid(weight.num_rows, x.shape[0], tiling)](
            x,
            norm_weight,
            *weight.planes,
            None if bias is None else bias[rows],
            None if residual is None else residual[:, rows],
            out[:, rows],
            eps,
            x.shape[0],
            weight.num_rows,
            weight.in_features,
            x.stride(0),
            out.stride(0),
            0 if residual is None else residual.stride(0),
            **launch_constants(x, weight, tiling),
        )
        row = rows.stop
    return out


def _vendor(x: Tensor, weights: Sequence[Weight], bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    """out = x @ weight.T + bias + residual by the vendor's GEMM, quantised rows dequantised slab by slab before it."""
    row = 0
    for weight in weights:
        slab_rows = max(1, SCRATCH_ELEMENTS // weight.in_features) if weight.quant_type else weight.num_rows
        for first in range(0, weight.num_rows, slab_rows):
            num_rows = min(slab_rows, weight.num_rows - first)
            columns = slice(row, row + num_rows)
            matrix = dequantize_into(_scratch(x, num_rows), weight, first) if weight.quant_type else weight.codes
            addend = bias[columns] if bias is not None else None if residual is None else residual[:, columns]
            _matmul(x, matrix, addend, out[:, columns])
            row += num_rows
    return add_(out, residual) if bias is not None and residual is not None else out


def _matmul(x: Tensor, matrix: Tensor, addend: Tensor | None, out: Tensor) -> None:
    """out = x @ matrix.T + addend, which is a row, a matrix or None; a wider out takes the sums unrounded."""
    if out.dtype != x.dtype:
        assert addend is None
        torch.mm(x, matrix.t(), out.dtype, out=out)
    elif addend is None:
        torch.mm(x, matrix.t(), out=out)
    else:
        torch.addmm(addend, x, matrix.t(), out=out)


def _scratch(x: Tensor, num_rows: int) -> Tensor:
    """Room for a slab of dense rows; the allocator hands every layer the same bytes."""
    return torch.empty(num_rows, x.shape[1], dtype=x.dtype, device=x.device)


def _empty(x: Tensor, num_columns: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape[0], num_columns, dtype=dtype or x.dtype, device=x.device)


def _grid(num_rows: int, num_tokens: int, tiling: Tiling) -> tuple[int]:
    return (triton.cdiv(num_rows, tiling.block_n) * triton.cdiv(num_tokens, tiling.block_m),)


def launch_constants(x: Tensor, weight: Weight, tiling: Tiling) -> dict[str, Any]:
    """The constexpr arguments that the kernels share, and the launch options."""
    layout = FORMATS[weight.quant_type] if weight.quant_type else None
    return {
        "BITS": layout.bits if layout else 0,
        "SCALES": layout.scales if layout else "",
        "BLOCK_N": tiling.block_n,
        "BLOCK_M": tiling.block_m,
        "BLOCK_K": tiling.block_k,
        "DOT_FP32": x.dtype == torch.float32 or x.device.type == "cpu",  # the interpreter has no bf16 dot
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }
