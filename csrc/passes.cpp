#include "passes.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace inferneo {
namespace {

INFERNEO_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
INFERNEO_INLINE int64_t block_maxima_loop(const Row<T>& row, int64_t begin, int64_t end, int32_t* maxima) {
  const T* logits = row.logits;
  const float scale = row.inv_temperature;
  uint32_t magnitude = 0;
  for (int64_t block = begin; block < end; ++block) {
    const T* x = logits + block * kBlock;
    const int64_t count = smaller(kBlock, row.vocab_size - block * kBlock);
    int32_t largest = INT32_MIN;
    uint32_t largest_magnitude = 0;
    const auto visit = [&](int64_t i) __attribute__((always_inline)) {
      const float z = scaled(x[i], scale);
      const int32_t key = ordered_key(z);
      const uint32_t bits = float_bits(z) & 0x7fffffffu;
      largest = key > largest ? key : largest;
      largest_magnitude = bits > largest_magnitude ? bits : largest_magnitude;
    };
    if (count == kBlock) {  // a constant trip count, which unrolls into a handful of vector registers
      for (int64_t i = 0; i < kBlock; ++i) visit(i);
    } else {
      for (int64_t i = 0; i < count; ++i) visit(i);
    }
    maxima[block] = largest;
    magnitude = largest_magnitude > magnitude ? largest_magnitude : magnitude;
  }
  return magnitude > kInfinityBits;
}

template <class T>
INFERNEO_INLINE int64_t mass_loop(const Row<T>& row, float largest, int64_t begin, int64_t end) {
  const T* logits = row.logits;
  const float scale = row.inv_temperature;
  int64_t sum = 0;
  for (int64_t block = begin; block < end; ++block) {
    const T* x = logits + block * kBlock;
    const int64_t count = smaller(kBlock, row.vocab_size - block * kBlock);
    int64_t weights[kBlock] = {};
    if (count == kBlock) {
      for (int64_t i = 0; i < kBlock; ++i) weights[i] = weight(difference(scaled(x[i], scale), largest));
    } else {
      for (int64_t i = 0; i < count; ++i) weights[i] = weight(difference(scaled(x[i], scale), largest));
    }
    for (int64_t i = 0; i < kBlock; ++i) sum += weights[i];
  }
  return sum;
}

template <class T>
INFERNEO_INLINE int64_t count_above_loop(const Row<T>& row, int32_t key, int64_t begin, int64_t end) {
  const T* logits = row.logits;
  const float scale = row.inv_temperature;
  int32_t count = 0;
  for (int64_t i = begin; i < end; ++i) count += ordered_key(scaled(logits[i], scale)) > key;
  return count;
}

// Scores 64 tokens, whose largest z is given; `first` is the id of the first, a multiple of 4.
INFERNEO_INLINE TokenKey best_of_block(const float* z, float largest_z, uint32_t first, const DrawKey& key,
                                       TokenKey best) {
  uint32_t words[kBlock];  // the four words of 16 counters, word by word
  for (uint32_t i = 0; i < kBlock / 4; ++i) {
    const PhiloxWords w = philox(key, first / 4 + i);
    words[i] = w.x[0];
    words[kBlock / 4 + i] = w.x[1];
    words[kBlock / 2 + i] = w.x[2];
    words[kBlock * 3 / 4 + i] = w.x[3];
  }
  uint32_t largest_word = 0;
  for (int64_t i = 0; i < kBlock; ++i) largest_word = words[i] > largest_word ? words[i] : largest_word;
  // Most blocks end here, without a logarithm a token. 0.01 is far above the polynomials' error, so that the bound
  // holds although they need not be monotone to the last bit.
  if (largest_z + (gumbel(largest_word) + 0.01f) < value_of(best)) return best;

  float noise[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) noise[i] = gumbel(words[i]);
  int32_t keys[kBlock];
  int32_t largest = INT32_MIN;
  for (int64_t i = 0; i < kBlock; ++i) {
    keys[i] = ordered_key(z[i] + noise[(i & 3) * (kBlock / 4) + (i >> 2)] + 0.0f);
    largest = keys[i] > largest ? keys[i] : largest;
  }
  if (largest < value_key(best)) return best;
  uint32_t i = 0;
  while (keys[i] != largest) ++i;
  const TokenKey found = token_key(largest, first + i);
  return found > best ? found : best;
}

template <class T>
INFERNEO_INLINE TokenKey draw_loop(const Row<T>& row, const DrawKey& key, const int32_t* maxima, int64_t begin,
                                   int64_t end, TokenKey best) {
  const float scale = row.inv_temperature;
  for (int64_t block = begin; block < end; ++block) {
    // Rounding is monotone, so a block whose bound is below the best score holds no better one.
    if (key_float(maxima[block]) + kMaxGumbel < value_of(best)) continue;
    const T* x = row.logits + block * kBlock;
    const int64_t count = smaller(kBlock, row.vocab_size - block * kBlock);
    float z[kBlock];
    if (count == kBlock) {
      for (int64_t i = 0; i < kBlock; ++i) z[i] = scaled(x[i], scale);
    } else {
      for (int64_t i = 0; i < kBlock; ++i) z[i] = i < count ? scaled(x[i], scale) : bits_float(0xff800000u);
    }
    best = best_of_block(z, key_float(maxima[block]), static_cast<uint32_t>(block * kBlock), key, best);
  }
  return best;
}

template <class T>
INFERNEO_INLINE void adjust_loop(const T* logits, int64_t vocab_size, const int32_t* counts, const Penalties& penalties,
                                 float* adjusted) {
  const Penalties p = penalties;
  if (counts == nullptr) {
    for (int64_t i = 0; i < vocab_size; ++i) adjusted[i] = to_float(logits[i]);
    return;
  }
  for (int64_t i = 0; i < vocab_size; ++i) {
    const float x = to_float(logits[i]);
    const int32_t times = counts[i] & 0x3fffffff;
    const float divided = x / p.repetition;
    const float multiplied = x * p.repetition;
    const float repeated = x > 0.0f ? divided : multiplied;
    const float seen = (counts[i] & 0x7fffffff) != 0 ? repeated : x;
    const float reduced = seen - (p.presence + p.frequency * static_cast<float>(times));
    adjusted[i] = times > 0 ? reduced : seen;
  }
}

INFERNEO_INLINE int64_t weigh_loop(const TokenKey* tokens, int64_t count, float largest, int64_t* weights) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    weights[i] = weight(difference(value_of(tokens[i]), largest));
    sum += weights[i];
  }
  return sum;
}

