#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "blocks.h"

namespace inferneo {
namespace {

int64_t num_groups(int64_t num_rows) { return (num_rows + kGroupRows - 1) / kGroupRows; }

// Where a block of a group keeps its codes and scales. Byte is uint8_t, or const uint8_t.
template <class Byte>
struct Places {
  Byte* codes;
  Byte* scales;        // kPairs: of the unit; kSymmetric, kAffine: 16 fp16 d, then 16 m; the others: 16 bytes s, then t
  Byte* super_scales;  // 16 fp16 d, then 16 dmin; null where there are none
};

template <class Byte>
Places<Byte> block_place(Format format, Byte* group, int64_t index) {
  const int64_t blocks = unit_blocks(format), nth = index % blocks;
  Byte* unit = group + index / blocks * (scale_bytes(format) + blocks * code_bytes(format));
  Byte* codes = unit + scale_bytes(format) + nth * code_bytes(format);
  if (blocks == kSuperBlocks) return {codes, unit + 64 + nth * 32, unit};
  return {codes, is_paired(format) ? unit : unit + nth * 32, nullptr};
}

// Four codes, a byte each, as the four bits of their bit `bit`.
uint32_t gathered_bits(uint32_t codes, int bit) { return (codes >> bit & 0x01010101u) * 0x01020408u >> 24 & 15; }

// Puts a row's 32 codes into a block whose bytes are still zero, four columns at a time.
void put_codes(Format format, const uint8_t* codes, int row, uint8_t* out) {
  const int bits = traits(format).bits;
  if (bits == 8) {
    for (int j = 0; j < 8; ++j) std::memcpy(out + 64 * j + 4 * row, codes + 4 * j, 4);
    return;
  }
  for (int j = 0; j < 4; ++j) {
    const auto low = load_as<uint32_t>(codes + 4 * j) & 0x0f0f0f0fu;
    const auto high = load_as<uint32_t>(codes + 16 + 4 * j) & 0x0f0f0f0fu;
    const uint32_t packed = low | high << 4;
    std::memcpy(out + 64 * j + 4 * row, &packed, 4);
  }
  for (int bit = 4; bit < bits; ++bit) {
    uint8_t* masks = out + 256 + (bit - 4) * 64 + row / 2;  // little endian: bit n lies in byte n / 8
    for (int j = 0; j < 8; ++j) {
      masks[8 * j] |= static_cast<uint8_t>(gathered_bits(load_as<uint32_t>(codes + 4 * j), bit) << row % 2 * 4);
    }
  }
}

uint8_t code_at(Format format, const uint8_t* block, int row, int column) {
  const int bits = traits(format).bits;
  const int vector = column / 4;
  const int byte = 4 * row + column % 4;
  if (bits == 8) return block[vector * 64 + byte];
  int code = block[vector % 4 * 64 + byte] >> (vector < 4 ? 0 : 4) & 15;
  for (int bit = 4; bit < bits; ++bit) {
    code |= (block[256 + (bit - 4) * 64 + vector * 8 + byte / 8] >> byte % 8 & 1) << bit;
  }
  return static_cast<uint8_t>(code);
}

void pack_quantised_row(Format format, const uint8_t* source, int64_t columns, int row, uint8_t* group) {
  for (int64_t index = 0; index < columns / kBlockColumns; ++index) {
    const StoredBlock block = stored_block(format, source, index);
    const Places<uint8_t> place = block_place(format, group, index);
    put_codes(format, block.codes, row, place.codes);
    uint8_t* halves = place.super_scales;
    if (halves == nullptr) {
      halves = place.scales;
    } else {
      place.scales[row] = block.s;
      place.scales[kGroupRows + row] = block.t;
    }
    std::memcpy(halves + 2 * row, &block.d, 2);
    const Scaling scaling = traits(format).scaling;
    if (scaling == Scaling::kAffine || scaling == Scaling::kSuperAffine) {
      std::memcpy(halves + 2 * (kGroupRows + row), &block.m, 2);
    }
  }
}

// fp16 d and m of a stored block of Q4_0 (whose m is 0) or Q4_1.
struct StoredScales {
  uint16_t d, m;
};

StoredScales stored_scales(Format format, const uint8_t* source, int64_t index) {
  const uint8_t* block = source + index * traits(format).type_bytes;
  return {load_as<uint16_t>(block), format == Format::kQ4_1 ? load_as<uint16_t>(block + 2) : uint16_t{0}};
}

// A weight's value at code 8.
float middle(Format format, StoredScales scales) {
  return format == Format::kQ4_1 ? half_float(scales.m) + 8.0f * half_float(scales.d) : 0.0f;
}

// The power of two in which a row's scales and middles are counted: none is above 2**14 of them. NaN if one of them is
// not finite.
float row_step(Format format, const uint8_t* source, int64_t columns) {
  uint32_t largest = 0;  // magnitudes compare as their bits do
  for (int64_t index = 0; index < columns / kBlockColumns; ++index) {
    const StoredScales scales = stored_scales(format, source, index);
    for (const float value : {half_float(scales.d), middle(format, scales) / kMiddleSteps}) {
      largest = std::max(largest, float_bits(value) & 0x7fffffffu);
    }
  }
  if (largest >= float_bits(INFINITY)) return NAN;
  int exponent = 0;
  std::frexp(bits_float(largest), &exponent);
  return std::ldexp(1.0f, exponent - 14);
}

void put_word(float value, float step, bool is_first, int row, uint8_t* words) {
  const auto word = static_cast<int16_t>(std::isnan(step) ? 0 : std::lrintf(value / step));
  std::memcpy(words + 4 * row + (is_first ? 2 : 0), &word, sizeof word);
}

// Returns the row's step.
float pack_paired_row(Format format, const uint8_t* source, int64_t columns, int row, uint8_t* group) {
  const float step = row_step(format, source, columns);
  for (int64_t index = 0; index < columns / kBlockColumns; ++index) {
    const Places<uint8_t> place = block_place(format, group, index);
    put_codes(format, stored_block(format, source, index).codes, row, place.codes);
    const StoredScales scales = stored_scales(format, source, index);
    put_word(half_float(scales.d), step, index % 2 == 0, row, place.scales);
    if (format == Format::kQ4_1)
      put_word(middle(format, scales) / kMiddleSteps, step, index % 2 == 0, row, place.scales + 64);
  }
  return step;
}

void keep_stored_scales(const PackedSegment& segment, const uint8_t* source, int64_t columns, int64_t row,
                        std::byte* packed) {
  if (segment.stored_offset == 0) return;
  const int64_t blocks = columns / kBlockColumns;
  auto* stored = reinterpret_cast<StoredScales*>(packed + segment.stored_offset) + row * blocks;
  for (int64_t index = 0; index < blocks; ++index) stored[index] = stored_scales(segment.format, source, index);
}

// Where column `column` of row `row` of a dense group lies, in values.
int64_t dense_index(Format format, int64_t column, int row) {
  if (format == Format::kBF16) return (column / 2 * kGroupRows + row) * 2 + column % 2;
  return column * kGroupRows + row;
}

void pack_dense_row(Format format, const uint8_t* source, int64_t columns, int row, uint8_t* group) {
  const int64_t size = traits(format).bits / 8;
  for (int64_t column = 0; column < columns; ++column) {
    std::memcpy(group + dense_index(format, column, row) * size, source + column * size, size);
  }
}

float dense_value(Format format, const uint8_t* group, int64_t column, int row) {
  const int64_t index = dense_index(format, column, row);
  if (format == Format::kFP32) return load_as<float>(group + index * 4);
  const auto bits = load_as<uint16_t>(group + index * 2);
  return format == Format::kBF16 ? to_float(BFloat16{bits}) : half_float(bits);
}

// Every product and sum is rounded by itself, in the order of inferneo_core/weights/dequant.py.
// stored: the row's scales, of kPairs.
void unpack_quantised_row(Format format, const uint8_t* group, const StoredScales* stored, int64_t columns, int row,
                          float* out) {
  const Scaling scaling = traits(format).scaling;
  const int offset = traits(format).offset_bits == 0 ? 0 : 1 << traits(format).offset_bits;
  for (int64_t index = 0; index < columns / kBlockColumns; ++index) {
    const Places<const uint8_t> place = block_place(format, group, index);
    const uint8_t* halves = place.super_scales == nullptr ? place.scales : place.super_scales;
    StoredScales half{};
    if (scaling == Scaling::kPairs) {
      half = stored[index];
    } else {
      half.d = load_as<uint16_t>(halves + 2 * row);
      if (scaling == Scaling::kAffine || scaling == Scaling::kSuperAffine) {
        half.m = load_as<uint16_t>(halves + 2 * (kGroupRows + row));
      }
    }
    float scales[2] = {half_float(half.d), 0.0f};
    float minimum = half_float(half.m);
    if (scaling == Scaling::kSuperAffine) {
      scales[0] *= static_cast<float>(place.scales[row]);
      minimum *= -static_cast<float>(place.scales[kGroupRows + row]);
    }
    scales[1] = scales[0];
    if (scaling == Scaling::kSuperHalves) {
      scales[0] *= static_cast<float>(static_cast<int8_t>(place.scales[row]));
      scales[1] *= static_cast<float>(static_cast<int8_t>(place.scales[kGroupRows + row]));
    }
    for (int i = 0; i < kBlockColumns; ++i) {
      const auto code = static_cast<float>(code_at(format, place.codes, row, i) - offset);
      const float product = code * scales[i / 16];
      out[index * kBlockColumns + i] = offset == 0 ? product + minimum : product;
    }
  }
}

}  // namespace

PackedLinear plan_linear(const SourceSegment* segments, int64_t num_segments, int64_t in_features, bool has_bias,
                         bool keeps_rows) {
  PackedLinear linear = {};
  linear.keeps_rows = keeps_rows;
  linear.magic = kPackedMagic;
  linear.in_features = in_features;
  linear.num_segments = num_segments;
  linear.num_bytes = round_up(sizeof linear, 64);
  for (int64_t i = 0; i < num_segments; ++i) {
    const SourceSegment& source = segments[i];
    linear.segments[i] = {linear.out_features, source.num_rows, linear.num_bytes, 0, 0, source.format};
    linear.out_features += source.num_rows;
    linear.num_bytes += num_groups(source.num_rows) * group_bytes(source.format, in_features);
    if (is_paired(source.format)) {
      linear.segments[i].steps_offset = linear.num_bytes;
      linear.num_bytes += round_up(num_groups(source.num_rows) * kStepBytes, 64);
      if (keeps_rows) {
        const int64_t blocks = source.num_rows * (in_features / kBlockColumns);
        linear.segments[i].stored_offset = linear.num_bytes;
        linear.num_bytes += round_up(blocks * static_cast<int64_t>(sizeof(StoredScales)), 64);
      }
    }
    linear.has_dense |= is_dense(source.format);
    linear.has_pairs |= is_paired(source.format);
    linear.has_blocks |= !is_dense(source.format) && !is_paired(source.format);
  }
  if (has_bias) {
    linear.bias_offset = linear.num_bytes;
    linear.num_bytes += round_up(linear.out_features * static_cast<int64_t>(sizeof(float)), 64);
  }
  return linear;
}

void pack_groups(const SourceSegment& source, const PackedSegment& segment, int64_t in_features, int64_t begin,
                 int64_t end, std::byte* packed) {
  const int64_t size = group_bytes(segment.format, in_features);
  for (int64_t index = begin; index < end; ++index) {
    auto* group = reinterpret_cast<uint8_t*>(packed + segment.offset + index * size);
    std::memset(group, 0, size);
    if (is_paired(segment.format)) std::memset(packed + segment.steps_offset + index * kStepBytes, 0, kStepBytes);
    for (int row = 0; row < kGroupRows && index * kGroupRows + row < segment.num_rows; ++row) {
      const int64_t i = index * kGroupRows + row;
      const uint8_t* bytes = source.data + (source.row_order == nullptr ? i : source.row_order[i]) * source.row_bytes;
      if (is_dense(segment.format)) {
        pack_dense_row(segment.format, bytes, in_features, row, group);
      } else if (is_paired(segment.format)) {
        const float step = pack_paired_row(segment.format, bytes, in_features, row, group);
        const auto bits = static_cast<uint16_t>(float_bits(step) >> 16);
        std::memcpy(packed + segment.steps_offset + i * sizeof bits, &bits, sizeof bits);
        keep_stored_scales(segment, bytes, in_features, i, packed);
      } else {
        pack_quantised_row(segment.format, bytes, in_features, row, group);
      }
    }
  }
}

void unpack_rows(const PackedLinear& linear, const int64_t* ids, int64_t count, float* out) {
  const int64_t columns = linear.in_features;
  for (int64_t i = 0; i < count; ++i, out += columns) {
    const PackedSegment* segment = linear.segments;
    while (ids[i] >= segment->row_begin + segment->num_rows) ++segment;
    const int64_t index = ids[i] - segment->row_begin;
    const int row = static_cast<int>(index % kGroupRows);
    const auto* group = reinterpret_cast<const uint8_t*>(
        linear.at(segment->offset + index / kGroupRows * group_bytes(segment->format, columns)));
    if (is_dense(segment->format)) {
      for (int64_t column = 0; column < columns; ++column) {
        out[column] = dense_value(segment->format, group, column, row);
      }
    } else {
      const auto* stored = reinterpret_cast<const StoredScales*>(linear.at(segment->stored_offset));
      unpack_quantised_row(segment->format, group, stored + index * (columns / kBlockColumns), columns, row, out);
    }
  }
}

}  // namespace inferneo
