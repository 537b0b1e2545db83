// Attention over one chunk of keys; part of row_kernels_impl.h.
//
// One rule gives its bit-identity: whatever shares a tile with a row, the row's scores are chains of fused
// multiply-adds over ascending dimensions, its values chains over ascending keys, and a key that the row does not see
// adds an exact zero. Few rows, as in a decode, take keys and values straight from the cache; many share a copy, in
// fp32 or in pairs.
//
// Over a cache in bf16, queries and weights are bf16, too: products are exact, and the sum of weights is that of the
// rounded ones. AVX512-BF16 multiplies pairs of dimensions (keys, for the values) and adds the second product, then the
// first, each with a rounding of its own; so every other instruction set takes two fused multiply-adds in that order,
// and has the same bits. Only what is below 2**-126 may differ: the instruction takes it for 0.
//
// Source: FlashAttention-2, arXiv 2307.08691; PagedAttention, arXiv 2309.06180.

#include "granules.h"

#if INFERNEO_LANES == 16 || defined(__aarch64__)
constexpr int64_t kColumns = 4, kRows = 6;  // vectors and rows of a micro-kernel: what 32 registers hold,
#else
constexpr int64_t kColumns = 2, kRows = kLanes == 8 ? 4 : 3;  // or 16, with one to spare
#endif
static_assert(kRows <= kRowBlock);  // attention_scratch has room for so many

// f(count as a constant), 1 <= count <= kMost.
template <int64_t kMost, class F>
INFERNEO_INLINE void with_constant(int64_t count, F f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_constant<kMost - 1>(count, f);
  }
  f(std::integral_constant<int64_t, kMost>{});
}

// The k-th of the `count` products of a chain.
template <class T>
INFERNEO_INLINE int64_t in_turn(int64_t k, int64_t count) {
  if constexpr (!std::is_same_v<T, BFloat16> || kInPairs<T>) return k;
  return (k ^ 1) < count ? k ^ 1 : k;
}

// sums[r] += factors[r * stride] * columns, words of the cache type T's kind.
template <class T, int64_t num_rows, int64_t num_columns>
INFERNEO_INLINE void add_products(const float* factors, int64_t stride, const Vec (&columns)[num_columns],
                                  Vec (&sums)[num_rows][num_columns]) {
#pragma GCC unroll 6
  for (int64_t r = 0; r < num_rows; ++r) {
    const Vec factor = broadcast<T>(factors + r * stride);
#pragma GCC unroll 4
    for (int64_t n = 0; n < num_columns; ++n) sums[r][n] = add_product<T>(factor, columns[n], sums[r][n]);
  }
}

// scores[r, j] = queries[r] * key `first` + j, for num_rows rows and num_vecs vectors of keys.
template <class T, int64_t num_rows, int64_t num_vecs>
INFERNEO_INLINE void score_block(const float* queries, const Granules<T>& keys, int64_t first, float* scores) {
  constexpr int64_t kNumProducts = Granules<T>::kElements / kPerProduct<T>;
  for (int64_t n = 0; n < num_vecs; ++n) keys.touch(first + n * kLanes);
  Vec sums[num_rows][num_vecs] = {};
  Vec columns[num_vecs];
  int64_t d = 0;
  for (; d + keys.kElements <= keys.head_dim; d += keys.kElements) {
    Words words[num_vecs][4];
#pragma GCC unroll 2
    for (int64_t n = 0; n < num_vecs; ++n) keys.words(first + n * kLanes, d, words[n]);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kNumProducts; ++i) {
      const int64_t k = in_turn<T>(i, kNumProducts);
#pragma GCC unroll 2
      for (int64_t n = 0; n < num_vecs; ++n) columns[n] = element<T>(words[n], k);
      add_products<T, num_rows>(queries + d / kPerProduct<T> + k, keys.head_dim, columns, sums);
    }
  }
  for (int64_t i = 0; d + i < keys.head_dim; i += kPerProduct<T>) {
    const int64_t k = d + in_turn<T>(i, keys.head_dim - d);
    for (int64_t n = 0; n < num_vecs; ++n) columns[n] = keys.column(first + n * kLanes, k);
    add_products<T, num_rows>(queries + k / kPerProduct<T>, keys.head_dim, columns, sums);
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < num_rows; ++r) {
#pragma GCC unroll 2
    for (int64_t n = 0; n < num_vecs; ++n) store(scores + r * kKeyChunk + first + n * kLanes, sums[r][n]);
  }
}

