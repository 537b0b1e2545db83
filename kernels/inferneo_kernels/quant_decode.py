"""Codes to numbers in registers: what all kernels that read a quantised Weight share, and dequantisation to memory."""

from __future__ import annotations

from types import MappingProxyType

import triton
import triton.language as tl
from torch import Tensor

from inferneo_kernels.aot import AotCase
from inferneo_kernels.quant_layout import FORMATS, Weight

DEQUANTIZE_BLOCK = (4, 32)  # rows and quads a program: a warp a row


@triton.jit
def code_place(INDEX: tl.constexpr, BITS: tl.constexpr):
    """The bit of the mantissa where a code stands: its bit in the word, or in the word shifted right by 12 or 16."""
    PLACE: tl.constexpr = (8 * (INDEX % 2)) if BITS == 8 else (4 * INDEX if INDEX < 5 else 4 * INDEX - 12)
    return PLACE


@triton.jit
def code_floats(words, high, INDEX: tl.constexpr, BITS: tl.constexpr):
    """Code INDEX of each word as a subnormal fp32: code * 2 ** (place - 149), by masking alone.

    Multiply-adds take subnormal operands at full rate, so a weight costs a mask and a multiply-add. Conversions from
    int run at a quarter of that rate; the usual magic exponent takes two more operations.

    Args:
        words: int32 tensor.
        high: for 5 and 6 bits, the integer tensor of the codes' upper bits; otherwise anything.
    """
    PLACE: tl.constexpr = code_place(INDEX, BITS)
    LOW_BITS: tl.constexpr = 8 if BITS == 8 else 4
    field = (words >> (LOW_BITS * INDEX - PLACE)) & (((1 << LOW_BITS) - 1) << PLACE)
    if BITS == 5:
        field |= (high.to(tl.int32) << (PLACE + 4 - INDEX)) & (1 << (PLACE + 4))
    if BITS == 6:
        field |= (high.to(tl.int32) << (PLACE + 4 - 2 * INDEX)) & (3 << (PLACE + 4))
    return field.to(tl.float32, bitcast=True)


