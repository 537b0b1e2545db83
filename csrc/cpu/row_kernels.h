// What an instruction set has to offer beside matrix products: attention, and the small passes over a token's row.
//
// The kernels are written once, over a vector of kLanes floats (simd.h), and compiled for each instruction set
// (row_kernels_*.cpp). Their results do not depend on how tokens are batched, chunked or shared among threads, nor on
// the instruction set: multiply-adds are fused everywhere, and a sum over a row runs in 16 lanes.
#pragma once

#include <cstdint>

#include "../passes.h"

namespace inferneo {

enum class CacheType { kFP32, kBF16, kFP16, kInt8 };
constexpr int kCacheTypes = 4;

constexpr int64_t kScaleBytes = 4;  // an int8 row is head_dim codes, then their scale in fp32

// Bytes of a row of the cache: one token's key or value of one head.
inline int64_t cache_row_bytes(CacheType type, int64_t head_dim) {
  if (type == CacheType::kInt8) return head_dim + kScaleBytes;
  return head_dim * (type == CacheType::kFP32 ? 4 : 2);
}

constexpr int64_t kKeyChunk = 256;  // keys under one softmax; partial results of chunks are merged in ascending order
constexpr int64_t kRowTile = 96;    // query rows (tokens * heads of one KV head) that share a copy of keys and values
constexpr int64_t kRowBlock = 6;    // of them at most under way at once
constexpr int64_t kKeyTile = 64;    // keys side by side in that copy
constexpr int64_t kGranule = 16;    // keys, or values, that lie one after the other in memory
constexpr int64_t kAhead = 4;       // how far ahead, in granules, memory is asked for: 4 to 16 are as fast

inline int64_t num_granules(int64_t num_keys) { return (num_keys + kGranule - 1) / kGranule; }

// Some query rows of one KV head against one chunk of keys.
struct AttentionTile {
  // The granules of the chunk's keys, those of its values, and kAhead that will be read next, to be fetched from memory
  // meanwhile. What lies past the last key is read, and the result dropped.
  const void* const* granules;
  int64_t num_keys;  // in [1, kKeyChunk]
  int64_t num_rows;  // in [1, kRowTile]
  int64_t head_dim;
  const int64_t* row_keys;  // [num_rows]: how many keys of the chunk a row sees, never fewer than the row before
  float* queries;           // [num_rows, head_dim] words, made from q in the first chunk
  // Row r's query and output begin at rows[r] of q and out. q is null after the first chunk, out before the last one.
  const int64_t* rows;
  const float* q;
  float* out;
};

// A softmax in progress: sums of 2**(score - largest) and of 2**(score - largest) * value. What it holds of rows that
// saw no key means nothing.
struct AttentionState {
  float* largest;  // [num_rows]
  float* sum;      // [num_rows]
  float* values;   // [num_rows, stride]
  int64_t stride;
};

struct RowKernels {
  // The state takes in this chunk's part, or is it where the chunk is the first; the last chunk's goes to the output.
  // scratch: attention_scratch(head_dim) floats, 64-byte aligned.
  void (*attend[kCacheTypes])(const AttentionTile& tile, const AttentionState& state, float* scratch);
  // One row of a state takes in the part of a later chunk.
  void (*merge)(float& largest, float& sum, float* values, float part_largest, float part_sum, const float* part_values,
                int64_t head_dim);
  // out = x * factor.
  void (*scale)(const float* x, float factor, int64_t count, float* out);
  // out = x / rms(x) * weight.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t count, float* out);
  // Rotate-half RoPE of one head in place. cos_sin: [head_dim], the cosines, then the sines.
  void (*rotate)(float* head, const float* cos_sin, int64_t head_dim);
  // gate = SiLU(gate) * up.
  void (*silu_mul)(float* gate, const float* up, int64_t count);
  // fp32 into a row of the cache, rounded to nearest even.
  void (*store[kCacheTypes])(const float* x, int64_t count, void* out);
};

inline int64_t attention_scratch(int64_t head_dim) {
  const int64_t padded = (head_dim + 15) / 16 * 16;
  return (kRowBlock + 2 * padded) * kKeyChunk + kRowBlock * padded;
}

const RowKernels& row_kernels(Isa isa);

}  // namespace inferneo
