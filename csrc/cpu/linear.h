// Matrix products with packed weights. Every function is a lane's share of work: it never allocates and never blocks.
//
// The activations of quantised weights are quantised to int8 in blocks of 32 columns: scale = largest / 127, codes
// rounded to nearest even. A product is then integers inside a block, and fp32 from block to block in ascending order,
// so that a row's result has the same bits whatever the number of tokens, the split or the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../passes.h"
#include "formats.h"
#include "pack.h"
#include "team.h"

namespace inferneo {

constexpr int kQuad = 4;  // tokens that lie together in prepared activations

// Splits of the output rows should fall on multiples of this (from each segment's first row); others are right, but
// compute the rows of the group in vain.
constexpr int64_t row_granule = kGroupRows;

constexpr int64_t blocks_in(int64_t columns) { return columns / kBlockColumns; }
constexpr int64_t pairs_in(int64_t columns) { return (blocks_in(columns) + 1) / 2; }

// One block of four tokens.
struct alignas(64) QuantizedBlock {
  float scale[kQuad];
  float sum[kQuad];              // scale * the sum of the codes
  int32_t negative_sum[kQuad];   // minus the sum of the codes
  int32_t negative_head[kQuad];  // minus the sum of the first 16 codes
  int8_t codes[kQuad][kBlockColumns];
};

// Two blocks of four tokens, for formats in pairs of blocks: linear_pairs.h. What has two halves has the first block's
// in the upper 16 bits.
struct alignas(64) PairBlock {
  int8_t codes[2][kQuad][kBlockColumns];
  int32_t start[2][kQuad];  // where the integer sums of the blocks begin
  int32_t scale[kQuad];     // in the token's unit
  int32_t sum[kQuad];       // scale * the sum of the codes / 2**15
};

struct RowsTask;

// The kernels of one instruction set; chosen once, then passed along.
struct LinearKernels {
  void (*quantize)(const float* x, int64_t rows, int64_t columns, QuantizedBlock* out, Lane lane);
  // units: [quads, kQuad]
  void (*quantize_pairs)(const float* x, int64_t rows, int64_t columns, PairBlock* out, float* units, Lane lane);
  void (*rows[kNumFormats])(const RowsTask& task);
};

// The kernels for `isa`, or for the best below it that this machine has the instructions for: all give the same bits.
const LinearKernels& linear_kernels(Isa isa);

// Bytes that `rows` rows of activations take in the form that `linear` reads; 64-byte aligned memory.
int64_t prepared_bytes(const PackedLinear& linear, int64_t rows);

// This lane's share of bringing x [rows, in_features] into that form. The others' shares must be done, too, before
// linear_rows. One lane alone: Lane{0, 1}.
void prepare_rows(const LinearKernels& kernels, const PackedLinear& linear, const float* x, int64_t rows, void* out,
                  Lane lane);

// out[t, row] = the product (+ bias) (+ residual[t, row]) for t < num_tokens and row in [row_begin, row_end).
// out and residual have `stride` floats from token to token, and point at row 0; they may be the same.
void linear_rows(const LinearKernels& kernels, const PackedLinear& linear, const void* prepared, int64_t num_tokens,
                 int64_t row_begin, int64_t row_end, float* out, int64_t stride, const float* residual = nullptr);

}  // namespace inferneo