@triton.jit
def half_of(packed, HIGH: tl.constexpr):
    """One of the two fp16 in an int32, as fp32."""
    bits = (packed >> 16 if HIGH else packed).to(tl.int16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def quad_scales(
    scales_ptr, supers_ptr, rows, quads, mask, K, PART: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr
):
    """The scale and the shift of each quad: w = code * scale + shift.

    Where the format has no minimum, the shift is -2 ** (BITS - 1) * scale.

    Args:
        rows: [BLOCK_N, 1] int64.
        quads: [1, num_quads], places in the row.
        mask: [BLOCK_N, num_quads].
        PART: which 16 columns of the quad; "d_sc" alone tells them apart.
    Returns:
        Two [BLOCK_N, num_quads] fp32.
    """
    blocks = quads // 2 if BITS == 8 else quads  # of 32 columns
    if SCALES == "d":
        scale = tl.load(scales_ptr + rows * (K // 32) + blocks, mask=mask, other=0.0).to(tl.float32)
        shift = -scale * (1 << (BITS - 1))
    elif SCALES == "d_m":
        pair = tl.load(scales_ptr + rows * (K // 32) + blocks, mask=mask, other=0)
        scale, shift = half_of(pair, False), half_of(pair, True)
    elif SCALES == "d_sc":
        d = tl.load(supers_ptr + rows * (K // 256) + blocks // 8, mask=mask, other=0.0).to(tl.float32)
        scale = d * tl.load(scales_ptr + rows * (K // 16) + blocks * 2 + PART, mask=mask, other=0).to(tl.float32)
        shift = -scale * (1 << (BITS - 1))
    else:
        pair = tl.load(supers_ptr + rows * (K // 256) + blocks // 8, mask=mask, other=0)
        small = tl.load(scales_ptr + rows * (K // 32) + blocks, mask=mask, other=0).to(tl.int32)
        scale = half_of(pair, False) * (small & 255).to(tl.float32)
        shift = -half_of(pair, True) * ((small >> 8) & 255).to(tl.float32)
    return scale, shift


@triton.jit
def dequantized(words, high, scale, shift, INDEX: tl.constexpr, BITS: tl.constexpr):
    """Column INDEX of each word in fp32, to the bit what GGUF defines (a zero may have the other sign)."""
    code = code_floats(words, high, INDEX, BITS) * 2.0**126  # normal again; the rest of its exponent goes to the scale
    return code * (scale * 2.0 ** (23 - code_place(INDEX, BITS))) + shift


@triton.jit
def quad_words(plane_ptr, rows, quads, mask, K, BITS: tl.constexpr):
    """The four words of each quad, or the entries beside them in `high`: [BLOCK_N, num_quads, 4].

    Args:
        plane_ptr: codes or high.
        rows: [BLOCK_N, 1] int64.
        quads: [1, num_quads].
        mask: [BLOCK_N, num_quads].
    """
    row_quads = K // 16 if BITS == 8 else K // 32
    places = ((rows * row_quads + quads) * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    return tl.load(plane_ptr + places, mask=mask[:, :, None], other=0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["num_rows", "first_row"])
def dequantize_kernel(
    codes_ptr,
    high_ptr,
    scales_ptr,
    supers_ptr,
    rows_ptr,
    out_ptr,
    num_rows,
    first_row,
    K,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_QUADS: tl.constexpr,
):
    """out[i] = row rows[i], or row first_row + i. Grid: (row tiles, quad tiles)."""
    CODES: tl.constexpr = 4 if BITS == 8 else 8  # in a word
    out_rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    quads = (tl.program_id(1) * BLOCK_QUADS + tl.arange(0, BLOCK_QUADS))[None, :]
    mask = (out_rows < num_rows)[:, None] & (quads < K // (CODES * 4))
    if rows_ptr is None:
        rows = (first_row + out_rows).to(tl.int64)[:, None]
    else:
        rows = tl.load(rows_ptr + out_rows, mask=out_rows < num_rows, other=0)[:, None]
    words = quad_words(codes_ptr, rows, quads, mask, K, BITS)
    high = words if high_ptr is None else quad_words(high_ptr, rows, quads, mask, K, BITS)
    scale, shift = quad_scales(scales_ptr, supers_ptr, rows, quads, mask, K, 0, BITS, SCALES)
    places = out_rows.to(tl.int64)[:, None] * K + quads * (CODES * 4)
    places = places[:, :, None] + tl.arange(0, 4)[None, None, :]  # [BLOCK_N, BLOCK_QUADS, 4]
    for i in tl.static_range(CODES):
        if SCALES == "d_sc" and i == CODES // 2:
            scale, shift = quad_scales(scales_ptr, supers_ptr, rows, quads, mask, K, 1, BITS, SCALES)
        value = dequantized(words, high, scale[:, :, None], shift[:, :, None], i, BITS)
        tl.store(out_ptr + places + 4 * i, value.to(out_ptr.dtype.element_ty), mask=mask[:, :, None])


def dequantize_into(out: Tensor, weight: Weight, first_row: int = 0, rows: Tensor | None = None) -> Tensor:
    """Rows of a quantised weight, dense.

    Args:
        out: [num_rows, weight.in_features] to fill, model dtype, contiguous.
        weight: quantised.
        first_row: out begins with this row of the weight.
        rows: [num_rows] int64, the rows to take in this order: an embedding's lookup. None: in order from first_row.
    Returns:
        out.
    """
    codes, high, scales, supers = weight.planes
    layout = FORMATS[weight.quant_type]
    num_rows = out.shape[0]
    block_n, block_quads = DEQUANTIZE_BLOCK
    num_quads = weight.in_features // (16 if layout.bits == 8 else 32)
    grid = (triton.cdiv(num_rows, block_n), triton.cdiv(num_quads, block_quads))
    dequantize_kernel[grid](
        codes,
        high,
        scales,
        supers,
        rows,
        out,
        num_rows,
        first_row,
        weight.in_features,
        BITS=layout.bits,
        SCALES=layout.scales,
        BLOCK_N=block_n,
        BLOCK_QUADS=block_quads,
        num_warps=4,
    )
    return out


PLANE_TYPES = MappingProxyType(
    {
        "d": {"scales_ptr": "*fp16"},
        "d_m": {"scales_ptr": "*i32"},
        "d_sc": {"scales_ptr": "*i8", "supers_ptr": "*fp16"},
        "d_sc_m": {"scales_ptr": "*i16", "supers_ptr": "*i32"},
    }
)


def plane_signature(quant_type: str) -> dict[str, str | None]:
    """The kernels' plane arguments of a quantised Weight as Triton types; None for those it lacks."""
    layout = FORMATS[quant_type]
    high = {5: "*u8", 6: "*i16"}.get(layout.bits)
    planes = dict.fromkeys(("codes_ptr", "high_ptr", "scales_ptr", "supers_ptr"))
    return {**planes, "codes_ptr": "*i32", "high_ptr": high, **PLANE_TYPES[layout.scales]}


def aot_cases() -> tuple[AotCase, ...]:
    """Slabs of every format, and an embedding's rows, to bf16."""
    cases = []
    for quant_type, layout in FORMATS.items():
        planes = plane_signature(quant_type)
        for rows in (None, "*i64") if quant_type == "Q6_K" else (None,):
            types = {
                **planes,
                "rows_ptr": rows,
                "out_ptr": "*bf16",
                **dict.fromkeys(("num_rows", "first_row", "K"), "i32"),
            }
            signature = {name: kind for name, kind in types.items() if kind is not None}
            constexprs: dict[str, object] = {name: None for name, kind in types.items() if kind is None}
            constexprs |= {"BITS": layout.bits, "SCALES": layout.scales}
            constexprs |= dict(zip(("BLOCK_N", "BLOCK_QUADS"), DEQUANTIZE_BLOCK, strict=True))
            aligned = (*(name for name in signature if name.endswith("_ptr")), "K")
            name = f"{quant_type}_rows" if rows else quant_type
            cases.append(AotCase(name, dequantize_kernel, signature, constexprs, 4, 1, aligned, ("ld.v4",)))
    return tuple(cases)
