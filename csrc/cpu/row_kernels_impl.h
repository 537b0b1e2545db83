// The kernels of row_kernels.h over the vectors of simd.h. Included as simd.h is, behind it.
//
// Attention keeps one rule, from which its bit-identity follows: whatever shares a tile with a row, the row's scores
// are chains of multiply-adds over ascending dimensions, its values chains over ascending keys, and a key that the row
// does not see adds an exact zero. Source: FlashAttention-2, arXiv 2307.08691; PagedAttention, arXiv 2309.06180.

#include "simd.h"

constexpr int64_t kColumns = kLanes == 16 ? 4 : 2;                 // vectors a micro-kernel is wide: what
constexpr int64_t kRows = kLanes == 16 ? 6 : kLanes == 8 ? 4 : 3;  // the registers hold, with one to spare

INFERNEO_INLINE int64_t padded(int64_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

// Rows that will be read next, asked for a few at a time between the work on others: a burst would stall the core. They
// are asked into the second cache; the first has too few line buffers, and waiting for those cost half of the gain.
struct Upcoming {
  const void* const* rows;
  int64_t count;
  int64_t row_bytes;

  INFERNEO_INLINE void prefetch(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end && i < count; ++i) {
      for (int64_t offset = 0; offset < row_bytes; offset += 64) {
        __builtin_prefetch(static_cast<const char*>(rows[i]) + offset, 0, 2);
      }
    }
  }
};

// out[d, j] = key j's dimension d; keys beyond count, up to a whole vector, are zeros.
template <class T>
void transpose_keys(const void* const* keys, int64_t count, int64_t head_dim, const Upcoming& upcoming, float* out) {
  for (int64_t first = 0; first < count; first += kLanes) {
    upcoming.prefetch(first, first + kLanes);
    if (count - first < kLanes) {  // the last vector of keys
      for (int64_t d = 0; d < head_dim; ++d) {
        for (int64_t j = first; j < first + kLanes; ++j) {
          out[d * kKeyTile + j] = j < count ? to_float(static_cast<const T*>(keys[j])[d]) : 0.0f;
        }
      }
      continue;
    }
    int64_t d = 0;
    if constexpr (std::is_same_v<T, BFloat16>) {  // two dimensions to a word: half the shuffles
      for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
        Words pairs[kLanes];
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLanes; ++j) {
          __builtin_memcpy(&pairs[j], static_cast<const T*>(keys[first + j]) + d, sizeof pairs[j]);
        }
        transpose(pairs);
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLanes; ++j) {
          float* const place = out + (d + 2 * j) * kKeyTile + first;
          store(place, reinterpret_cast<Vec>(pairs[j] << 16));
          store(place + kKeyTile, reinterpret_cast<Vec>(pairs[j] & 0xffff0000u));
        }
      }
    }
    for (; d + kLanes <= head_dim; d += kLanes) {
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j) rows[j] = load(static_cast<const T*>(keys[first + j]) + d);
      transpose(rows);
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j) store(out + (d + j) * kKeyTile + first, rows[j]);
    }
    for (; d < head_dim; ++d) {
      for (int64_t j = first; j < first + kLanes; ++j) {
        out[d * kKeyTile + j] = to_float(static_cast<const T*>(keys[j])[d]);
      }
    }
  }
}

// out[j, d] = value j's dimension d, padded with zeros to whole vectors.
template <class T>
void widen_values(const void* const* values, int64_t count, int64_t head_dim, const Upcoming& upcoming, float* out) {
  const int64_t stride = padded(head_dim);
  for (int64_t j = 0; j < count; ++j) {
    upcoming.prefetch(j, j + 1);
    const T* value = static_cast<const T*>(values[j]);
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(out + j * stride + d, load(value + d));
    for (; d < stride; ++d) out[j * stride + d] = d < head_dim ? to_float(value[d]) : 0.0f;
  }
}

