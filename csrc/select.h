// Selection without sorting: radix descent over the 64-bit keys of a total order. O(count) for any input, exact at
// ties.
#pragma once

#include <cstdint>
#include <utility>

namespace inferneo {

// The last key of the shortest descending prefix whose mass is at least `target` (>= 1), or 0 if all of it is not
// enough. Keys are distinct. masses may be null: each key then weighs 1. Both arrays are permuted alike.
inline uint64_t prefix_cut(uint64_t* keys, int64_t* masses, int64_t count, int64_t target) {
  int64_t above = 0;  // mass of the keys known to lie above the active ones, which fill [0, count)
  while (count > 1) {
    uint64_t differing = 0;
    for (int64_t i = 1; i < count; ++i) differing |= keys[i] ^ keys[0];
    const int top_bit = 63 - __builtin_clzll(differing);
    const int shift = top_bit > 7 ? top_bit - 7 : 0;

    int64_t histogram[256] = {};
    for (int64_t i = 0; i < count; ++i) histogram[keys[i] >> shift & 255] += masses != nullptr ? masses[i] : 1;
    int digit = 255;
    while (digit >= 0 && above + histogram[digit] < target) above += histogram[digit--];
    if (digit < 0) return 0;

    int64_t active = 0;
    for (int64_t i = 0; i < count; ++i) {
      if ((keys[i] >> shift & 255) != static_cast<uint64_t>(digit)) continue;
      std::swap(keys[i], keys[active]);
      if (masses != nullptr) std::swap(masses[i], masses[active]);
      ++active;
    }
    count = active;
  }
  const int64_t mass = count == 0 ? 0 : masses != nullptr ? masses[0] : 1;
  return above + mass < target ? 0 : keys[0];
}

// Moves the keys that are at least `cut` to the front, masses with them; returns how many there are.
inline int64_t keep_prefix(uint64_t* keys, int64_t* masses, int64_t count, uint64_t cut) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    keys[kept] = keys[i];
    if (masses != nullptr) masses[kept] = masses[i];
    kept += keys[i] >= cut;
  }
  return kept;
}

}  // namespace inferneo
