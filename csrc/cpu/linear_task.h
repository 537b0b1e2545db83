// What the kernels of every instruction set are handed, and what they do with their results.
#pragma once

#include "half.h"
#include "linear.h"

#define INFERNEO_UNROLL _Pragma("GCC unroll 16")
#define INFERNEO_INLINE_LAMBDA __attribute__((always_inline))

namespace inferneo {

// How far ahead weights are fetched into the L2. One token is bound by memory: 512 to 1,536 bytes ahead it reaches the
// speed of plain reading, 4 KiB ahead 3/4 of it. Tiles of tokens are bound by the multipliers: 4 tokens of the default
// model's layers take 2.95 ms with 16 KiB, 4.5 ms with 2 KiB; 8 KiB is 2% faster than 16.
constexpr int64_t kPrefetchNear = 1024;
constexpr int64_t kPrefetchFar = 8192;

// A number of each of four tokens.
typedef float QuadFloats __attribute__((vector_size(16)));
typedef int32_t QuadInts __attribute__((vector_size(16)));

// What quantising a block of four tokens gives beside its codes; all is 0 for tokens that there are not.
struct QuadSums {
  QuadInts head, all;  // of the first 16 codes, and of all
};

template <class T, class Value>
INFERNEO_INLINE void store_as(T (&out)[kQuad], Value value) {
  static_assert(sizeof out == sizeof value);
  std::memcpy(out, &value, sizeof out);
}

// Activations' codes: adding 1.5 * 2**23 rounds to nearest even; below this largest (1e-30f) 127 / largest could
// overflow.
constexpr float kRoundCode = 12582912.0f;
constexpr int32_t kSmallestLargest = 0x0da24260;

// Rows [row_begin, row_end) of one segment, counted from the segment's first row, for some tokens.
struct RowsTask {
  const uint8_t* groups;
  const uint8_t* steps;  // bf16 [rows of the groups], of a format in pairs; else null
  int64_t columns;
  // Their activations, in the form that the segment's format reads; the others are null.
  const QuantizedBlock* quantized;  // [quads, blocks]
  const PairBlock* pairs;           // [quads, pairs of blocks]
  const float* units;               // of pairs: [quads, kQuad]
  const float* floats;              // [quads, columns rounded up to 2, kQuad]
  int64_t num_tokens;
  int64_t row_begin, row_end;
  const float* bias;      // of the segment's rows, or null
  const float* residual;  // likewise [num_tokens, stride], or null
  float* out;
  int64_t stride;
};

// Writes what the task asks for of values [num_tokens, num_rows], which begin at this token and row: a tile at the
// edge.
inline void put_edge(const RowsTask& task, int64_t token, int64_t num_tokens, int64_t row, int64_t num_rows,
                     const float* values) {
  const int64_t begin = task.row_begin > row ? task.row_begin - row : 0;
  const int64_t end = task.row_end < row + num_rows ? task.row_end - row : num_rows;
  for (int64_t t = 0; t < num_tokens && token + t < task.num_tokens; ++t) {
    const int64_t place = (token + t) * task.stride + row;
    for (int64_t i = begin; i < end; ++i) {
      float y = values[t * num_rows + i];
      if (task.bias != nullptr) y += task.bias[row + i];
      if (task.residual != nullptr) y = task.residual[place + i] + y;
      task.out[place + i] = y;
    }
  }
}

// Tokens of the next tile, of `left`: whole quads, as even as they come (16 are 8 and 8, not 12 and 4).
INFERNEO_INLINE int next_tile(int64_t left, int most) {
  const int64_t quads = (left + kQuad - 1) / kQuad;
  const int64_t most_quads = most / kQuad;
  if (quads <= most_quads) return static_cast<int>(quads * kQuad);
  if (quads < 2 * most_quads) return static_cast<int>((quads + 1) / 2 * kQuad);
  return most;
}

}  // namespace inferneo
