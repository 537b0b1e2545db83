// Eight rows at a time: AVX2, FMA and F16C.
#include "linear_task.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace inferneo {
namespace {

struct Avx2 {
  static constexpr int kRows = 8;
  static constexpr int kTokens = 4;  // 16 registers: 4 tokens' integers and floats, and as much again at hand
  static constexpr int kPairTokens = 4;
  static constexpr bool kSignedBytes = true;
  using Floats = __m256;
  using Ints = __m256i;

  INFERNEO_INLINE static Floats zero() { return _mm256_setzero_ps(); }
  INFERNEO_INLINE static Ints zero_ints() { return _mm256_setzero_si256(); }
  INFERNEO_INLINE static Floats broadcast(const float* x) { return _mm256_broadcast_ss(x); }
  INFERNEO_INLINE static Ints broadcast(const int32_t* x) { return _mm256_set1_epi32(*x); }
  INFERNEO_INLINE static Floats load_floats(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  INFERNEO_INLINE static Ints load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  INFERNEO_INLINE static Floats halves(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  INFERNEO_INLINE static Floats unsigned_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  INFERNEO_INLINE static Floats signed_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  INFERNEO_INLINE static Floats low_bf16(Ints pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  INFERNEO_INLINE static Floats high_bf16(Ints pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  INFERNEO_INLINE static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  INFERNEO_INLINE static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  INFERNEO_INLINE static Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  INFERNEO_INLINE static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  INFERNEO_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  INFERNEO_INLINE static Floats bf16(const uint8_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  INFERNEO_INLINE static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  INFERNEO_INLINE static Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
  // Words of 16 bits, two to an int32.
  INFERNEO_INLINE static Ints flip_low_sign(Ints x) { return _mm256_xor_si256(x, _mm256_set1_epi32(0x8000)); }
  INFERNEO_INLINE static Ints scale_words(Ints a, Ints b) { return _mm256_mulhrs_epi16(a, b); }
  INFERNEO_INLINE static Ints dot_words(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
  INFERNEO_INLINE static Ints add_dot_words(Ints sum, Ints a, Ints b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  }
  template <int kBits>
  INFERNEO_INLINE static Ints shift_left(Ints x) {
    return _mm256_slli_epi32(x, kBits);
  }
  INFERNEO_INLINE static Ints low_nibbles(Ints codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(15)); }
  INFERNEO_INLINE static Ints high_nibbles(Ints codes) { return low_nibbles(_mm256_srli_epi16(codes, 4)); }
  template <int kValue>
  INFERNEO_INLINE static Ints add_where(Ints codes, uint64_t mask) {
    // Each byte of the mask to the eight bytes that its bits stand for.
    const Ints spread =
        _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(mask)),
                            _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const Ints bits = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const Ints is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bits), bits);
    return _mm256_or_si256(codes, _mm256_and_si256(is_set, _mm256_set1_epi8(kValue)));
  }
  // Two products of a code and an int8 to each word: less than 2 * 127 * 2**bits each time.
  static constexpr int dots_in_words(int bits) { return bits == 4 ? 8 : bits == 5 ? 4 : 2; }
  INFERNEO_INLINE static Ints products_in_words(Ints codes, const int8_t* x) {
    return _mm256_maddubs_epi16(codes, four(x));
  }
  INFERNEO_INLINE static Ints add_words(Ints a, Ints b) {
    Ints sum = _mm256_add_epi16(a, b);
    asm("" : "+x"(sum));  // else GCC adds as in a tree, and half of the products go through memory
    return sum;
  }
  INFERNEO_INLINE static Ints sum_words(Ints words) { return dot_words(words, _mm256_set1_epi16(1)); }
  // code - 128 times x. |code - 128| <= 128 and |x| <= 127: two products fit an int16 again.
  INFERNEO_INLINE static Ints dot_bytes(Ints sum, Ints codes, const int8_t* x) {
    const Ints weights = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
    return add(sum, sum_words(_mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(four(x), weights))));
  }
  INFERNEO_INLINE static int32_t sum_of_16(const int8_t* codes) {  // GCC adds up a plain loop element by element
    const __m128i biased = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), _mm_set1_epi8(-128));
    const __m128i sums = _mm_sad_epu8(biased, _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 2) - 16 * 128;
  }
  INFERNEO_INLINE static void store(float* out, Floats x) { _mm256_storeu_ps(out, x); }
  INFERNEO_INLINE static void prefetch(const uint8_t* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
  }

 private:
  INFERNEO_INLINE static Ints four(const int8_t* x) { return _mm256_set1_epi32(load_as<int32_t>(x)); }
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

extern const LinearKernels kAvx2Linear;
const LinearKernels kAvx2Linear = kLinearKernels<Avx2>;

}  // namespace inferneo
#endif
