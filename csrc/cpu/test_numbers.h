// What the C++ tests draw and what they print of their results, the same on every machine: the standard library's
// distributions are not.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <random>

namespace inferneo {

// Uniform in [-2, 2), and exact.
inline float draw_number(std::mt19937& random) {
  return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(random()))) * 0x1p-30f;
}

// FNV-1a of the bytes of all results. Source: http://www.isthe.com/chongo/tech/comp/fnv/
class Checksum {
 public:
  template <class T>
  void add(const T* values, int64_t count) {
    const auto* const bytes = reinterpret_cast<const uint8_t*>(values);
    for (size_t i = 0; i < count * sizeof(T); ++i) hash_ = (hash_ ^ bytes[i]) * 0x100000001b3u;
  }
  void print() const { std::printf("%016" PRIx64 "\n", hash_); }

 private:
  uint64_t hash_ = 0xcbf29ce484222325u;
};

}  // namespace inferneo
