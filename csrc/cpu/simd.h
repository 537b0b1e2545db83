// A vector of kLanes floats in the widest registers of an instruction set. Included once in each row_kernels_*.cpp, in
// a namespace of its own and after the compiler was told the target; INFERNEO_LANES is 16 (AVX-512), 8 (AVX2 and FMA)
// or 4 (NEON, or whatever the compiler's baseline has, such as SSE2). INFERNEO_BF16_DOT is 1 where the machine
// multiplies pairs of bf16 (AVX512-BF16), otherwise 0.

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
#elif defined(__aarch64__)
INFERNEO_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
INFERNEO_INLINE Vec load(const BFloat16* x) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&x->bits), 16)); }
INFERNEO_INLINE Vec load(const Half* x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&x->bits))); }
INFERNEO_INLINE Vec load(const Code* x) {
  const int8x8_t codes = vreinterpret_s8_u32(vdup_n_u32(load_as<uint32_t>(x)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(codes))));
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

#if INFERNEO_LANES == 16
INFERNEO_INLINE Vec larger(Vec a, Vec b) { return _mm512_maskz_max_ps(0xffff, a, b); }  // GCC 12 compares and blends
#else
INFERNEO_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
#endif

// 2**d for d <= 126; what is below -126 gives 0. The power's integer part is added to the exponent's bits. Accurate to
// 2e-8, or to 3e-6 where the result will be rounded to bf16, by up to 4e-3.
template <bool kForBFloat16>
INFERNEO_INLINE Vec exp2_fused(Vec d) {
  d = larger(d, splat(-127.0f));               // whose bits are those of 0
  const Vec shifted = d + splat(kRoundToInt);  // its last bits are the integer part
  const Vec r = d - (shifted - kRoundToInt);
  Vec q;
  if constexpr (kForBFloat16) {
    q = fma(r, splat(0.009582852944731712f), splat(0.055906426161527634f));
    q = fma(q, r, splat(0.24024099111557007f));
    q = fma(q, r, splat(0.6931241750717163f));
  } else {
    q = fma(r, splat(0.00015353361959569156f), splat(0.0013398875016719103f));
    q = fma(q, r, splat(0.00961843691766262f));
    q = fma(q, r, splat(0.055503323674201965f));
    q = fma(q, r, splat(0.24022647738456726f));
    q = fma(q, r, splat(0.6931471824645996f));
  }
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
