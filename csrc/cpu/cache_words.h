// How the cache's rows become operands of products, and what a product is; part of row_kernels_impl.h.

#include "simd.h"

// Whether what is multiplied with a cache of type T comes in words of two bf16 each.
template <class T>
constexpr bool kInPairs = INFERNEO_BF16_DOT && std::is_same_v<T, BFloat16>;

// One float, or one pair, in all lanes.
template <class T>
INFERNEO_INLINE Vec broadcast(const float* word) {
  if constexpr (kInPairs<T>) {
    return reinterpret_cast<Vec>(load_as<uint32_t>(word) - Words{});
  } else {
    return splat(*word);
  }
}

// sum + a * b; of pairs both products, one rounding each: the second element's is added first.
template <class T>
INFERNEO_INLINE Vec add_product(Vec a, Vec b, Vec sum) {
#if INFERNEO_BF16_DOT
  if constexpr (kInPairs<T>) return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#endif
  return fma(a, b, sum);
}

// Every second element of two vectors, from kFirst on.
template <int kFirst, int... kIndex>
INFERNEO_INLINE Vec every_second(Vec a, Vec b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(a, b, (kFirst + 2 * kIndex)...);
}

#if INFERNEO_BF16_DOT
// Two vectors of floats, rounded to bf16, one behind the other.
INFERNEO_INLINE Vec to_pairs(Vec first, Vec second) {
  return reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(second, first));
}
#endif

constexpr int64_t kWeightVecs = 2 * kSumVecs;

// Weights to their place among a row's, and to the row's sum in kSumLanes lanes: as they are, or for a cache in bf16
// rounded to it and added up in pairs as products are.
template <class T>
INFERNEO_INLINE void store_weights(Vec (&weights)[kWeightVecs], int64_t place, float* row, Vec (&sums)[kSumVecs]) {
#if INFERNEO_BF16_DOT
  if constexpr (kInPairs<T>) {
    const Vec pairs = to_pairs(weights[0], weights[1]);
    store(row + place / 2, pairs);
    sums[0] = add_product<T>(pairs, reinterpret_cast<Vec>(Words{} + 0x3f803f80u), sums[0]);
    return;
  }
#endif
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (Vec& w : weights) {
      const Words bits = w < 0x1p-126f ? Words{} : reinterpret_cast<Words>(w);  // products take subnormals for 0
      w = reinterpret_cast<Vec>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
    }
  }
  for (int64_t i = 0; i < kWeightVecs; ++i) store(row + place + i * kLanes, weights[i]);
  for (int64_t i = 0; i < kSumVecs; ++i) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      constexpr std::make_integer_sequence<int, static_cast<int>(kLanes)> kIndices{};
      sums[i] += every_second<1>(weights[2 * i], weights[2 * i + 1], kIndices);
      sums[i] += every_second<0>(weights[2 * i], weights[2 * i + 1], kIndices);
    } else {
      sums[i] += weights[i];
      sums[i] += weights[kSumVecs + i];
    }
  }
}

// Sixteen bytes of rows[0], rows[4], rows[8] and so on, as many as a vector holds; `stride` bytes from row to row.
INFERNEO_INLINE Words every_fourth(const char* rows, int64_t stride) {
#if INFERNEO_LANES == 16
  const auto quad = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + 4 * i * stride)); };
  __m512i words = _mm512_castsi128_si512(quad(0));
  words = _mm512_inserti32x4(words, quad(1), 1);
  words = _mm512_inserti32x4(words, quad(2), 2);
  return reinterpret_cast<Words>(_mm512_inserti32x4(words, quad(3), 3));
#elif INFERNEO_LANES == 8
  const auto quad = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + 4 * i * stride)); };
  return reinterpret_cast<Words>(_mm256_inserti128_si256(_mm256_castsi128_si256(quad(0)), quad(1), 1));
#else
  Words words;
  __builtin_memcpy(&words, rows, sizeof words);
  static_cast<void>(stride);
  return words;
#endif
}

// In each group of four words: the first two of a and of b in turns, or the last two.
template <int kFirst, int... kIndex>
INFERNEO_INLINE Words zip_words(Words a, Words b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(a, b,
                                 (kIndex / 4 * 4 + kFirst + kIndex % 4 / 2 + kIndex % 2 * static_cast<int>(kLanes))...);
}

// In each pair of double words: the first of a and of b, or the last.
template <int kFirst, int... kIndex>
INFERNEO_INLINE Words zip_pairs(Words a, Words b, std::integer_sequence<int, kIndex...>) {
  typedef uint64_t Pairs __attribute__((vector_size(4 * INFERNEO_LANES)));
  return reinterpret_cast<Words>(
      __builtin_shufflevector(reinterpret_cast<Pairs>(a), reinterpret_cast<Pairs>(b),
                              (kIndex / 2 * 2 + kFirst + kIndex % 2 * static_cast<int>(kLanes / 2))...));
}

