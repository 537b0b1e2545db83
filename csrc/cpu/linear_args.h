// A packed weight as an operator's argument.
#pragma once

#include "../tensor_args.h"
#include "pack.h"

namespace inferneo {

// The PackedLinear at the start of a uint8 tensor that pack_linear filled. Valid while the tensor lives.
inline const PackedLinear& packed_linear_of(const Tensor& packed) {
  check(packed.is_cpu() && packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte &&
            packed.numel() >= static_cast<int64_t>(sizeof(PackedLinear)),
        "a packed weight is a contiguous uint8 CPU tensor; prepare() makes one");
  const auto* linear = static_cast<const PackedLinear*>(packed.const_data_ptr());
  check(reinterpret_cast<uintptr_t>(linear) % 64 == 0 && linear->magic == kPackedMagic &&
            linear->num_bytes <= packed.numel(),
        "this tensor is no packed weight; prepare() makes one");
  return *linear;
}

// That unpack_rows can give the weight's rows.
inline void check_keeps_rows(const PackedLinear& linear) {
  check(linear.keeps_rows,
        "this weight was prepared for products only; prepare(linear, keeps_rows=True) keeps its rows");
}

}  // namespace inferneo
