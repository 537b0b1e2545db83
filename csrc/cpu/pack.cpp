#include "pack.h"

#include <cstring>

#include "blocks.h"

namespace inferneo {
namespace {

int64_t num_groups(int64_t num_rows) { return (num_rows + kGroupRows - 1) / kGroupRows; }

// Where a block of a group keeps its codes and scales. Byte is uint8_t, or const uint8_t.
template <class Byte>
struct Places {
  Byte* codes;
  Byte* scales;        // kSymmetric, kAffine: 16 fp16 d, then 16 m; the others: 16 bytes s, then 16 t
  Byte* super_scales;  // 16 fp16 d, then 16 dmin; null where there are none
};

template <class Byte>
Places<Byte> block_place(Format format, Byte* group, int64_t index) {
  const int64_t blocks = unit_blocks(format), nth = index % blocks;
  Byte* unit = group + index / blocks * (scale_bytes(format) + blocks * code_bytes(format));
  Byte* codes = unit + scale_bytes(format) + nth * code_bytes(format);
  if (blocks == kSuperBlocks) return {codes, unit + 64 + nth * 32, unit};
  return {codes, unit + nth * 32, nullptr};
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
void unpack_quantised_row(Format format, const uint8_t* group, int64_t columns, int row, float* out) {
  const Scaling scaling = traits(format).scaling;
  const int offset = traits(format).offset_bits == 0 ? 0 : 1 << traits(format).offset_bits;
  for (int64_t index = 0; index < columns / kBlockColumns; ++index) {
    const Places<const uint8_t> place = block_place(format, group, index);
    const uint8_t* halves = place.super_scales == nullptr ? place.scales : place.super_scales;
    float scales[2] = {half_float(load_as<uint16_t>(halves + 2 * row)), 0.0f};
    float minimum = 0.0f;
    if (scaling == Scaling::kAffine || scaling == Scaling::kSuperAffine) {
      minimum = half_float(load_as<uint16_t>(halves + 2 * (kGroupRows + row)));
    }
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

PackedLinear plan_linear(const SourceSegment* segments, int64_t num_segments, int64_t in_features, bool has_bias) {
  PackedLinear linear = {};
  linear.magic = kPackedMagic;
  linear.in_features = in_features;
  linear.num_segments = num_segments;
  linear.num_bytes = round_up(sizeof linear, 64);
  for (int64_t i = 0; i < num_segments; ++i) {
    const SourceSegment& source = segments[i];
    linear.segments[i] = {linear.out_features, source.num_rows, linear.num_bytes, source.format};
    linear.out_features += source.num_rows;
    linear.num_bytes += num_groups(source.num_rows) * group_bytes(source.format, in_features);
    (is_dense(source.format) ? linear.has_dense : linear.has_quantised) = true;
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
    for (int row = 0; row < kGroupRows && index * kGroupRows + row < segment.num_rows; ++row) {
      const int64_t i = index * kGroupRows + row;
      const uint8_t* bytes = source.data + (source.row_order == nullptr ? i : source.row_order[i]) * source.row_bytes;
      const auto pack = is_dense(segment.format) ? pack_dense_row : pack_quantised_row;
      pack(segment.format, bytes, in_features, row, group);
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
      unpack_quantised_row(segment->format, group, columns, row, out);
    }
  }
}

}  // namespace inferneo
