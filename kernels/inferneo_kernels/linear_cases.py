"""The linear kernels at the shapes of Llama-3.1-8B and Llama-3.2-1B, for the ahead-of-time check."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

import torch

from inferneo_kernels.aot import AotCase
from inferneo_kernels.linear import Regime, choose_tiling, launch_constants
from inferneo_kernels.linear_kernels import gate_up_silu_kernel, linear_kernel, qkv_rope_store_kernel
from inferneo_kernels.quant_decode import plane_signature
from inferneo_kernels.quant_layout import Weight

TYPES = MappingProxyType({torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"})
REGIMES: tuple[Regime, ...] = ("gemv", "tile", "wide")
KERNELS = MappingProxyType(
    {"head": linear_kernel, "add": linear_kernel, "gate_up": gate_up_silu_kernel, "qkv": qkv_rope_store_kernel}
)
SHAPES = MappingProxyType(  # rows and columns of the weight
    {
        "head": (128256, 2048),
        "add": (2048, 2048),
        "add_8b": (4096, 14336),
        "gate_up": (28672, 4096),
        "qkv": (6144, 4096),
        "qkv_small": (960, 576),
    }
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def aot_cases() -> tuple[AotCase, ...]:
    """Every verb in every regime in bf16, every block type in one verb, and the other dtypes once."""
    return tuple(_cases())


def _cases() -> Iterator[AotCase]:
    for regime in REGIMES[:2]:
        for verb in SHAPES:
            yield _case(verb, "", regime, BF16)
        yield _case("gate_up", "", regime, FP32)
    yield _case("gate_up", "", "tile", FP16)
    for regime in REGIMES:
        for quant_type in ("Q4_0", "Q5_1", "Q6_K", "Q8_0"):
            yield _case("gate_up", quant_type, regime, BF16)
        for verb in ("add_8b", "gate_up", "qkv"):
            yield _case(verb, "Q4_K", regime, BF16)
    yield _case("head", "Q6_K", "gemv", BF16)
    yield _case("gate_up", "Q4_K", "tile", FP32)


def _case(verb: str, quant_type: str, regime: Regime, dtype: torch.dtype) -> AotCase:
    """One launch as the launcher would make it, without its tensors."""
    kind = verb.partition("_")[0] if verb != "gate_up" else verb
    kernel, (num_rows, columns), model = KERNELS[kind], SHAPES[verb], TYPES[dtype]
    weight = Weight(torch.empty(num_rows, columns, device="meta"), columns, quant_type)
    tiling = choose_tiling(weight, regime, dtype)
    constexprs = launch_constants(torch.empty(0, dtype=dtype, device="meta"), weight, tiling)
    num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
    planes = plane_signature(quant_type) if quant_type else {"codes_ptr": model}
    absent = {"high_ptr", "scales_ptr", "supers_ptr", "bias_ptr", "norm_ptr" if kind == "add" else "residual_ptr"}
    special = {"positions_ptr": "*i64", "slots_ptr": "*i64", "rope_ptr": "*fp32", "eps": "fp32", **planes}
    if kind == "head":
        special["out_ptr"] = "*fp32"
    if kind == "qkv":
        constexprs["HEAD_DIM"] = 64 if verb == "qkv_small" else 128
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        given = special.get(name) or (model if name.endswith("_ptr") and name not in absent else None)
        if name.endswith("_ptr") and given is None:
            constexprs[name] = None
        else:
            signature[name] = given or "i32"
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    aligned = tuple(
        name for name in signature if name.endswith("_ptr") or name.startswith("stride") or name in ("K", "num_rows")
    )
    vector = ("ld.v4",) if regime == "gemv" else ("cp.async",) if dtype == FP32 else ("cp.async", "mma")
    name = "_".join(part for part in (verb, quant_type or model[1:], regime) if part)
    if quant_type and dtype != BF16:
        name += f"_{model[1:]}"
    return AotCase(name, kernel, signature, constexprs, num_warps, num_stages, aligned, vector)
