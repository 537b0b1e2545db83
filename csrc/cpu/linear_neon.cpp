// Eight rows at a time, in two registers each: NEON with dot products (FEAT_DotProd, of most ARM CPUs since 2018).
#include "linear_task.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace inferneo {
namespace {

struct Neon {
  static constexpr int kRows = 8;
  static constexpr int kTokens = 4;  // 32 registers: 4 tokens' integers and floats, and as much again at hand
  static constexpr int kPairTokens = 4;
  static constexpr int dots_in_words(int) { return 0; }
  static constexpr bool kSignedBytes = true;
  struct Floats {
    float32x4_t low, high;
  };
  struct Ints {
    int32x4_t low, high;
  };

  INFERNEO_INLINE static Floats zero() { return {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}; }
  INFERNEO_INLINE static Ints zero_ints() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
  INFERNEO_INLINE static Floats broadcast(const float* x) { return {vld1q_dup_f32(x), vld1q_dup_f32(x)}; }
  INFERNEO_INLINE static Ints broadcast(const int32_t* x) { return {vld1q_dup_s32(x), vld1q_dup_s32(x)}; }
  INFERNEO_INLINE static Floats load_floats(const void* p) {
    return {vld1q_f32(static_cast<const float*>(p)), vld1q_f32(static_cast<const float*>(p) + 4)};
  }
  INFERNEO_INLINE static Ints load(const uint8_t* p) {
    return {vreinterpretq_s32_u8(vld1q_u8(p)), vreinterpretq_s32_u8(vld1q_u8(p + 16))};
  }
  INFERNEO_INLINE static Floats halves(const uint8_t* p) {
    const float16x8_t halves = vreinterpretq_f16_u8(vld1q_u8(p));
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
  }
  INFERNEO_INLINE static Floats unsigned_bytes(const uint8_t* p) {
    const uint16x8_t words = vmovl_u8(vld1_u8(p));
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(words))), vcvtq_f32_u32(vmovl_high_u16(words))};
  }
  INFERNEO_INLINE static Floats signed_bytes(const uint8_t* p) {
    const int16x8_t words = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))};
  }
  INFERNEO_INLINE static Floats bf16(const uint8_t* p) {
    const uint16x8_t words = vreinterpretq_u16_u8(vld1q_u8(p));
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(words, 16))};
  }
  INFERNEO_INLINE static Floats low_bf16(Ints pairs) {
    const Ints shifted = shift_left<16>(pairs);
    return {vreinterpretq_f32_s32(shifted.low), vreinterpretq_f32_s32(shifted.high)};
  }
  INFERNEO_INLINE static Floats high_bf16(Ints pairs) {
    const int32x4_t mask = vdupq_n_s32(static_cast<int32_t>(0xffff0000u));
    return {vreinterpretq_f32_s32(vandq_s32(pairs.low, mask)), vreinterpretq_f32_s32(vandq_s32(pairs.high, mask))};
  }
  INFERNEO_INLINE static Floats add(Floats a, Floats b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  INFERNEO_INLINE static Floats sub(Floats a, Floats b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
  INFERNEO_INLINE static Floats mul(Floats a, Floats b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  INFERNEO_INLINE static Floats fma(Floats a, Floats b, Floats c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  INFERNEO_INLINE static Ints add(Ints a, Ints b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
  INFERNEO_INLINE static Ints sub(Ints a, Ints b) { return {vsubq_s32(a.low, b.low), vsubq_s32(a.high, b.high)}; }
  INFERNEO_INLINE static Floats to_floats(Ints x) { return {vcvtq_f32_s32(x.low), vcvtq_f32_s32(x.high)}; }
  // Words of 16 bits, two to an int32.
  INFERNEO_INLINE static Ints flip_low_sign(Ints x) {
    const int32x4_t sign = vdupq_n_s32(0x8000);
    return {veorq_s32(x.low, sign), veorq_s32(x.high, sign)};
  }
  INFERNEO_INLINE static Ints scale_words(Ints a, Ints b) {
    return {vreinterpretq_s32_s16(vqrdmulhq_s16(words(a.low), words(b.low))),
            vreinterpretq_s32_s16(vqrdmulhq_s16(words(a.high), words(b.high)))};
  }
  INFERNEO_INLINE static Ints dot_words(Ints a, Ints b) {
    return {dot_words(words(a.low), words(b.low)), dot_words(words(a.high), words(b.high))};
  }
  INFERNEO_INLINE static Ints add_dot_words(Ints sum, Ints a, Ints b) { return add(sum, dot_words(a, b)); }
  template <int kBits>
  INFERNEO_INLINE static Ints shift_left(Ints x) {
    return {vshlq_n_s32(x.low, kBits), vshlq_n_s32(x.high, kBits)};
  }
  INFERNEO_INLINE static Ints low_nibbles(Ints codes) {
    const int32x4_t mask = vdupq_n_s32(0x0f0f0f0f);
    return {vandq_s32(codes.low, mask), vandq_s32(codes.high, mask)};
  }
  INFERNEO_INLINE static Ints high_nibbles(Ints codes) {
    return {vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(codes.low), 4)),
            vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(codes.high), 4))};
  }
  template <int kValue>
  INFERNEO_INLINE static Ints add_where(Ints codes, uint64_t mask) {
    return {add_where<kValue>(codes.low, mask), add_where<kValue>(codes.high, mask >> 16)};
  }
  INFERNEO_INLINE static Ints dot(Ints sum, Ints codes, const int8_t* x) {
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(load_as<int32_t>(x)));
    return {vdotq_s32(sum.low, vreinterpretq_s8_s32(codes.low), four),
            vdotq_s32(sum.high, vreinterpretq_s8_s32(codes.high), four)};
  }
  INFERNEO_INLINE static Ints dot_bytes(Ints sum, Ints codes, const int8_t* x) {
    const int32x4_t signs = vdupq_n_s32(static_cast<int32_t>(0x80808080u));
    return dot(sum, {veorq_s32(codes.low, signs), veorq_s32(codes.high, signs)}, x);
  }
  INFERNEO_INLINE static int32_t sum_of_16(const int8_t* codes) { return vaddlvq_s8(vld1q_s8(codes)); }
  INFERNEO_INLINE static void store(float* out, Floats x) {
    vst1q_f32(out, x.low);
    vst1q_f32(out + 4, x.high);
  }
  INFERNEO_INLINE static void prefetch(const uint8_t* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  }

 private:
  INFERNEO_INLINE static int16x8_t words(int32x4_t x) { return vreinterpretq_s16_s32(x); }
  INFERNEO_INLINE static int32x4_t dot_words(int16x8_t a, int16x8_t b) {
    return vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
  }
  template <int kValue>
  INFERNEO_INLINE static int32x4_t add_where(int32x4_t codes, uint64_t mask) {
    const uint8x16_t spread =
        vcombine_u8(vdup_n_u8(static_cast<uint8_t>(mask)), vdup_n_u8(static_cast<uint8_t>(mask >> 8)));
    const uint8x16_t bits = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    const uint8x16_t value = vandq_u8(vtstq_u8(spread, bits), vdupq_n_u8(kValue));
    return vreinterpretq_s32_u8(vaddq_u8(vreinterpretq_u8_s32(codes), value));
  }
};

}  // namespace
}  // namespace inferneo

#include "linear_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace inferneo {

extern const LinearKernels kNeonLinear;
const LinearKernels kNeonLinear = kLinearKernels<Neon>;

}  // namespace inferneo
#endif