// The scores of num_keys keys, whole granules, for few rows.
template <class T, int64_t num_rows>
void score_keys(const float* queries, const Granules<T>& keys, int64_t num_keys, float* scores) {
  constexpr int64_t kVecs = 2 * num_rows <= kRows ? 2 : 1;  // two hide the latency of a chain
  int64_t first = 0;
  for (; first + kVecs * kLanes <= num_keys; first += kVecs * kLanes) {
    score_block<T, num_rows, kVecs>(queries, keys, first, scores);
  }
  for (; first < num_keys; first += kLanes) score_block<T, num_rows, 1>(queries, keys, first, scores);
}

// c[r, n] = the sum over k of a[r, k] * b[k, n], n over num_columns vectors.
template <class T, int64_t num_rows, int64_t num_columns>
INFERNEO_INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                                    float* c, int64_t c_stride) {
  Vec sums[num_rows][num_columns] = {};
  for (int64_t i = 0; i < depth; ++i) {
    const int64_t k = in_turn<T>(i, depth);
    Vec columns[num_columns];
    load_columns(b + k * b_stride, columns);
    add_products<T, num_rows>(a + k, a_stride, columns, sums);
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < num_rows; ++r) store_columns<float>(c + r * c_stride, sums[r]);
}

// c [num_rows, width] = a [num_rows, depth] @ b [depth, width], floats or pairs; width in whole vectors.
template <class T, int64_t num_rows>
INFERNEO_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                              int64_t width, float* c, int64_t c_stride) {
  int64_t n = 0;
  for (; n + kColumns * kLanes <= width; n += kColumns * kLanes) {
    multiply_block<T, num_rows, kColumns>(a, a_stride, b + n, b_stride, depth, c + n, c_stride);
  }
  for (; n < width; n += kLanes) {
    multiply_block<T, num_rows, 1>(a, a_stride, b + n, b_stride, depth, c + n, c_stride);
  }
}

// out[r] = the sum of the values' dimensions from d on, num_columns vectors, weighted by weights[r].
template <class T, int64_t num_rows, int64_t num_columns>
INFERNEO_INLINE void sum_block(const float* weights, const Granules<T>& values, int64_t num_keys, int64_t d, float* out,
                               int64_t stride) {
  constexpr int64_t kLines = (num_columns * kLanes * Granules<T>::kSize + 63) / 64;
  Vec sums[num_rows][num_columns] = {};
  for (int64_t first = 0; first < num_keys; first += kGranule) {
    const int64_t end = std::min(kGranule, num_keys - first);
    for (int64_t i = 0; i < end; i += kPerProduct<T>) {
      const int64_t j = in_turn<T>(i, end), offset = j * values.row_bytes() + d * values.kSize;
      prefetch(values.places + first / kGranule, offset, kPerProduct<T> * kLines);
      Vec columns[num_columns];
      const char* const place = values.row(first) + offset;
      if constexpr (kInPairs<T>) {
        const char* const next = j + 1 < end ? place + values.row_bytes() : nullptr;
        load_pairs(reinterpret_cast<const T*>(place), reinterpret_cast<const T*>(next), columns);
      } else {
        load_columns(reinterpret_cast<const T*>(place), columns);
      }
      add_products<T, num_rows>(weights + (first + j) / kPerProduct<T>, kKeyChunk, columns, sums);
    }
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < num_rows; ++r) store_columns<T>(out + r * stride + d, sums[r]);
}

// All dimensions, in whole vectors, for few rows.
template <class T, int64_t num_rows>
void sum_values(const float* weights, const Granules<T>& values, int64_t num_keys, float* out, int64_t stride) {
  int64_t d = 0;
  for (; d + kColumns * kLanes <= values.head_dim; d += kColumns * kLanes) {
    sum_block<T, num_rows, kColumns>(weights, values, num_keys, d, out, stride);
  }
  for (; d < values.head_dim; d += kLanes) sum_block<T, num_rows, 1>(weights, values, num_keys, d, out, stride);
}