// c[r, n] (+)= the sum over ascending k of a[r, k] * b[k, n], n over num_columns vectors.
template <int64_t num_rows, int64_t num_columns>
INFERNEO_INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                                    bool accumulate, float* c, int64_t c_stride) {
  Vec sums[num_rows][num_columns];
#pragma GCC unroll 6
  for (int64_t r = 0; r < num_rows; ++r) {
#pragma GCC unroll 4
    for (int64_t n = 0; n < num_columns; ++n) {
      sums[r][n] = accumulate ? load(c + r * c_stride + n * kLanes) : Vec{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[num_columns];
#pragma GCC unroll 4
    for (int64_t n = 0; n < num_columns; ++n) columns[n] = load(b + k * b_stride + n * kLanes);
#pragma GCC unroll 6
    for (int64_t r = 0; r < num_rows; ++r) {
      const Vec factor = splat(a[r * a_stride + k]);
#pragma GCC unroll 4
      for (int64_t n = 0; n < num_columns; ++n) sums[r][n] = fma(factor, columns[n], sums[r][n]);
    }
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < num_rows; ++r) {
#pragma GCC unroll 4
    for (int64_t n = 0; n < num_columns; ++n) store(c + r * c_stride + n * kLanes, sums[r][n]);
  }
}

template <int64_t num_rows>
void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, int64_t width,
                   bool accumulate, float* c, int64_t c_stride) {
  int64_t n = 0;
  for (; n + kColumns * kLanes <= width; n += kColumns * kLanes) {
    multiply_block<num_rows, kColumns>(a, a_stride, b + n, b_stride, depth, accumulate, c + n, c_stride);
  }
  for (; n < width; n += kLanes) {
    multiply_block<num_rows, 1>(a, a_stride, b + n, b_stride, depth, accumulate, c + n, c_stride);
  }
}

// c [num_rows, width] (+)= a [num_rows, depth] @ b [depth, width]; width in whole vectors.
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t num_rows, int64_t depth,
              int64_t width, bool accumulate, float* c, int64_t c_stride) {
  while (num_rows > 0) {
    const int64_t rows = num_rows < kRows ? num_rows : kRows;
    const auto run = rows == 1   ? multiply_rows<1>
                     : rows == 2 ? multiply_rows<2>
                     : rows == 3 ? multiply_rows<3>
                     : rows == 4 ? multiply_rows<(kRows > 3 ? 4 : 1)>
                     : rows == 5 ? multiply_rows<(kRows > 4 ? 5 : 1)>
                                 : multiply_rows<(kRows > 5 ? 6 : 1)>;
    run(a, a_stride, b, b_stride, depth, width, accumulate, c, c_stride);
    a += rows * a_stride;
    c += rows * c_stride;
    num_rows -= rows;
  }
}

// scores becomes exp(score - largest) for the keys a row sees, and 0 for the others up to num_columns.
void softmax_row(float* scores, int64_t num_keys, int64_t num_columns, float& largest, float& sum) {
  const int64_t whole = num_keys / kLanes * kLanes;
  for (int64_t i = num_keys; i < whole + kLanes && i < num_columns; ++i) scores[i] = -INFINITY;
  const int64_t end = num_keys > whole ? whole + kLanes : whole;
  Vec most = splat(-INFINITY);
  for (int64_t i = 0; i < end; i += kLanes) most = larger(load(scores + i), most);
  largest = max_lanes(most);
  Vec sums{};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec weights = exp_lanes(load(scores + i) - largest);
    store(scores + i, weights);
    sums += weights;
  }
  if (end > whole) {  // exp_lanes gives no zeros, so the lanes past the last key are made zero here
    store(scores + whole, exp_lanes(load(scores + whole) - largest));
    std::fill(scores + num_keys, scores + end, 0.0f);
    sums += load(scores + whole);
  }
  sum = sum_lanes(sums);
  std::fill(scores + end, scores + num_columns, 0.0f);
}