INFERNEO_INLINE TokenKey draw_list_loop(const TokenKey* tokens, int64_t count, const DrawKey& key) {
  const DrawKey k = key;
  TokenKey best = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t length = smaller(kBlock, count - start);
    uint32_t words[kBlock];
    TokenKey found[kBlock];
    for (int64_t i = 0; i < length; ++i) {
      const uint32_t id = id_of(tokens[start + i]);
      const PhiloxWords w = philox(k, id / 4);
      const uint32_t low = (id & 1) != 0 ? w.x[1] : w.x[0];
      const uint32_t high = (id & 1) != 0 ? w.x[3] : w.x[2];
      words[i] = (id & 2) != 0 ? high : low;
    }
    for (int64_t i = 0; i < length; ++i) {
      const float score = value_of(tokens[start + i]) + gumbel(words[i]) + 0.0f;
      found[i] = token_key(ordered_key(score), id_of(tokens[start + i]));
    }
    for (int64_t i = 0; i < length; ++i) best = found[i] > best ? found[i] : best;
  }
  return best;
}

// One set of functions for an instruction set: the loops above, inlined into functions compiled for it.
#define INFERNEO_DEFINE_PASSES(NAME, TARGET)                                                                     \
  namespace NAME {                                                                                               \
  template <class T>                                                                                             \
  TARGET int64_t block_maxima(const Row<T>& row, int64_t begin, int64_t end, int32_t* maxima) {                  \
    return block_maxima_loop(row, begin, end, maxima);                                                           \
  }                                                                                                              \
  template <class T>                                                                                             \
  TARGET int64_t mass(const Row<T>& row, float largest, int64_t begin, int64_t end) {                            \
    return mass_loop(row, largest, begin, end);                                                                  \
  }                                                                                                              \
  template <class T>                                                                                             \
  TARGET int64_t count_above(const Row<T>& row, int32_t key, int64_t begin, int64_t end) {                       \
    return count_above_loop(row, key, begin, end);                                                               \
  }                                                                                                              \
  template <class T>                                                                                             \
  TARGET TokenKey draw(const Row<T>& row, const DrawKey& key, const int32_t* maxima, int64_t begin, int64_t end, \
                       TokenKey best) {                                                                          \
    return draw_loop(row, key, maxima, begin, end, best);                                                        \
  }                                                                                                              \
  template <class T>                                                                                             \
  TARGET void adjust(const T* logits, int64_t vocab_size, const int32_t* counts, const Penalties& penalties,     \
                     float* adjusted) {                                                                          \
    adjust_loop(logits, vocab_size, counts, penalties, adjusted);                                                \
  }                                                                                                              \
  TARGET int64_t weigh(const TokenKey* tokens, int64_t count, float largest, int64_t* weights) {                 \
    return weigh_loop(tokens, count, largest, weights);                                                          \
  }                                                                                                              \
  TARGET TokenKey draw_list(const TokenKey* tokens, int64_t count, const DrawKey& key) {                         \
    return draw_list_loop(tokens, count, key);                                                                   \
  }                                                                                                              \
  template <class T>                                                                                             \
  constexpr Passes<T> kPasses{block_maxima<T>, mass<T>, count_above<T>, draw<T>, adjust<T>};                     \
  constexpr ListPasses kListPasses{weigh, draw_list};                                                            \
  }

