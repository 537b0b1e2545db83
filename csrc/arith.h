// The arithmetic that every backend shares, bit for bit. inferneo_core/ops/torch_sampling.py defines it; the names
// match.
//
// Everything is branch-free and always inlined, so that the loops of passes.cpp vectorise for whichever instruction set
// they are compiled for. The extension is built with -ffp-contract=off: a fused multiply-add would change the bits.
#pragma once

#include <cstdint>
#include <cstring>

#define INFERNEO_INLINE inline __attribute__((always_inline))

namespace inferneo {

struct BFloat16 {
  uint16_t bits;
};

INFERNEO_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

INFERNEO_INLINE float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

INFERNEO_INLINE float to_float(float x) { return x; }
INFERNEO_INLINE float to_float(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

// A logit over the temperature. Adding 0 turns -0 into +0, so that equal floats have equal keys.
template <class T>
INFERNEO_INLINE float scaled(T x, float inv_temperature) {
  return to_float(x) * inv_temperature + 0.0f;
}

// Signed integers in the order of the floats they stand for: integer maxima vectorise, float maxima with NaN do not.
INFERNEO_INLINE int32_t ordered_key(float x) {
  const auto bits = static_cast<int32_t>(float_bits(x));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

INFERNEO_INLINE float key_float(int32_t key) {
  return bits_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

constexpr int32_t kNegativeInfinityKey = static_cast<int32_t>(0x807fffff);  // ordered_key(-inf)
constexpr uint32_t kInfinityBits = 0x7f800000;

// A token in the sampler's total order, value descending and id ascending, is one integer: larger comes first.
using TokenKey = uint64_t;

INFERNEO_INLINE TokenKey token_key(int32_t key, uint32_t id) {
  return static_cast<uint64_t>(static_cast<uint32_t>(key) ^ 0x80000000u) << 32 | static_cast<uint32_t>(~id);
}

INFERNEO_INLINE int32_t value_key(TokenKey token) {
  return static_cast<int32_t>(static_cast<uint32_t>(token >> 32) ^ 0x80000000u);
}
INFERNEO_INLINE float value_of(TokenKey token) { return key_float(value_key(token)); }
INFERNEO_INLINE uint32_t id_of(TokenKey token) { return ~static_cast<uint32_t>(token); }

constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -0.00021219444170128554f;
constexpr int64_t kUnitMass = int64_t{1} << 40;

// 2**n * poly: exp(d) for d <= 0 as its two factors.
struct ScaledExp {
  float poly;
  int32_t n;
};

constexpr float kLowestExponent = -28.0f;  // what is below counts as this
constexpr float kLog2E = 1.4426950216293335f;
constexpr float kRoundToInt = 12582912.0f;  // added and taken away again, it leaves a float's nearest integer

// out = exp(r) for |r| <= log(2) / 2; F is float or a vector of floats.
template <class F>
INFERNEO_INLINE void exp_polynomial(const F& r, F& out) {
  F q = r * 0.0013933650916442275f + 0.008363179862499237f;
  q = q * r + 0.04166646674275398f;
  q = q * r + 0.16666576266288757f;
  q = q * r + 0.5f;
  out = ((q * r) * r + r) + 1.0f;
}

INFERNEO_INLINE ScaledExp exp_parts(float d) {
  d = d > kLowestExponent ? d : kLowestExponent;
  const float n = (d * kLog2E + kRoundToInt) - kRoundToInt;
  const float r = (d - n * kLn2High) - n * kLn2Low;
  ScaledExp parts{0.0f, static_cast<int32_t>(n)};
  exp_polynomial(r, parts.poly);
  return parts;
}

INFERNEO_INLINE float exp_float(float d) {
  const ScaledExp e = exp_parts(d);
  return e.poly * bits_float(static_cast<uint32_t>(e.n + 127) << 23);
}

// trunc(exp(d) * 2**40), from the float's own bits: AVX2 shifts 64-bit lanes but cannot convert floats to them.
INFERNEO_INLINE int64_t weight(float d) {
  const ScaledExp e = exp_parts(d);
  const uint32_t bits = float_bits(e.poly);
  const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  const int32_t shift = 127 - static_cast<int32_t>(bits >> 23) - e.n;  // in [0, 42]
  return static_cast<int64_t>((mantissa << 17) >> shift);
}

INFERNEO_INLINE float difference(float z, float largest) { return z == largest ? 0.0f : z - largest; }

INFERNEO_INLINE float log1p_scaled(float f, float exponent) {
  float q = 0.07149753719568253f;
  q = q * f + -0.115712009370327f;
  q = q * f + 0.11661510914564133f;
  q = q * f + -0.12411050498485565f;
  q = q * f + 0.14249937236309052f;
  q = q * f + -0.1666848063468933f;
  q = q * f + 0.20000708103179932f;
  q = q * f + -0.24999989569187164f;
  q = q * f + 0.3333333134651184f;
  const float square = f * f;
  const float tail = ((f * square) * q + exponent * kLn2Low) - square * 0.5f;
  return (f + tail) + exponent * kLn2High;
}

struct Reduced {  // v = (1 + f) * 2**exponent
  float f;
  float exponent;
};

INFERNEO_INLINE Reduced reduce_log(float v) {
  const uint32_t bits = float_bits(v) + (0x3f800000u - 0x3f3504f3u);
  const float mantissa = bits_float((bits & 0x7fffffu) + 0x3f3504f3u);
  return {mantissa - 1.0f, static_cast<float>(static_cast<int32_t>(bits >> 23) - 127)};
}

INFERNEO_INLINE float log_float(float v) {
  const Reduced r = reduce_log(v);
  return log1p_scaled(r.f, r.exponent);
}

// -log(-log(v)) for the uniform v = (x + 0.5) * 2**-32 of a random word.
INFERNEO_INLINE float gumbel(uint32_t x) {
  constexpr float kUnit = 0x1p-32f;
  const Reduced r = reduce_log((static_cast<float>(x) + 0.5f) * kUnit);
  const float near_one = -((static_cast<float>(~x) + 0.5f) * kUnit);
  const bool near = x >= 0xb504f334u;
  const float exponential = -log1p_scaled(near ? near_one : r.f, near ? 0.0f : r.exponent);
  return -log_float(exponential);
}

constexpr float kMaxGumbel = 23.0f;  // above gumbel(0xffffffff), about 22.9

struct PhiloxWords {
  uint32_t x[4];
};

struct DrawKey {  // what fixes the draw of one row
  uint32_t seed_low, seed_high, position, choice;
};

// Philox4x32-10 at counter (position, block, choice, 0). Source: Salmon et al., doi 10.1145/2063384.2063405.
INFERNEO_INLINE PhiloxWords philox(const DrawKey& key, uint32_t block, uint32_t counter3 = 0) {
  uint32_t c0 = key.position, c1 = block, c2 = key.choice, c3 = counter3;
  uint32_t k0 = key.seed_low, k1 = key.seed_high;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * 0xd2511f53u;
    const uint64_t product1 = static_cast<uint64_t>(c2) * 0xcd9e8d57u;
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c0 = next0;
    c1 = static_cast<uint32_t>(product1);
    c2 = next2;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace inferneo
