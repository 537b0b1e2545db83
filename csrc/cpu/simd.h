// A vector of kLanes floats in the widest registers of an instruction set. Included once in each row_kernels_*.cpp, in
// a namespace of its own and after the compiler was told the target; INFERNEO_LANES is 16 (AVX-512), 8 (AVX2 and FMA)
// or 4 (whatever the compiler's baseline has, SSE2 and NEON among it).

constexpr int64_t kLanes = INFERNEO_LANES;

typedef float Vec __attribute__((vector_size(4 * INFERNEO_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * INFERNEO_LANES)));

struct Half {
  uint16_t bits;
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
#elif INFERNEO_LANES == 8
INFERNEO_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
INFERNEO_INLINE Vec load(const BFloat16* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return reinterpret_cast<Vec>(reinterpret_cast<Words>(_mm256_cvtepu16_epi32(bits)) << 16);
}
INFERNEO_INLINE Vec load(const Half* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
#else
INFERNEO_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
INFERNEO_INLINE Vec load(const BFloat16* x) {
  return Vec{to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
}
INFERNEO_INLINE Vec load(const Half* x) {
  return Vec{half_float(x[0].bits), half_float(x[1].bits), half_float(x[2].bits), half_float(x[3].bits)};
}
#endif

INFERNEO_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// exp_float of every lane, bit for bit.
INFERNEO_INLINE Vec exp_lanes(Vec d) {
  typedef int32_t Ints __attribute__((vector_size(4 * INFERNEO_LANES)));
  d = larger(d, splat(kLowestExponent));
  const Vec n = (d * kLog2E + kRoundToInt) - kRoundToInt;
  const Vec r = (d - n * kLn2High) - n * kLn2Low;
  Vec fraction;
  exp_polynomial(r, fraction);
  return fraction * reinterpret_cast<Vec>((__builtin_convertvector(n, Ints) + 127) << 23);
}

INFERNEO_INLINE float sum_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

INFERNEO_INLINE float max_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  float most = lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

template <int kHalf, class V, int... kIndex>
INFERNEO_INLINE V zip(V a, V b, std::integer_sequence<int, kIndex...>) {
  constexpr int kFirst = kHalf * static_cast<int>(kLanes) / 2;
  return __builtin_shufflevector(a, b, (kFirst + kIndex / 2 + kIndex % 2 * static_cast<int>(kLanes))...);
}

// rows[i][j] becomes rows[j][i]: log2(kLanes) perfect shuffles of the rows.
template <class V>
INFERNEO_INLINE void transpose(V (&rows)[kLanes]) {
  using Indices = std::make_integer_sequence<int, static_cast<int>(kLanes)>;
#pragma GCC unroll 4
  for (int64_t stage = 1; stage < kLanes; stage *= 2) {
    V out[kLanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      out[2 * i] = zip<0>(rows[i], rows[i + kLanes / 2], Indices{});
      out[2 * i + 1] = zip<1>(rows[i], rows[i + kLanes / 2], Indices{});
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = out[i];
  }
}
