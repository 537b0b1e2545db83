// A weight [out_features, in_features] in the layout of formats.h: one run of bytes that describes itself, so that a
// uint8 tensor owns it and nothing else has to be kept.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace inferneo {

constexpr int kMaxSegments = 8;
constexpr uint64_t kPackedMagic = 0x31307865'6e726669;

// Rows [row_begin, row_begin + num_rows) in one format; the last group is filled up with rows of zeros.
struct PackedSegment {
  int64_t row_begin, num_rows;
  int64_t offset;         // of its first group, from the start of the PackedLinear
  int64_t steps_offset;   // of a bf16 for each row of its groups (kPairs); 0: none
  int64_t stored_offset;  // of fp16 d and m [num_rows, blocks, 2] as they were stored (kPairs, if kept); 0: none
  Format format;
};

// The first bytes of a packed weight; its groups follow, 64-byte aligned.
struct PackedLinear {
  uint64_t magic;
  int64_t out_features, in_features;
  int64_t num_bytes;
  int64_t bias_offset;  // of [out_features] fp32; 0: no bias
  int64_t num_segments;
  bool keeps_rows;
  bool has_blocks, has_pairs, has_dense;  // which forms of the activations its segments read
  PackedSegment segments[kMaxSegments];

  const std::byte* at(int64_t offset) const { return reinterpret_cast<const std::byte*>(this) + offset; }
  const float* bias() const { return bias_offset == 0 ? nullptr : reinterpret_cast<const float*>(at(bias_offset)); }
};

// Rows as the loader has them.
struct SourceSegment {
  const uint8_t* data;  // num_rows runs of stored blocks, or dense rows
  int64_t num_rows, row_bytes;
  const int64_t* row_order;  // row i is stored as row row_order[i]; null: in order
  Format format;
};

// Lays a weight out: everything but the groups, which pack_groups fills. num_bytes says how many bytes it takes.
// keeps_rows: unpack_rows will be asked for rows; else it may not.
PackedLinear plan_linear(const SourceSegment* segments, int64_t num_segments, int64_t in_features, bool has_bias,
                         bool keeps_rows);

// Fills groups [begin, end) of one segment. `packed` is the start of the whole weight.
void pack_groups(const SourceSegment& source, const PackedSegment& segment, int64_t in_features, int64_t begin,
                 int64_t end, std::byte* packed);

// out[i] = row ids[i] of the weight in fp32, with the bits that dequantisation defines; no bias.
void unpack_rows(const PackedLinear& linear, const int64_t* ids, int64_t count, float* out);

}  // namespace inferneo