INFERNEO_DEFINE_PASSES(scalar, )
#if defined(__x86_64__)
INFERNEO_DEFINE_PASSES(avx2, __attribute__((target("avx2"))))
INFERNEO_DEFINE_PASSES(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2")) return Isa::kAvx2;
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) return Isa::kNeon;
#elif defined(__aarch64__) && defined(__APPLE__)
  return Isa::kNeon;  // since the first of Apple's own
#endif
  return Isa::kScalar;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kNeon:
      return "neon";
    default:
      return "scalar";
  }
}

// Those that this file is compiled for.
#if defined(__x86_64__)
constexpr Isa kKnown[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};
constexpr const char* kKnownNames = "scalar, avx2, avx512 or avx512bf16";
#elif defined(__aarch64__)
constexpr Isa kKnown[] = {Isa::kScalar, Isa::kNeon};
constexpr const char* kKnownNames = "scalar or neon";
#else
constexpr Isa kKnown[] = {Isa::kScalar};
constexpr const char* kKnownNames = "scalar";
#endif

Isa cpu_isa() {
  static const Isa best = best_isa();
  const char* requested = std::getenv("INFERNEO_CPU_ISA");
  if (requested == nullptr || *requested == '\0') return best;
  for (const Isa isa : kKnown) {
    if (std::string(requested) != isa_name(isa)) continue;
    if (isa <= best) return isa;
    throw std::runtime_error("BackendUnavailable: INFERNEO_CPU_ISA is '" + std::string(requested) +
                             "'; this machine runs up to '" + isa_name(best) + "' (unset it)");
  }
  throw std::runtime_error("BackendUnavailable: INFERNEO_CPU_ISA is '" + std::string(requested) + "'; it is " +
                           kKnownNames + " (unset it for the best)");
}

template <class T>
const Passes<T>& passes(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return avx512::kPasses<T>;
  if (isa == Isa::kAvx2) return avx2::kPasses<T>;
#endif
  static_cast<void>(isa);
  return scalar::kPasses<T>;
}

template const Passes<float>& passes<float>(Isa isa);
template const Passes<BFloat16>& passes<BFloat16>(Isa isa);

const ListPasses& list_passes(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return avx512::kListPasses;
  if (isa == Isa::kAvx2) return avx2::kListPasses;
#endif
  static_cast<void>(isa);
  return scalar::kListPasses;
}

}  // namespace inferneo
