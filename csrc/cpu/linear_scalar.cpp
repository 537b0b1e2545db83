// The definition: one row at a time, in plain C++.
#include <cmath>

#include "linear_task.h"

namespace inferneo {
namespace {

struct Scalar {
  static constexpr int kRows = 1;
  static constexpr int kTokens = 4;
  static constexpr int kPairTokens = 4;
  static constexpr int dots_in_words(int) { return 0; }
  static constexpr bool kSignedBytes = false;
  using Floats = float;
  using Ints = uint32_t;  // an int32 in two's complement, or four codes

  static Floats zero() { return 0.0f; }
  static Ints zero_ints() { return 0; }
  static Floats broadcast(const float* x) { return *x; }
  static Ints broadcast(const int32_t* x) { return static_cast<Ints>(*x); }
  static Floats load_floats(const void* p) { return load_as<float>(p); }
  static Ints load(const uint8_t* p) { return load_as<Ints>(p); }
  static Floats halves(const uint8_t* p) { return half_float(load_as<uint16_t>(p)); }
  static Floats unsigned_bytes(const uint8_t* p) { return static_cast<float>(*p); }
  static Floats signed_bytes(const uint8_t* p) { return static_cast<float>(static_cast<int8_t>(*p)); }
  static Floats low_bf16(Ints pairs) { return bits_float(pairs << 16); }
  static Floats high_bf16(Ints pairs) { return bits_float(pairs & 0xffff0000u); }
  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats sub(Floats a, Floats b) { return a - b; }
  static Ints sub(Ints a, Ints b) { return a - b; }
  static Floats mul(Floats a, Floats b) { return a * b; }
  static Floats fma(Floats a, Floats b, Floats c) { return std::fma(a, b, c); }
  static Floats bf16(const uint8_t* p) { return bits_float(uint32_t{load_as<uint16_t>(p)} << 16); }
  static Ints add(Ints a, Ints b) { return a + b; }
  // Words of 16 bits, two to an int32.
  static Ints flip_low_sign(Ints x) { return x ^ 0x8000u; }
  // a * b / 2**15, rounded.
  static Ints scale_words(Ints a, Ints b) {
    const auto scale = [](int32_t x, int32_t y) { return static_cast<uint32_t>((x * y + (1 << 14)) >> 15); };
    return words(scale(high(a), high(b)), scale(low(a), low(b)));
  }
  static Ints dot_words(Ints a, Ints b) { return add_dot_words(0, a, b); }
  static Ints add_dot_words(Ints sum, Ints a, Ints b) {
    return sum + static_cast<Ints>(high(a) * high(b)) + static_cast<Ints>(low(a) * low(b));
  }
  static Floats to_floats(Ints x) { return static_cast<float>(static_cast<int32_t>(x)); }
  template <int kBits>
  static Ints shift_left(Ints x) {
    return x << kBits;
  }
  static Ints low_nibbles(Ints codes) { return codes & 0x0f0f0f0fu; }
  static Ints high_nibbles(Ints codes) { return codes >> 4 & 0x0f0f0f0fu; }
  // value to every byte whose bit of the mask is set.
  template <int kValue>
  static Ints add_where(Ints codes, uint64_t mask) {
    for (int i = 0; i < 4; ++i) codes += static_cast<Ints>(mask >> i & 1) * kValue << 8 * i;
    return codes;
  }
  static Ints dot(Ints sum, Ints codes, const int8_t* x) {
    for (int i = 0; i < 4; ++i) sum += (codes >> 8 * i & 255) * static_cast<Ints>(int32_t{x[i]});
    return sum;
  }
  static Ints dot_bytes(Ints sum, Ints codes, const int8_t* x) { return dot(sum, codes, x); }
  static int32_t sum_of_16(const int8_t* codes) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += codes[i];
    return sum;
  }
  static void store(float* out, Floats x) { *out = x; }
  static void prefetch(const uint8_t*, int64_t) {}

 private:
  static int32_t high(Ints x) { return static_cast<int32_t>(x) >> 16; }
  static int32_t low(Ints x) { return static_cast<int16_t>(x & 0xffffu); }
  static Ints words(uint32_t high, uint32_t low) { return high << 16 | (low & 0xffffu); }
};

}  // namespace
}  // namespace inferneo

#include "linear_kernels.h"

namespace inferneo {

extern const LinearKernels kScalarLinear;
const LinearKernels kScalarLinear = kLinearKernels<Scalar>;

}  // namespace inferneo
