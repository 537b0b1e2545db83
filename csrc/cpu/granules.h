// Granules of the paged cache, and their copies as operands of products; part of row_kernels_impl.h.

#include "cache_words.h"

INFERNEO_INLINE int64_t padded(int64_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

// Numbers that one product takes of either side.
template <class T>
constexpr int64_t kPerProduct = kInPairs<T> ? 2 : 1;

template <class T>
INFERNEO_INLINE int64_t num_products(int64_t count) {
  return (count + kPerProduct<T> - 1) / kPerProduct<T>;
}

// Asks for `count` lines, `offset` on, of the granule that will be read kAhead later: a few lines at a time between the
// work on others, for a burst would stall the core, and into the second cache, for the first has too few line buffers.
INFERNEO_INLINE void prefetch(const void* const* granule, int64_t offset, int64_t count) {
  const char* const later = static_cast<const char*>(granule[kAhead]) + offset;
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(later + 64 * i, 0, 2);
}

// Some granules of keys or values of the cache type T, with head_dim elements a row.
template <class T>
struct Granules {
  const void* const* places;
  int64_t head_dim;

  static constexpr int64_t kElements = 16 / sizeof(T);  // in sixteen bytes
  static constexpr int64_t kSize = sizeof(T);
  static constexpr bool kIsScaled = std::is_same_v<T, Code>;
  INFERNEO_INLINE int64_t row_bytes() const { return head_dim * kSize + (kIsScaled ? kScaleBytes : 0); }
  INFERNEO_INLINE const char* row(int64_t i) const {
    return static_cast<const char*>(places[i / kGranule]) + i % kGranule * row_bytes();
  }
  // Sixteen bytes, from dimension d on, of the keys from `first` on: as words of kLanes keys. Asks for as many bytes of
  // a later granule.
  INFERNEO_INLINE void words(int64_t first, int64_t d, Words (&words)[4]) const {
    prefetch(places + first / kGranule, first % kGranule * row_bytes() + d * kSize * kLanes, kLanes / 4);
    load_words(row(first) + d * kSize, row_bytes(), words);
  }
  // Asks for the keys from `first` on, kLanes of them, line after line: `words` hops from row to row, and an order that
  // is not the memory's keeps the hardware's prefetchers from running ahead.
  INFERNEO_INLINE void touch(int64_t first) const {
    for (int64_t i = 0; i < kLanes * row_bytes(); i += 64) __builtin_prefetch(row(first) + i, 0, 3);
  }
  // Dimension d of the keys from `first` on, or the pair it begins.
  INFERNEO_INLINE Vec column(int64_t first, int64_t d) const {
    float column[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      const char* const place = row(first + j) + d * kSize;
      if constexpr (kInPairs<T>) {
        const uint32_t second = d + 1 < head_dim ? load_as<uint16_t>(place + kSize) : 0;
        column[j] = bits_float(load_as<uint16_t>(place) | second << 16);
      } else {
        column[j] = to_float(load_as<T>(place));
      }
    }
    return load(column);
  }
};

// out[j / kKeyTile, d, j % kKeyTile] = key j's dimension d, or pair d; count in whole granules.
template <class T>
void widen_keys(const Granules<T>& keys, int64_t count, float* out) {
  const int64_t depth = num_products<T>(keys.head_dim);
  for (int64_t first = 0; first < count; first += kLanes) {
    float* const columns = out + first / kKeyTile * kKeyTile * depth + first % kKeyTile;
    int64_t d = 0;
    for (; d + keys.kElements <= keys.head_dim; d += keys.kElements) {
      Words words[4];
      keys.words(first, d, words);
#pragma GCC unroll 16
      for (int64_t i = 0; i < keys.kElements / kPerProduct<T>; ++i) {
        store(columns + (d / kPerProduct<T> + i) * kKeyTile, element<T>(words, i));
      }
    }
    for (; d < keys.head_dim; d += kPerProduct<T>) {
      store(columns + d / kPerProduct<T> * kKeyTile, keys.column(first, d));
    }
  }
}

// out[j, d] = value j's dimension d, padded with zeros to whole vectors.
template <class T>
void widen_values(const Granules<T>& values, int64_t count, float* out) {
  const int64_t stride = padded(values.head_dim);
  for (int64_t j = 0; j < count; ++j) {
    prefetch(values.places + j / kGranule, j % kGranule * values.row_bytes(), (values.row_bytes() + 63) / 64);
    const T* const value = reinterpret_cast<const T*>(values.row(j));
    int64_t d = 0;
    for (; d + kLanes <= values.head_dim; d += kLanes) store(out + j * stride + d, load(value + d));
    for (; d < stride; ++d) out[j * stride + d] = d < values.head_dim ? to_float(value[d]) : 0.0f;
  }
}

#if INFERNEO_BF16_DOT
// out[j, d] = dimension d of values 2 * j and 2 * j + 1.
template <>
void widen_values(const Granules<BFloat16>& values, int64_t count, float* out) {
  const int64_t stride = padded(values.head_dim), row_bytes = values.row_bytes();
  for (int64_t j = 0; j < count; j += 2, out += stride) {
    prefetch(values.places + j / kGranule, j % kGranule * row_bytes, (2 * row_bytes + 63) / 64);
    const auto* const value = reinterpret_cast<const BFloat16*>(values.row(j));
    const auto* const next = j + 1 < count ? reinterpret_cast<const BFloat16*>(values.row(j + 1)) : nullptr;
    int64_t d = 0;
    for (; d + 2 * kLanes <= values.head_dim; d += 2 * kLanes) {
      Vec pairs[2];
      load_pairs(value + d, next == nullptr ? next : next + d, pairs);
      for (int64_t n = 0; n < 2; ++n) store(out + d + n * kLanes, pairs[n]);
    }
    for (; d < stride; ++d) {
      const bool is_inside = d < values.head_dim;
      const uint32_t first = is_inside ? value[d].bits : 0, second = is_inside && next != nullptr ? next[d].bits : 0;
      out[d] = bits_float(first | second << 16);
    }
  }
}
#endif
