// The storage formats of a weight, and how 16 rows of each lie together once they are packed.
//
// A row is a run of blocks of 32 columns. A *group* is 16 rows side by side, so that one 64-byte load holds four
// columns of every row and one vector register holds one output of every row. A group is a run of *units*, read from
// end to end; a unit is the scales of its blocks, then their codes:
//
//   scales   kPairs       2 blocks a unit: 16 pairs of int16 d, the first block's above the second's; then, where codes
//                         have no offset, 16 pairs of m                     weight = step * (d * (code - 8) + 8 * m)
//            kSymmetric   2 blocks: 16 fp16 d each                            weight = d * (code - offset)
//            kAffine      1 block: 16 fp16 d, 16 fp16 m                       weight = d * code + m
//            kSuperAffine 8 blocks: 16 fp16 d, 16 fp16 dmin, then each 16 uint8 s, 16 uint8 t
//                                                                             weight = d * s * code - dmin * t
//            kSuperHalves 8 blocks: 16 fp16 d, 32 unused bytes, then each 16 int8 s of its first 16 columns and 16 of
//                         its last                                            weight = d * s * (code - offset)
//   codes    below 8 bits a block: four 64-byte vectors; byte 4 * row + i of vector v holds columns 4 * v + i (low
//                         nibble) and 16 + 4 * v + i (high nibble). Then for bit 4 of the codes, and for bit 5, eight
//                         64-bit masks; bit 4 * row + i of mask j belongs to column 4 * j + i
//            8 bits       a block: eight 64-byte vectors; byte 4 * row + i of vector j holds column 4 * j + i
//            dense        fp32, fp16: column by column, 16 values; bf16: two columns at a time, 16 pairs
//
// kPairs: a row's step is a power of two, in bf16, apart from the groups. d and m are rounded to it, so the fp16 scales
// as they were stored are kept beside a weight whose rows will be asked for.
//
// Source of the block formats: ggml, https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
#pragma once

#include <cstdint>

namespace inferneo {

constexpr int kGroupRows = 16;
constexpr int kBlockColumns = 32;
constexpr int kSuperBlocks = 8;  // blocks under one pair of fp16 scales in the K formats

enum class Format : int32_t { kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K, kBF16, kFP16, kFP32 };
constexpr int kNumFormats = 11;

enum class Scaling { kPairs, kSymmetric, kAffine, kSuperAffine, kSuperHalves, kDense };

struct FormatTraits {
  const char* name;  // as GGUF spells it
  Scaling scaling;
  int bits;          // of a code, or of a dense value
  int offset_bits;   // the code of weight 0 is 1 << offset_bits; 0: none is subtracted
  int type_columns;  // of one stored block
  int type_bytes;
};

constexpr FormatTraits kFormats[kNumFormats] = {
    {"Q4_0", Scaling::kPairs, 4, 3, 32, 18},         {"Q4_1", Scaling::kPairs, 4, 0, 32, 20},
    {"Q5_0", Scaling::kSymmetric, 5, 4, 32, 22},     {"Q5_1", Scaling::kAffine, 5, 0, 32, 24},
    {"Q8_0", Scaling::kSymmetric, 8, 7, 32, 34},     {"Q4_K", Scaling::kSuperAffine, 4, 0, 256, 144},
    {"Q5_K", Scaling::kSuperAffine, 5, 0, 256, 176}, {"Q6_K", Scaling::kSuperHalves, 6, 5, 256, 210},
    {"BF16", Scaling::kDense, 16, 0, 1, 2},          {"F16", Scaling::kDense, 16, 0, 1, 2},
    {"F32", Scaling::kDense, 32, 0, 1, 4},
};

constexpr const FormatTraits& traits(Format format) { return kFormats[static_cast<int>(format)]; }
constexpr bool is_dense(Format format) { return traits(format).scaling == Scaling::kDense; }

constexpr bool is_paired(Format format) { return traits(format).scaling == Scaling::kPairs; }

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Blocks that share a unit; the last unit of a row may be short.
constexpr int unit_blocks(Format format) {
  switch (traits(format).scaling) {
    case Scaling::kPairs:
    case Scaling::kSymmetric:
      return 2;
    case Scaling::kAffine:
      return 1;
    default:
      return kSuperBlocks;
  }
}

// Bytes of scales at the start of a unit: whole 64-byte lines, so that codes are aligned.
constexpr int64_t scale_bytes(Format format) {
  if (unit_blocks(format) == kSuperBlocks) return 64 + kSuperBlocks * 32;
  return is_paired(format) && traits(format).offset_bits == 0 ? 128 : 64;
}

// Bytes of codes that a block of a group takes; a quantised format's.
constexpr int64_t code_bytes(Format format) { return traits(format).bits * 64; }

constexpr int kMiddleSteps = 8;                 // m of kPairs is counted in so many steps
constexpr int64_t kStepBytes = 2 * kGroupRows;  // of a group's steps

constexpr int64_t group_bytes(Format format, int64_t columns) {
  if (is_dense(format)) return round_up(columns, 2) * kGroupRows * (traits(format).bits / 8);
  const int64_t blocks = columns / kBlockColumns;
  return round_up(blocks, unit_blocks(format)) / unit_blocks(format) * scale_bytes(format) +
         blocks * code_bytes(format);
}

}  // namespace inferneo
