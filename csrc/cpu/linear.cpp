#include "linear.h"

#include <algorithm>

#include "linear_task.h"

namespace inferneo {

extern const LinearKernels kScalarLinear;
extern const LinearKernels kNeonLinear;
extern const LinearKernels kAvx2Linear;
extern const LinearKernels kAvx512Linear;

namespace {

// Where the forms of the activations lie, one behind the other; those that no segment reads take nothing.
struct Forms {
  int64_t pairs, units, floats, end;  // QuantizedBlocks come first
};

Forms forms(const PackedLinear& linear, int64_t rows) {
  const int64_t quads = quads_in(rows), columns = linear.in_features;
  Forms at{};
  if (linear.has_blocks) at.pairs = quads * blocks_in(columns) * int64_t{sizeof(QuantizedBlock)};
  at.units = at.floats = at.pairs;
  if (linear.has_pairs) {
    at.units += quads * pairs_in(columns) * int64_t{sizeof(PairBlock)};
    at.floats = round_up(at.units + quads * kQuad * int64_t{sizeof(float)}, 64);
  }
  at.end = at.floats;
  if (linear.has_dense) at.end += quads * round_up(columns, 2) * kQuad * int64_t{sizeof(float)};
  return at;
}

template <class T>
T* place(void* prepared, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<std::byte*>(prepared) + offset);
}

template <class T>
const T* place(const void* prepared, int64_t offset) {
  return reinterpret_cast<const T*>(static_cast<const std::byte*>(prepared) + offset);
}

// fp32 [quads, columns rounded up to 2, kQuad], what is missing filled with zeros.
void interleave(const float* x, int64_t rows, int64_t columns, float* out, Share quads) {
  const int64_t padded = round_up(columns, 2);
  for (int64_t quad = quads.begin; quad < quads.end; ++quad) {
    for (int64_t token = 0; token < kQuad; ++token) {
      const int64_t known = quad * kQuad + token < rows ? columns : 0, row = (quad - quads.begin) * kQuad + token;
      float* place = out + quad * padded * kQuad + token;
      for (int64_t k = 0; k < padded; ++k) place[k * kQuad] = k < known ? x[row * columns + k] : 0.0f;
    }
  }
}

}  // namespace

const LinearKernels& linear_kernels(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa >= Isa::kAvx512 && __builtin_cpu_supports("avx512vnni")) return kAvx512Linear;
  if (isa >= Isa::kAvx2 && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return kAvx2Linear;
#elif defined(__aarch64__)
  if (isa == Isa::kNeon) return kNeonLinear;
#endif
  static_cast<void>(isa);
  return kScalarLinear;
}

int64_t prepared_bytes(const PackedLinear& linear, int64_t rows) { return forms(linear, rows).end; }

void prepare_rows(const LinearKernels& kernels, const PackedLinear& linear, const float* x, int64_t rows, void* out,
                  Share quads) {
  const Forms at = forms(linear, rows);
  const int64_t columns = linear.in_features;
  if (linear.has_blocks) kernels.quantize(x, rows, columns, place<QuantizedBlock>(out, 0), quads);
  if (linear.has_pairs) {
    kernels.quantize_pairs(x, rows, columns, place<PairBlock>(out, at.pairs), place<float>(out, at.units), quads);
  }
  if (linear.has_dense) interleave(x, rows, columns, place<float>(out, at.floats), quads);
}

int64_t slab_tokens(const PackedLinear& linear) {
  constexpr int64_t kSlabBytes = int64_t{384} << 10;  // they share a 1 MiB L2 with the weights
  constexpr int64_t kWholeTiles = 24;
  return std::max(kSlabBytes * kQuad / forms(linear, kQuad).end / kWholeTiles, int64_t{1}) * kWholeTiles;
}

void linear_rows(const LinearKernels& kernels, const PackedLinear& linear, const void* prepared, int64_t num_tokens,
                 Share tokens, Share rows, float* out, int64_t stride, const float* residual) {
  const Forms at = forms(linear, num_tokens);
  const int64_t quad = tokens.begin / kQuad;
  for (int64_t i = 0; i < linear.num_segments; ++i) {
    const PackedSegment& segment = linear.segments[i];
    const int64_t first = segment.row_begin;
    RowsTask task = {};
    task.row_begin = std::max(rows.begin - first, int64_t{0});
    task.row_end = std::min(rows.end - first, segment.num_rows);
    if (task.row_begin >= task.row_end) continue;
    task.groups = reinterpret_cast<const uint8_t*>(linear.at(segment.offset));
    task.columns = linear.in_features;
    if (is_dense(segment.format)) {
      task.floats = place<float>(prepared, at.floats) + quad * round_up(linear.in_features, 2) * kQuad;
    } else if (is_paired(segment.format)) {
      task.steps = reinterpret_cast<const uint8_t*>(linear.at(segment.steps_offset));
      task.pairs = place<PairBlock>(prepared, at.pairs) + quad * pairs_in(linear.in_features);
      task.units = place<float>(prepared, at.units) + tokens.begin;
    } else {
      task.quantized = place<QuantizedBlock>(prepared, 0) + quad * blocks_in(linear.in_features);
    }
    task.num_tokens = tokens.end - tokens.begin;
    task.bias = linear.bias() == nullptr ? nullptr : linear.bias() + first;
    const int64_t place_of_first = tokens.begin * stride + first;
    task.residual = residual == nullptr ? nullptr : residual + place_of_first;
    task.out = out + place_of_first;
    task.stride = stride;
    kernels.rows[static_cast<int>(segment.format)](task);
  }
}

}  // namespace inferneo