// scores [num_rows, kKeyChunk] become 2**(score - largest) for the keys a row sees, and 0 for the others up to
// num_columns, as floats or as pairs. All rows side by side, so that their chains overlap.
template <class T, int64_t num_rows>
void softmax_rows(float* scores, const int64_t* row_keys, int64_t num_columns, float* largest, float* sum) {
  constexpr int64_t kStep = kWeightVecs * kLanes;
  const int64_t end = (num_columns + kStep - 1) / kStep * kStep;
  Vec most[num_rows];
#pragma GCC unroll 6
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t i = row_keys[r]; i < end; ++i) scores[r * kKeyChunk + i] = -INFINITY;
    most[r] = load(scores + r * kKeyChunk);
  }
  for (int64_t i = kLanes; i < end; i += kLanes) {
#pragma GCC unroll 6
    for (int64_t r = 0; r < num_rows; ++r) most[r] = larger(load(scores + r * kKeyChunk + i), most[r]);
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < num_rows; ++r) largest[r] = max_lanes(most[r]);
  Vec sums[num_rows][kSumVecs] = {};
  for (int64_t i = 0; i < end; i += kStep) {
#pragma GCC unroll 6
    for (int64_t r = 0; r < num_rows; ++r) {
      float* const row = scores + r * kKeyChunk;
      Vec weights[kWeightVecs];
#pragma GCC unroll 8
      for (int64_t j = 0; j < kWeightVecs; ++j) {
        weights[j] = exp2_fused<std::is_same_v<T, BFloat16>>(load(row + i + j * kLanes) - largest[r]);
      }
      store_weights<T>(weights, i, row, sums[r]);
    }
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < num_rows; ++r) sum[r] = sum_lanes(sums[r]);
}

// The scales of int8 rows; past the last key, up to its granule's end, 0, whatever lies there in the cache.
template <class T>
void load_scales(const Granules<T>& granules, int64_t num_keys, float* scales) {
  const int64_t end = num_granules(num_keys) * kGranule;
  for (int64_t first = 0; first < end; first += kGranule) {
    const char* const scale = granules.row(first) + granules.head_dim;
#pragma GCC unroll 16
    for (int64_t j = 0; j < kGranule; ++j) scales[first + j] = load_as<float>(scale + j * granules.row_bytes());
  }
  std::fill(scales + num_keys, scales + end, 0.0f);
}

// Brings them into what came of the rows' codes, or is to be multiplied with them: scores and weights.
INFERNEO_INLINE void apply_scales(const float* scales, int64_t num_columns, int64_t num_rows, float* scores) {
  for (int64_t r = 0; r < num_rows; ++r) {
    float* const row = scores + r * kKeyChunk;
    for (int64_t j = 0; j < num_columns; j += kLanes) store(row + j, load(row + j) * load(scales + j));
  }
}

// A chunk's keys and values as few rows take them, where they lie, and as many do: copied to where `wide` points.
template <class T>
struct Operands {
  Granules<T> keys, values;
  float* wide_keys;
  float* wide_values;  // or null, both
  float key_scales[Granules<T>::kIsScaled ? kKeyChunk : 1], value_scales[Granules<T>::kIsScaled ? kKeyChunk : 1];
};

void merge(float& largest, float& sum, float* values, float part_largest, float part_sum, const float* part_values,
           int64_t head_dim) {
  const float most = part_largest > largest ? part_largest : largest;
  const float old_weight = exp2_fused<false>(splat(largest - most))[0];
  const float part_weight = exp2_fused<false>(splat(part_largest - most))[0];
  largest = most;
  sum = sum * old_weight + part_sum * part_weight;
  for (int64_t d = 0; d < head_dim; ++d) values[d] = values[d] * old_weight + part_values[d] * part_weight;
}

void scale(const float* x, float factor, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor;
}

// A query, scaled: words of the cache type's kind.
template <class T>
INFERNEO_INLINE void scale_query(const float* x, float factor, int64_t head_dim, float* out) {
  if constexpr (!std::is_same_v<T, BFloat16>) return scale(x, factor, head_dim, out);
  int64_t d = 0;
#if INFERNEO_BF16_DOT
  if constexpr (kInPairs<T>) {
    for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
      store(out + d / 2, to_pairs(load(x + d) * factor, load(x + d + kLanes) * factor));
    }
    auto* const halves = reinterpret_cast<BFloat16*>(out);
    for (; d < head_dim; ++d) from_float(x[d] * factor, halves[d]);
    if (head_dim % 2 != 0) halves[head_dim] = {0};
  }
#endif
  for (; d < head_dim; ++d) out[d] = to_float(BFloat16{float_to_bfloat16(x[d] * factor)});
}