template <class T>
void attend(const AttentionTile& tile, const AttentionState& state, float* scratch) {
  const int64_t head_dim = tile.head_dim;
  const int64_t row_bytes = head_dim * static_cast<int64_t>(sizeof(T));
  const int64_t num_columns = (tile.num_keys + kLanes - 1) / kLanes * kLanes;
  float* const scores = scratch;                       // [num_rows, kKeyChunk]
  float* const wide = scratch + kRowTile * kKeyChunk;  // [head_dim, kKeyTile], then [kKeyTile, padded]
  for (int64_t first = 0; first < tile.num_keys; first += kKeyTile) {
    const int64_t count = std::min(kKeyTile, tile.num_keys - first);
    const int64_t next = first + count;
    const bool is_last = next == tile.num_keys;
    const Upcoming upcoming{is_last ? tile.values : tile.keys + next,
                            std::min(kKeyTile, is_last ? tile.num_keys : tile.num_keys - next), row_bytes};
    transpose_keys<T>(tile.keys + first, count, head_dim, upcoming, wide);
    multiply(tile.queries, head_dim, wide, kKeyTile, tile.num_rows, head_dim, std::min(kKeyTile, num_columns - first),
             false, scores + first, kKeyChunk);
  }
  for (int64_t r = 0; r < tile.num_rows; ++r) {
    if (tile.row_keys[r] > 0) {
      softmax_row(scores + r * kKeyChunk, tile.row_keys[r], num_columns, state.largest[r], state.sum[r]);
    } else {
      std::fill_n(scores + r * kKeyChunk, num_columns, 0.0f);
    }
  }
  for (int64_t first = 0; first < tile.num_keys; first += kKeyTile) {
    const int64_t count = std::min(kKeyTile, tile.num_keys - first);
    const int64_t next = first + count;
    const bool is_last = next == tile.num_keys;
    const Upcoming upcoming{is_last ? tile.next_keys : tile.values + next,
                            is_last ? tile.num_next_keys : std::min(kKeyTile, tile.num_keys - next), row_bytes};
    widen_values<T>(tile.values + first, count, head_dim, upcoming, wide);
    multiply(scores + first, kKeyChunk, wide, padded(head_dim), tile.num_rows, count, padded(head_dim), first > 0,
             state.values, state.stride);
  }
}

void merge(float& largest, float& sum, float* values, float part_largest, float part_sum, const float* part_values,
           int64_t head_dim) {
  const float most = part_largest > largest ? part_largest : largest;
  const float old_weight = exp_float(largest - most);
  const float part_weight = exp_float(part_largest - most);
  largest = most;
  sum = sum * old_weight + part_sum * part_weight;
  for (int64_t d = 0; d < head_dim; ++d) values[d] = values[d] * old_weight + part_values[d] * part_weight;
}

void scale(const float* x, float factor, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor;
}

void rms_norm(const float* x, const float* weight, float eps, int64_t count, float* out) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int64_t j = 0; j < 4; ++j) {
      const Vec v = load(x + i + j * kLanes);
      sums[j] = fma(v, v, sums[j]);
    }
  }
  float rest = 0.0f;
  for (; i < count; ++i) rest += x[i] * x[i];
  const float squares = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(count) + eps);
  for (i = 0; i < count; ++i) out[i] = x[i] * factor * weight[i];
}

void rotate(float* head, const float* cos_sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[half + i];
    const float cosine = cos_sin[i], sine = cos_sin[half + i];
    head[i] = first * cosine - second * sine;
    head[half + i] = second * cosine + first * sine;
  }
}

void silu_mul(float* gate, const float* up, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec x = load(gate + i);
    const Vec e = exp_lanes(-larger(x, -x));  // exp_lanes takes what is not positive
    const Vec numerator = x > 0.0f ? splat(1.0f) : e;
    store(gate + i, x * (numerator / (1.0f + e)) * load(up + i));
  }
  for (; i < count; ++i) {
    const float x = gate[i];
    const float e = exp_float(x > 0.0f ? -x : x);
    gate[i] = x * ((x > 0.0f ? 1.0f : e) / (1.0f + e)) * up[i];
  }
}

template <class T>
void store_row(const float* x, int64_t count, void* out) {
  T* const row = static_cast<T*>(out);
  for (int64_t i = 0; i < count; ++i) from_float(x[i], row[i]);
}

constexpr RowKernels kRowKernels{
    {attend<float>, attend<BFloat16>, attend<Half>},          merge, scale, rms_norm, rotate, silu_mul,
    {store_row<float>, store_row<BFloat16>, store_row<Half>},
};
