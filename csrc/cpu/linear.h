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
constexpr int64_t quads_in(int64_t tokens) { return (tokens + kQuad - 1) / kQuad; }

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
  // Of these quads of a step's `rows` rows; x begins with the first of them, `out` and `units` with the step's.
  void (*quantize)(const float* x, int64_t rows, int64_t columns, QuantizedBlock* out, Share quads);
  // units: [quads, kQuad]
  void (*quantize_pairs)(const float* x, int64_t rows, int64_t columns, PairBlock* out, float* units, Share quads);
  void (*rows[kNumFormats])(const RowsTask& task);
};

// The kernels for `isa`, or for the best below it that this machine has the instructions for: all give the same bits.
const LinearKernels& linear_kernels(Isa isa);

// Bytes that `rows` rows of activations take in the form that `linear` reads; 64-byte aligned memory.
int64_t prepared_bytes(const PackedLinear& linear, int64_t rows);

// Brings some quads of `rows` rows into that form. x [theirs, in_features] begins with the first of them, `out` with
// the first of all. All of them must be done before linear_rows.
void prepare_rows(const LinearKernels& kernels, const PackedLinear& linear, const float* x, int64_t rows, void* out,
                  Share quads);

// Tokens whose activations stay in the cache while weights pass by: a product with more should go slab by slab. A
// multiple of kQuad.
int64_t slab_tokens(const PackedLinear& linear);

// out[t, row] = the product (+ bias) (+ residual[t, row]) for t in `tokens`, of the num_tokens that were prepared, and
// row in `rows`. tokens.begin is a multiple of kQuad. out and residual have `stride` floats from token to token, and
// point at row 0 of token 0; they may be the same.
void linear_rows(const LinearKernels& kernels, const PackedLinear& linear, const void* prepared, int64_t num_tokens,
                 Share tokens, Share rows, float* out, int64_t stride, const float* residual = nullptr);

}  // namespace inferneo
