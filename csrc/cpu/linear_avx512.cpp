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
  // What linear_kernels.h does token by token, of four tokens at once.
  INFERNEO_INLINE static QuadInts largest_of_quad(const float* x, int64_t stride) {
    const Ints magnitude = _mm512_set1_epi32(0x7fffffff);
    Ints most[kQuad];
    INFERNEO_UNROLL
    for (int t = 0; t < kQuad; ++t) {
      most[t] = larger(_mm512_and_si512(_mm512_loadu_si512(x + t * stride), magnitude),
                       _mm512_and_si512(_mm512_loadu_si512(x + t * stride + 16), magnitude));
    }
    const Ints ab = larger(_mm512_unpacklo_epi32(most[0], most[1]), _mm512_unpackhi_epi32(most[0], most[1]));
    const Ints cd = larger(_mm512_unpacklo_epi32(most[2], most[3]), _mm512_unpackhi_epi32(most[2], most[3]));
    const Ints abcd = larger(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
    return reinterpret_cast<QuadInts>(_mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
  INFERNEO_INLINE static QuadSums codes_of_quad(const float* x, int64_t stride, QuadFloats inverse,
                                                int8_t (&out)[kQuad][kBlockColumns]) {
    const Floats round = _mm512_set1_ps(kRoundCode);
    Ints words[kQuad];  // int16 codes
    INFERNEO_UNROLL
    for (int t = 0; t < kQuad; ++t) {
      const Floats factor = _mm512_set1_ps(inverse[t]);
      const Floats low = add(mul(_mm512_loadu_ps(x + t * stride), factor), round);
      const Floats high = add(mul(_mm512_loadu_ps(x + t * stride + 16), factor), round);
      words[t] = low_words(_mm512_castps_si512(low), _mm512_castps_si512(high));
    }
    // In turns eight codes of one token and eight of the other.
    const Ints ab = _mm512_packs_epi16(words[0], words[1]), cd = _mm512_packs_epi16(words[2], words[3]);
    const Ints order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_si512(out[0], _mm512_permutexvar_epi64(order, ab));
    _mm512_storeu_si512(out[2], _mm512_permutexvar_epi64(order, cd));
    const Floats ab_sums = _mm512_castsi512_ps(_mm512_dpbusd_epi32(zero_ints(), _mm512_set1_epi8(1), ab));
    const Floats cd_sums = _mm512_castsi512_ps(_mm512_dpbusd_epi32(zero_ints(), _mm512_set1_epi8(1), cd));
    const Ints sums = add(_mm512_castps_si512(_mm512_shuffle_ps(ab_sums, cd_sums, 0x88)),
                          _mm512_castps_si512(_mm512_shuffle_ps(ab_sums, cd_sums, 0xdd)));
    const __m256i head = _mm512_castsi512_si256(sums), tail = _mm512_extracti64x4_epi64(sums, 1);
    return {sum_of_halves(head), sum_of_halves(_mm256_add_epi32(head, tail))};
  }
  INFERNEO_INLINE static void store(float* out, Floats x) { _mm512_storeu_ps(out, x); }
  INFERNEO_INLINE static void prefetch(const uint8_t* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
  }

 private:
  INFERNEO_INLINE static Ints larger(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
  INFERNEO_INLINE static Ints low_words(Ints a, Ints b) {
    alignas(64) static constexpr int16_t kLow[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                     32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(kLow), b);
  }
  INFERNEO_INLINE static QuadInts sum_of_halves(__m256i x) {
    return reinterpret_cast<QuadInts>(_mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
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
