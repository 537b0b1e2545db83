// One stored block of 32 columns of each quantised format, taken apart: the scalar definition of the formats.
#pragma once

#include <cstdint>

#include "formats.h"
#include "half.h"

namespace inferneo {

// weight[i] = see formats.h, by the format's Scaling.
struct StoredBlock {
  uint16_t d, m;  // fp16; m: the minimum, or dmin
  uint8_t s, t;   // small scales of the K formats
  uint8_t codes[kBlockColumns];
};

namespace stored {

INFERNEO_INLINE void nibbles(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = packed[i] & 15;
    codes[16 + i] = packed[i] >> 4;
  }
}

INFERNEO_INLINE void fifth_bits(const uint8_t* packed, uint8_t* codes) {
  const auto bits = load_as<uint32_t>(packed);
  for (int i = 0; i < kBlockColumns; ++i) codes[i] |= (bits >> i & 1) << 4;
}

// The two 6-bit scales of sub-block `part` of Q4_K and Q5_K, from the 12 bytes that hold eight pairs.
INFERNEO_INLINE void six_bit_pair(const uint8_t* packed, int part, StoredBlock& block) {
  if (part < 4) {
    block.s = packed[part] & 63;
    block.t = packed[part + 4] & 63;
  } else {
    block.s = (packed[part + 4] & 15) | (packed[part - 4] >> 6 << 4);
    block.t = (packed[part + 4] >> 4) | (packed[part] >> 6 << 4);
  }
}

INFERNEO_INLINE void nibble_half(const uint8_t* qs, int part, uint8_t* codes) {
  const uint8_t* bytes = qs + part / 2 * 32;  // sub-blocks 2i and 2i + 1 share 32 bytes
  for (int i = 0; i < kBlockColumns; ++i) codes[i] = part % 2 == 0 ? bytes[i] & 15 : bytes[i] >> 4;
}

INFERNEO_INLINE void q6_part(const uint8_t* super, int part, StoredBlock& block) {
  const int half = part / 4;     // of the 256 columns
  const int quarter = part % 4;  // 32 columns of that half
  const uint8_t* low = super + half * 64 + quarter % 2 * 32;
  const uint8_t* high = super + 128 + half * 32;
  for (int i = 0; i < kBlockColumns; ++i) {
    const int nibble = quarter < 2 ? low[i] & 15 : low[i] >> 4;
    block.codes[i] = static_cast<uint8_t>(nibble | (high[i] >> 2 * quarter & 3) << 4);
  }
  block.s = super[192 + part * 2];
  block.t = super[193 + part * 2];
  block.d = load_as<uint16_t>(super + 208);
}

}  // namespace stored

// Block `index` of a row.
inline StoredBlock stored_block(Format format, const uint8_t* row, int64_t index) {
  const FormatTraits& f = traits(format);
  const int parts = f.type_columns / kBlockColumns;
  const uint8_t* bytes = row + index / parts * f.type_bytes;
  const int part = static_cast<int>(index % parts);
  StoredBlock block = {};
  if (format != Format::kQ6_K) block.d = load_as<uint16_t>(bytes);
  switch (format) {
    case Format::kQ4_0:
      stored::nibbles(bytes + 2, block.codes);
      break;
    case Format::kQ4_1:
      block.m = load_as<uint16_t>(bytes + 2);
      stored::nibbles(bytes + 4, block.codes);
      break;
    case Format::kQ5_0:
      stored::nibbles(bytes + 6, block.codes);
      stored::fifth_bits(bytes + 2, block.codes);
      break;
    case Format::kQ5_1:
      block.m = load_as<uint16_t>(bytes + 2);
      stored::nibbles(bytes + 8, block.codes);
      stored::fifth_bits(bytes + 4, block.codes);
      break;
    case Format::kQ8_0:
      for (int i = 0; i < kBlockColumns; ++i) block.codes[i] = bytes[2 + i] ^ 0x80;  // int8 + 128
      break;
    case Format::kQ4_K:
    case Format::kQ5_K:
      block.m = load_as<uint16_t>(bytes + 2);
      stored::six_bit_pair(bytes + 4, part, block);
      stored::nibble_half(bytes + (format == Format::kQ4_K ? 16 : 48), part, block.codes);
      if (format == Format::kQ5_K) {
        for (int i = 0; i < kBlockColumns; ++i) block.codes[i] |= (bytes[16 + i] >> part & 1) << 4;
      }
      break;
    case Format::kQ6_K:
      stored::q6_part(bytes, part, block);
      break;
    default:
      break;  // dense formats have no blocks
  }
  return block;
}

}  // namespace inferneo