// words[i] = word i of the first sixteen bytes of each of kLanes rows.
INFERNEO_INLINE void load_words(const char* rows, int64_t stride, Words (&words)[4]) {
  constexpr std::make_integer_sequence<int, static_cast<int>(kLanes)> kWords{};
  constexpr std::make_integer_sequence<int, static_cast<int>(kLanes / 2)> kPairs{};
  const Words a = every_fourth(rows, stride), b = every_fourth(rows + stride, stride);
  const Words c = every_fourth(rows + 2 * stride, stride), d = every_fourth(rows + 3 * stride, stride);
  const Words ab = zip_words<0>(a, b, kWords), cd = zip_words<0>(c, d, kWords);
  const Words ab_last = zip_words<2>(a, b, kWords), cd_last = zip_words<2>(c, d, kWords);
  words[0] = zip_pairs<0>(ab, cd, kPairs);
  words[1] = zip_pairs<1>(ab, cd, kPairs);
  words[2] = zip_pairs<0>(ab_last, cd_last, kPairs);
  words[3] = zip_pairs<1>(ab_last, cd_last, kPairs);
}

// Element i, or pair i, of the sixteen bytes that load_words gave, of every row.
template <class T>
INFERNEO_INLINE Vec element(const Words (&words)[4], int64_t i) {
  if constexpr (std::is_same_v<T, float> || kInPairs<T>) {
    return reinterpret_cast<Vec>(words[i]);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return reinterpret_cast<Vec>(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
  } else if constexpr (std::is_same_v<T, Code>) {
    typedef int32_t Ints __attribute__((vector_size(4 * INFERNEO_LANES)));
    return __builtin_convertvector(reinterpret_cast<Ints>(words[i / 4] << (24 - i % 4 * 8)) >> 24, Vec);
  } else {
    typedef uint16_t Halves __attribute__((vector_size(2 * INFERNEO_LANES)));
    const Halves halves = __builtin_convertvector(words[i / 2] >> (i % 2 * 16), Halves);
    return load(reinterpret_cast<const Half*>(&halves));
  }
}

// A row's elements as vectors of floats, in the order that is the cheapest to make: of bf16 the even elements of two
// vectors, then the odd ones. store_columns brings sums of such vectors into their places.
template <class T, int64_t num>
INFERNEO_INLINE void load_columns(const T* row, Vec (&columns)[num]) {
  if constexpr (std::is_same_v<T, BFloat16> && num % 2 == 0) {
#pragma GCC unroll 2
    for (int64_t n = 0; n < num; n += 2) {
      Words pairs;
      __builtin_memcpy(&pairs, row + n * kLanes, sizeof pairs);
      columns[n] = reinterpret_cast<Vec>(pairs << 16);
      columns[n + 1] = reinterpret_cast<Vec>(pairs & 0xffff0000u);
    }
  } else {
#pragma GCC unroll 4
    for (int64_t n = 0; n < num; ++n) columns[n] = load(row + n * kLanes);
  }
}

template <int kFirst, int... kIndex>
INFERNEO_INLINE Vec in_turns(Vec even, Vec odd, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(even, odd, (kFirst + kIndex / 2 + kIndex % 2 * static_cast<int>(kLanes))...);
}

template <class T, int64_t num>
INFERNEO_INLINE void store_columns(float* out, const Vec (&columns)[num]) {
  constexpr std::make_integer_sequence<int, static_cast<int>(kLanes)> kIndices{};
  if constexpr (std::is_same_v<T, BFloat16> && !kInPairs<T> && num % 2 == 0) {
#pragma GCC unroll 2
    for (int64_t n = 0; n < num; n += 2) {
      store(out + n * kLanes, in_turns<0>(columns[n], columns[n + 1], kIndices));
      store(out + (n + 1) * kLanes, in_turns<static_cast<int>(kLanes / 2)>(columns[n], columns[n + 1], kIndices));
    }
  } else {
#pragma GCC unroll 4
    for (int64_t n = 0; n < num; ++n) store(out + n * kLanes, columns[n]);
  }
}

// Elements of two vectors of bf16 in turns, from element kFirst on.
template <int kFirst, class V, int... kIndex>
INFERNEO_INLINE Vec zip_halves(V a, V b, std::integer_sequence<int, kIndex...>) {
  return reinterpret_cast<Vec>(
      __builtin_shufflevector(a, b, (kFirst + kIndex / 2 + kIndex % 2 * 2 * static_cast<int>(kLanes))...));
}

// Pairs of an element of one row and the same of the next row, which may be null: zeros.
template <int64_t num>
INFERNEO_INLINE void load_pairs(const BFloat16* row, const BFloat16* next, Vec (&columns)[num]) {
  if constexpr (num % 2 == 0) {
    typedef uint16_t Halves __attribute__((vector_size(4 * INFERNEO_LANES)));
    constexpr std::make_integer_sequence<int, 2 * static_cast<int>(kLanes)> kIndices{};
#pragma GCC unroll 2
    for (int64_t n = 0; n < num; n += 2) {
      Halves a, b{};
      __builtin_memcpy(&a, row + n * kLanes, sizeof a);
      if (next != nullptr) __builtin_memcpy(&b, next + n * kLanes, sizeof b);
      columns[n] = zip_halves<0>(a, b, kIndices);
      columns[n + 1] = zip_halves<static_cast<int>(kLanes)>(a, b, kIndices);
    }
  } else {
    for (int64_t n = 0; n < num; ++n) {
      const Words a = reinterpret_cast<Words>(load(row + n * kLanes)) >> 16;
      const Words b = next == nullptr ? Words{} : reinterpret_cast<Words>(load(next + n * kLanes));
      columns[n] = reinterpret_cast<Vec>(a | b);
    }
  }
}
