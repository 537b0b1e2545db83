// Sixteen rows at a time: AVX512 with VNNI.
#include "linear_task.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own _mm512_undefined_*
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

namespace inferneo {
namespace {

struct Avx512 {
  static constexpr int kRows = 16;
  static constexpr int kTokens = 12;  // 32 registers: 12 tokens' integers and floats, and 8 at hand
  static constexpr int kPairTokens = 8;
  static constexpr int dots_in_words(int) { return 0; }
  static constexpr bool kSignedBytes = false;
  using Floats = __m512;
  using Ints = __m512i;

  INFERNEO_INLINE static Floats zero() { return _mm512_setzero_ps(); }
  INFERNEO_INLINE static Ints zero_ints() { return _mm512_setzero_si512(); }
  INFERNEO_INLINE static Floats broadcast(const float* x) { return _mm512_set1_ps(*x); }
  INFERNEO_INLINE static Ints broadcast(const int32_t* x) { return _mm512_set1_epi32(*x); }
  INFERNEO_INLINE static Floats load_floats(const void* p) { return _mm512_loadu_ps(p); }
  INFERNEO_INLINE static Ints load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  INFERNEO_INLINE static Floats halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  INFERNEO_INLINE static Floats unsigned_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  INFERNEO_INLINE static Floats signed_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  INFERNEO_INLINE static Floats low_bf16(Ints pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  INFERNEO_INLINE static Floats high_bf16(Ints pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  INFERNEO_INLINE static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  INFERNEO_INLINE static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  INFERNEO_INLINE static Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  INFERNEO_INLINE static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  INFERNEO_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  INFERNEO_INLINE static Floats bf16(const uint8_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  INFERNEO_INLINE static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  INFERNEO_INLINE static Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
  // Words of 16 bits, two to an int32.
  INFERNEO_INLINE static Ints flip_low_sign(Ints x) { return _mm512_xor_si512(x, _mm512_set1_epi32(0x8000)); }
  INFERNEO_INLINE static Ints scale_words(Ints a, Ints b) { return _mm512_mulhrs_epi16(a, b); }
  INFERNEO_INLINE static Ints dot_words(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
  INFERNEO_INLINE static Ints add_dot_words(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
  template <int kBits>
  INFERNEO_INLINE static Ints shift_left(Ints x) {
    return _mm512_slli_epi32(x, kBits);
  }
  INFERNEO_INLINE static Ints low_nibbles(Ints codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
  INFERNEO_INLINE static Ints high_nibbles(Ints codes) { return low_nibbles(_mm512_srli_epi16(codes, 4)); }
  template <int kValue>
  INFERNEO_INLINE static Ints add_where(Ints codes, uint64_t mask) {
    return _mm512_mask_add_epi8(codes, mask, codes, _mm512_set1_epi8(kValue));
  }
  INFERNEO_INLINE static Ints dot(Ints sum, Ints codes, const int8_t* x) {
    return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(load_as<int32_t>(x)));
  }
  INFERNEO_INLINE static Ints dot_bytes(Ints sum, Ints codes, const int8_t* x) { return dot(sum, codes, x); }
  INFERNEO_INLINE static int32_t sum_of_16(const int8_t* codes) {  // GCC adds up a plain loop element by element
    const __m128i biased = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), _mm_set1_epi8(-128));
    const __m128i sums = _mm_sad_epu8(biased, _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 2) - 16 * 128;
  }
  INFERNEO_INLINE static __m256i largest_of_32(const float* x) {  // of four columns each, by bits
    const Ints magnitude = _mm512_set1_epi32(0x7fffffff);
    const Ints most = _mm512_max_epu32(_mm512_and_si512(_mm512_loadu_si512(x), magnitude),
                                       _mm512_and_si512(_mm512_loadu_si512(x + 16), magnitude));
    return _mm256_max_epu32(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
  }
  // What linear_kernels.h does token by token, of four tokens at once: what is one number a token goes through one
  // vector of four.
  INFERNEO_INLINE static void quantize_quad(const float* x, int64_t stride, int8_t (&out)[kQuad][kBlockColumns],
                                            QuadCodes& made) {
    const __m256i ab_low = _mm256_unpacklo_epi32(largest_of_32(x), largest_of_32(x + stride));
    const __m256i ab_high = _mm256_unpackhi_epi32(largest_of_32(x), largest_of_32(x + stride));
    const __m256i cd_low = _mm256_unpacklo_epi32(largest_of_32(x + 2 * stride), largest_of_32(x + 3 * stride));
    const __m256i cd_high = _mm256_unpackhi_epi32(largest_of_32(x + 2 * stride), largest_of_32(x + 3 * stride));
    const __m256i ab = _mm256_max_epu32(ab_low, ab_high), cd = _mm256_max_epu32(cd_low, cd_high);
    const __m256i both = _mm256_max_epu32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    const __m128i bits = _mm_max_epu32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    const __mmask8 is_there = _mm_cmpge_epu32_mask(bits, _mm_set1_epi32(kSmallestLargest));
    const __m128 largest = _mm_castsi128_ps(bits), most_code = _mm_set1_ps(127.0f);
    _mm_store_ps(made.largest, _mm_maskz_mov_ps(is_there, largest));
    alignas(16) float inverse[kQuad];
    _mm_store_ps(inverse, _mm_maskz_div_ps(is_there, most_code, largest));
    __m256i sums[kQuad];
    INFERNEO_UNROLL
    for (int t = 0; t < kQuad; ++t) {
      const Floats factor = _mm512_set1_ps(inverse[t]), round = _mm512_set1_ps(kRoundCode);
      const Floats low = _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(x + t * stride), factor), round);
      const Floats high = _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(x + t * stride + 16), factor), round);
      const __m256i codes = _mm256_set_m128i(_mm512_maskz_cvtepi32_epi8(0xffff, _mm512_castps_si512(high)),
                                             _mm512_maskz_cvtepi32_epi8(0xffff, _mm512_castps_si512(low)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[t]), codes);
      sums[t] = _mm256_sad_epu8(_mm256_xor_si256(codes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
    }
    const __m256i first = _mm256_or_si256(sums[0], _mm256_slli_epi64(sums[1], 32));
    const __m256i last = _mm256_or_si256(sums[2], _mm256_slli_epi64(sums[3], 32));
    const __m256i halves = _mm256_add_epi32(_mm256_unpacklo_epi64(first, last), _mm256_unpackhi_epi64(first, last));
    const __m128i bias = _mm_set1_epi32(16 * 128);
    const __m128i head = _mm_sub_epi32(_mm256_castsi256_si128(halves), bias);
    const __m128i sum = _mm_add_epi32(head, _mm_sub_epi32(_mm256_extracti128_si256(halves, 1), bias));
    _mm_store_si128(reinterpret_cast<__m128i*>(made.head), head);
    _mm_store_si128(reinterpret_cast<__m128i*>(made.sum), sum);
  }
  INFERNEO_INLINE static void store(float* out, Floats x) { _mm512_storeu_ps(out, x); }
  INFERNEO_INLINE static void prefetch(const uint8_t* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
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

extern const LinearKernels kAvx512Linear;
const LinearKernels kAvx512Linear = kLinearKernels<Avx512>;

}  // namespace inferneo
#endif