// Rows `first` to first + num_rows of a tile. Queries and outputs come and go here: the products next to them hide
// their stores, which seldom find a line in the first cache.
template <class T, int64_t num_rows>
void attend_rows(const AttentionTile& tile, const AttentionState& state, const Operands<T>& with, int64_t first,
                 float* scratch) {
  const int64_t head_dim = tile.head_dim, num_keys = tile.row_keys[first + num_rows - 1];
  const int64_t num_columns = num_granules(num_keys) * kGranule, depth = num_products<T>(head_dim);
  const int64_t* const rows = tile.rows + first;
  float* const queries = tile.queries + first * head_dim;
  if (tile.q != nullptr) {
    const float factor = kLog2E / std::sqrt(static_cast<float>(head_dim));  // softmax takes powers of 2
    for (int64_t r = 0; r < num_rows; ++r) scale_query<T>(tile.q + rows[r], factor, head_dim, queries + r * head_dim);
  }
  float* const largest = state.largest + first;
  float* const sum = state.sum + first;
  float* const values = state.values + first * state.stride;
  if (num_keys > 0) {
    float* const scores = scratch;  // [num_rows, kKeyChunk]
    float part_largest[num_rows], part_sum[num_rows];
    const bool is_first = tile.q != nullptr;
    float* const part_values = is_first ? values : scratch + kRowBlock * kKeyChunk;
    if (with.wide_keys == nullptr) score_keys<T, num_rows>(queries, with.keys, num_columns, scores);
    for (int64_t j = 0; with.wide_keys != nullptr && j < num_columns; j += kKeyTile) {
      multiply<T, num_rows>(queries, head_dim, with.wide_keys + j * depth, kKeyTile, depth,
                            std::min(kKeyTile, num_columns - j), scores + j, kKeyChunk);
    }
    if constexpr (Granules<T>::kIsScaled) apply_scales(with.key_scales, num_columns, num_rows, scores);
    softmax_rows<T, num_rows>(scores, tile.row_keys + first, num_columns, is_first ? largest : part_largest,
                              is_first ? sum : part_sum);
    if constexpr (Granules<T>::kIsScaled) apply_scales(with.value_scales, num_columns, num_rows, scores);
    if (with.wide_values == nullptr) {
      sum_values<T, num_rows>(scores, with.values, num_keys, part_values, state.stride);
    } else {
      multiply<T, num_rows>(scores, kKeyChunk, with.wide_values, padded(head_dim), num_products<T>(num_keys),
                            padded(head_dim), part_values, state.stride);
    }
    for (int64_t r = 0; r < num_rows && !is_first; ++r) {
      if (tile.row_keys[first + r] == 0) continue;
      merge(largest[r], sum[r], values + r * state.stride, part_largest[r], part_sum[r], part_values + r * state.stride,
            head_dim);
    }
  }
  for (int64_t r = 0; r < num_rows && tile.out != nullptr; ++r) {
    scale(values + r * state.stride, 1.0f / sum[r], head_dim, tile.out + rows[r]);
  }
}

template <class T>
void attend(const AttentionTile& tile, const AttentionState& state, float* scratch) {
  const int64_t head_dim = tile.head_dim, num_keys = tile.num_keys, granules = num_granules(num_keys);
  float* const wide_keys = scratch + kRowBlock * (kKeyChunk + state.stride);
  const bool is_few = tile.num_rows <= kRows;
  Operands<T> with{{tile.granules, head_dim}, {tile.granules + granules, head_dim}, nullptr, nullptr, {}, {}};
  if (!is_few) {
    with.wide_keys = wide_keys;
    widen_keys(with.keys, granules * kGranule, with.wide_keys);
  }
  if (!is_few || head_dim % kLanes != 0) {
    with.wide_values = wide_keys + kKeyChunk * padded(head_dim);
    widen_values(with.values, num_keys, with.wide_values);
  }
  if constexpr (Granules<T>::kIsScaled) {
    load_scales(with.keys, num_keys, with.key_scales);
    load_scales(with.values, num_keys, with.value_scales);
  }
  for (int64_t first = 0; first < tile.num_rows; first += kRows) {
    with_constant<kRows>(std::min(kRows, tile.num_rows - first),
                         [&](auto rows) { attend_rows<T, rows>(tile, state, with, first, scratch); });
  }
}
