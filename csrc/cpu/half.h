// fp16 as stored in files and packed weights, exact to fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include "../arith.h"

namespace inferneo {

INFERNEO_INLINE float half_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 31;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2**-24 is exact
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t biased = exponent == 31 ? 255 : exponent + 112;
  return bits_float(sign | biased << 23 | mantissa << 13);
}

template <class T>
INFERNEO_INLINE T load_as(const void* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

}  // namespace inferneo
