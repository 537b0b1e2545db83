// A vector of kLanes floats in the widest registers of an instruction set. Included once in each row_kernels_*.cpp, in
// a namespace of its own and after the compiler was told the target; INFERNEO_LANES is 16 (AVX-512), 8 (AVX2 and FMA)
// or 4 (whatever the compiler's baseline has, SSE2 and NEON among it).

constexpr int64_t kLanes = INFERNEO_LANES;

typedef float Vec __attribute__((vector_size(4 * INFERNEO_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * INFERNEO_LANES)));

struct Half {
  uint16_t bits;
};

struct Code {  // of an int8 row of the cache; what it stands for is value * the row's scale
  int8_t value;
};

INFERNEO_INLINE uint16_t float_to_half(float x) {
  const uint32_t sign = float_bits(x) >> 16 & 0x8000u;
  const uint32_t magnitude = float_bits(x) & 0x7fffffffu;
  // Adding 2**-1 brings a subnormal's last bit to the float's last bit, and rounds as it does.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>(sign | (magnitude < 0x477ff000u ? finite : special));
}

INFERNEO_INLINE uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1);
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded >> 16);
}

using inferneo::to_float;
INFERNEO_INLINE float to_float(Half x) { return half_float(x.bits); }
INFERNEO_INLINE float to_float(Code x) { return x.value; }
INFERNEO_INLINE void from_float(float x, float& out) { out = x; }
INFERNEO_INLINE void from_float(float x, BFloat16& out) { out.bits = float_to_bfloat16(x); }
INFERNEO_INLINE void from_float(float x, Half& out) { out.bits = float_to_half(x); }

INFERNEO_INLINE Vec load(const float* x) {
  Vec v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

INFERNEO_INLINE void store(float* out, Vec v) { __builtin_memcpy(out, &v, sizeof v); }
INFERNEO_INLINE Vec splat(float x) { return x - Vec{}; }  // minus: adding 0 changes -0, so it would be computed

#if INFERNEO_LANES == 16
INFERNEO_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Masked, these two: GCC 12 warns of the undefined operand inside the plain ones.
INFERNEO_INLINE Vec load(const BFloat16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return reinterpret_cast<Vec>(reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, bits)) << 16);
}
INFERNEO_INLINE Vec load(const Half* x) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
INFERNEO_INLINE Vec load(const Code* x) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, codes));
}
#elif INFERNEO_LANES == 8
INFERNEO_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
INFERNEO_INLINE Vec load(const BFloat16* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return reinterpret_cast<Vec>(reinterpret_cast<Words>(_mm256_cvtepu16_epi32(bits)) << 16);
}
INFERNEO_INLINE Vec load(const Half* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
INFERNEO_INLINE Vec load(const Code* x) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}
#else
INFERNEO_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return Vec{std::fma(a[0], b[0], c[0]), std::fma(a[1], b[1], c[1]), std::fma(a[2], b[2], c[2]),
             std::fma(a[3], b[3], c[3])};
}
INFERNEO_INLINE Vec load(const BFloat16* x) {
  return Vec{to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
}
INFERNEO_INLINE Vec load(const Half* x) {
  return Vec{half_float(x[0].bits), half_float(x[1].bits), half_float(x[2].bits), half_float(x[3].bits)};
}
INFERNEO_INLINE Vec load(const Code* x) { return Vec{to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])}; }
#endif

INFERNEO_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// exp(d) for d <= 0, as accurate as exp_float with half its instructions: multiply-adds are fused, and the power of two
// is added to the exponent's bits. What is below kLowestExponent counts as that.
INFERNEO_INLINE Vec exp_fused(Vec d) {
  d = larger(d, splat(kLowestExponent));
  const Vec shifted = fma(d, splat(kLog2E), splat(kRoundToInt));  // its last bits are the power
  const Vec n = shifted - kRoundToInt;
  const Vec r = fma(n, splat(-kLn2Low), fma(n, splat(-kLn2High), d));
  Vec q = fma(r, splat(0.0013933650916442275f), splat(0.008363179862499237f));
  q = fma(q, r, splat(0.04166646674275398f));
  q = fma(q, r, splat(0.16666576266288757f));
  q = fma(q, r, splat(0.5f));
  q = fma(q, r, splat(1.0f));
  q = fma(q, r, splat(1.0f));
  return reinterpret_cast<Vec>(reinterpret_cast<Words>(q) + (reinterpret_cast<Words>(shifted) << 23));
}

template <int kBy, int... kIndex>
INFERNEO_INLINE Vec rotated(Vec v, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(v, v, ((kIndex + kBy) % static_cast<int>(kLanes))...);
}

// Sums over a row run in 16 lanes on every instruction set, and are added up as a tree: the same bits everywhere.
constexpr int64_t kSumLanes = 16;
constexpr int64_t kSumVecs = kSumLanes / kLanes;

template <int kBy = kLanes / 2>
INFERNEO_INLINE float fold_sum(Vec v) {
  v += rotated<kBy>(v, std::make_integer_sequence<int, static_cast<int>(kLanes)>{});
  if constexpr (kBy > 1) {
    return fold_sum<kBy / 2>(v);
  } else {
    return v[0];
  }
}

INFERNEO_INLINE float sum_lanes(Vec (&v)[kSumVecs]) {
  for (int64_t half = kSumVecs / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return fold_sum(v[0]);
}

template <int kBy = kLanes / 2>
INFERNEO_INLINE float max_lanes(Vec v) {
  v = larger(v, rotated<kBy>(v, std::make_integer_sequence<int, static_cast<int>(kLanes)>{}));
  if constexpr (kBy > 1) {
    return max_lanes<kBy / 2>(v);
  } else {
    return v[0];
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

// Element i of the sixteen bytes that load_words gave, of every row.
template <class T>
INFERNEO_INLINE Vec element(const Words (&words)[4], int64_t i) {
  if constexpr (std::is_same_v<T, float>) {
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
  if constexpr (std::is_same_v<T, BFloat16> && num % 2 == 0) {
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
