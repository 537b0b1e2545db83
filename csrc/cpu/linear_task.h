// What the kernels of every instruction set are handed, and what they do with their results.
#pragma once

#include "half.h"
#include "linear.h"

#define INFERNEO_UNROLL _Pragma("GCC unroll 8")

namespace inferneo {

// How far ahead weights are fetched into the L2. One token is bound by memory: 512 to 1,536 bytes ahead it reaches the
// speed of plain reading, 4 KiB ahead 3/4 of it. Tiles of tokens are bound by the multipliers: 4 tokens of the default
// model's layers take 2.95 ms with 16 KiB, 4.5 ms with 2 KiB.
constexpr int64_t kPrefetchNear = 1024;
constexpr int64_t kPrefetchFar = 16384;
constexpr int64_t kSlabBytes = int64_t{384} << 10;  // of activations: they share a 1 MiB L2 with the weights

// Activations' codes: adding 1.5 * 2**23 rounds to nearest even; below this largest (1e-30f) 127 / largest could
// overflow.
constexpr float kRoundCode = 12582912.0f;
constexpr uint32_t kSmallestLargest = 0x0da24260;

// Rows [row_begin, row_end) of one segment, counted from the segment's first row.
struct RowsTask {
  const uint8_t* groups;
  int64_t columns;
  const QuantizedBlock* quantized;  // [quads, blocks]; null for a dense segment
  const float* floats;              // [quads, columns rounded up to 2, kQuad]; null for a quantised one
  int64_t num_tokens;
  int64_t row_begin, row_end;
  const float* bias;      // of the segment's rows, or null
  const float* residual;  // likewise [num_tokens, stride], or null
  float* out;
  int64_t stride;
};

INFERNEO_INLINE void clear_token(QuantizedBlock& block, int token) {
  block.scale[token] = block.sum[token] = 0.0f;
  block.negative_sum[token] = block.negative_head[token] = 0;
  for (int i = 0; i < kBlockColumns; ++i) block.codes[token][i] = 0;
}

// Writes those of `count` rows from `row` on that the task asks for: the first and last groups of a share.
inline void put_some_rows(const RowsTask& task, int64_t token, int64_t row, int count, const float* values) {
  const int64_t place = token * task.stride + row;
  const int begin = task.row_begin > row ? static_cast<int>(task.row_begin - row) : 0;
  const int end = task.row_end < row + count ? static_cast<int>(task.row_end - row) : count;
  for (int i = begin; i < end; ++i) {
    float y = values[i];
    if (task.bias != nullptr) y += task.bias[row + i];
    if (task.residual != nullptr) y = task.residual[place + i] + y;
    task.out[place + i] = y;
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

// Tokens whose activations fill kSlabBytes: a multiple of 24, so that slabs fall apart into whole tiles.
INFERNEO_INLINE int64_t slab_tokens(const RowsTask& task) {
  const int64_t token_bytes = task.quantized != nullptr
                                  ? task.columns / kBlockColumns * static_cast<int64_t>(sizeof(QuantizedBlock)) / kQuad
                                  : task.columns * static_cast<int64_t>(sizeof(float));
  const int64_t tokens = kSlabBytes / token_bytes / 24 * 24;
  return tokens < 24 ? 24 : tokens;
}

}  // namespace inferneo
