// Runs the products of linear.h without torch, for the sanitizers: tests/ops/test_cpu_linear_native.py builds it with
// ASan and UBSan and runs it once an instruction set, tests/ops/test_cpu_aarch64.py on another processor. Every array
// has exactly the size it is said to have.
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "half.h"
#include "test_numbers.h"

namespace inferneo {
namespace {

using Bytes = std::unique_ptr<std::byte, decltype(&std::free)>;

Bytes aligned_bytes(int64_t size) {
  return {static_cast<std::byte*>(std::aligned_alloc(64, round_up(size, 64))), std::free};
}

void expect(bool condition, const char* what, Format format) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s (%s)\n", what, traits(format).name);
  std::exit(1);
}

// Random codes under scales of some 2**-7; a dense format's values are of that size, too.
std::vector<uint8_t> random_rows(Format format, int64_t num_rows, int64_t row_bytes, std::mt19937& random) {
  const FormatTraits& f = traits(format);
  std::vector<uint8_t> bytes(num_rows * row_bytes);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  const int step = is_dense(format) ? f.bits / 8 : f.type_bytes;
  for (size_t i = 0; i < bytes.size(); i += step) {
    if (format == Format::kFP32 || format == Format::kBF16) {
      bytes[i + step - 1] = 0x3c;  // the sign and most of the exponent
    } else {
      bytes[i + (format == Format::kQ6_K ? 208 : 0) + 1] = 0x20;  // fp16 d
      if (!is_dense(format)) bytes[i + 3] = 0x20;                 // fp16 m or dmin, where there is one
    }
  }
  return bytes;
}

struct Weight {
  std::vector<uint8_t> rows;
  std::vector<int64_t> order;
  Bytes packed;
  const PackedLinear& linear() const { return *reinterpret_cast<const PackedLinear*>(packed.get()); }
};

Weight make_weight(Format format, int64_t num_rows, int64_t columns, std::mt19937& random) {
  const int64_t row_bytes = columns / traits(format).type_columns * traits(format).type_bytes;
  Weight weight{random_rows(format, num_rows, row_bytes, random), std::vector<int64_t>(num_rows), {nullptr, std::free}};
  for (int64_t row = 0; row < num_rows; ++row) weight.order[row] = num_rows - 1 - row;
  const SourceSegment source{weight.rows.data(), num_rows, row_bytes, weight.order.data(), format};
  const PackedLinear plan = plan_linear(&source, 1, columns, true, true);
  weight.packed = aligned_bytes(plan.num_bytes);
  std::memcpy(weight.packed.get(), &plan, sizeof plan);
  const int64_t groups = (num_rows + kGroupRows - 1) / kGroupRows;
  pack_groups(source, plan.segments[0], columns, 0, groups, weight.packed.get());
  auto* bias = reinterpret_cast<float*>(weight.packed.get() + plan.bias_offset);
  for (int64_t row = 0; row < num_rows; ++row) bias[row] = static_cast<float>(row);
  return weight;
}

// The product by `lanes` lanes, one after another; of tokens slab by slab if there is more than one.
std::vector<float> product(const LinearKernels& kernels, const PackedLinear& linear, const std::vector<float>& x,
                           int lanes, const std::vector<float>& residual) {
  const auto num_tokens = static_cast<int64_t>(x.size()) / linear.in_features;
  const Bytes prepared = aligned_bytes(prepared_bytes(linear, num_tokens));
  std::vector<float> out = residual;
  const int64_t slab = lanes == 1 ? num_tokens : lanes * kQuad;
  for (int i = 0; i < lanes; ++i) {
    const Share quads = share(quads_in(num_tokens), 1, {i, lanes});
    const float* first = x.data() + quads.begin * kQuad * linear.in_features;
    prepare_rows(kernels, linear, first, num_tokens, prepared.get(), quads);
  }
  for (int i = 0; i < lanes; ++i) {
    const Share rows = share(linear.out_features, lanes == 3 ? 1 : row_granule, {i, lanes});
    for (int64_t begin = 0; begin < num_tokens; begin += slab) {
      const Share tokens{begin, std::min(begin + slab, num_tokens)};
      linear_rows(kernels, linear, prepared.get(), num_tokens, tokens, rows, out.data(), linear.out_features,
                  out.data());
    }
  }
  return out;
}

void check_format(Format format, int64_t columns, const LinearKernels& kernels, std::mt19937& random,
                  Checksum& checksum) {
  constexpr int64_t kRows = 37;
  const Weight weight = make_weight(format, kRows, columns, random);
  std::vector<float> dense(kRows * columns);
  std::vector<int64_t> ids(kRows);
  for (int64_t row = 0; row < kRows; ++row) ids[row] = row;
  unpack_rows(weight.linear(), ids.data(), kRows, dense.data());
  for (const int64_t num_tokens : {1, 2, 7, 13, 25}) {
    std::vector<float> x(num_tokens * columns), residual(num_tokens * kRows);
    for (float& value : x) value = draw_number(random);
    for (float& value : residual) value = draw_number(random);
    const std::vector<float> y = product(kernels, weight.linear(), x, 1, residual);
    checksum.add(y.data(), y.size());
    for (const int lanes : {2, 3, 5}) {
      expect(y == product(kernels, weight.linear(), x, lanes, residual), "the split changes nothing", format);
    }
    for (int64_t token = 0; token < num_tokens; ++token) {
      for (int64_t row = 0; row < kRows; ++row) {
        double exact = residual[token * kRows + row] + static_cast<double>(row);
        double magnitude = 1e-4;
        for (int64_t k = 0; k < columns; ++k) {
          const double term = static_cast<double>(x[token * columns + k]) * dense[row * columns + k];
          exact += term;
          magnitude += std::abs(term);
        }
        // int8 activations are off by half a step of amax / 127, and amax is some 4 times their mean magnitude.
        expect(std::abs(y[token * kRows + row] - exact) < 0.02 * magnitude, "the product is right", format);
      }
    }
  }
}

int run() {
  std::mt19937 random(1);
  const Isa isa = cpu_isa();
  const LinearKernels& kernels = linear_kernels(isa);
  Checksum checksum;
  for (int i = 0; i < kNumFormats; ++i) {
    const auto format = static_cast<Format>(i);
    check_format(format, is_dense(format) ? 83 : traits(format).type_columns * 3, kernels, random, checksum);
  }
  std::puts(isa_name(isa));
  checksum.print();
  return 0;
}

}  // namespace
}  // namespace inferneo

int main() { return inferneo::run(); }
