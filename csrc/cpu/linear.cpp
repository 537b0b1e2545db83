#include "linear.h"

#include "linear_task.h"

namespace inferneo {

extern const LinearKernels kScalarLinear;
extern const LinearKernels kAvx2Linear;
extern const LinearKernels kAvx512Linear;

namespace {

int64_t num_quads(int64_t rows) { return (rows + kQuad - 1) / kQuad; }

int64_t quantized_bytes(const PackedLinear& linear, int64_t rows) {
  if (!linear.has_quantised) return 0;
  return num_quads(rows) * (linear.in_features / kBlockColumns) * static_cast<int64_t>(sizeof(QuantizedBlock));
}

// fp32 [quads, columns rounded up to 2, kQuad], what is missing filled with zeros.
void interleave(const float* x, int64_t rows, int64_t columns, float* out, Lane lane) {
  const int64_t padded = round_up(columns, 2);
  const Share quads = share(num_quads(rows), 1, lane);
  for (int64_t quad = quads.begin; quad < quads.end; ++quad) {
    for (int64_t token = 0; token < kQuad; ++token) {
      const int64_t row = quad * kQuad + token;
      float* place = out + quad * padded * kQuad + token;
      for (int64_t k = 0; k < padded; ++k) place[k * kQuad] = row < rows && k < columns ? x[row * columns + k] : 0.0f;
    }
  }
}

}  // namespace

const LinearKernels& linear_kernels(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa >= Isa::kAvx512 && __builtin_cpu_supports("avx512vnni")) return kAvx512Linear;
  if (isa >= Isa::kAvx2 && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return kAvx2Linear;
#endif
  static_cast<void>(isa);
  return kScalarLinear;
}

int64_t prepared_bytes(const PackedLinear& linear, int64_t rows) {
  const int64_t floats = linear.has_dense ? num_quads(rows) * round_up(linear.in_features, 2) * kQuad : 0;
  return quantized_bytes(linear, rows) + floats * static_cast<int64_t>(sizeof(float));
}

void prepare_rows(const LinearKernels& kernels, const PackedLinear& linear, const float* x, int64_t rows, void* out,
                  Lane lane) {
  if (linear.has_quantised) {
    kernels.quantize(x, rows, linear.in_features, static_cast<QuantizedBlock*>(out), lane);
  }
  if (linear.has_dense) {
    auto* floats = reinterpret_cast<float*>(static_cast<std::byte*>(out) + quantized_bytes(linear, rows));
    interleave(x, rows, linear.in_features, floats, lane);
  }
}

void linear_rows(const LinearKernels& kernels, const PackedLinear& linear, const void* prepared, int64_t num_tokens,
                 int64_t row_begin, int64_t row_end, float* out, int64_t stride, const float* residual) {
  for (int64_t i = 0; i < linear.num_segments; ++i) {
    const PackedSegment& segment = linear.segments[i];
    const int64_t first = segment.row_begin;
    RowsTask task = {};
    task.row_begin = row_begin > first ? row_begin - first : 0;
    task.row_end = row_end < first + segment.num_rows ? row_end - first : segment.num_rows;
    if (task.row_begin >= task.row_end) continue;
    task.groups = reinterpret_cast<const uint8_t*>(linear.at(segment.offset));
    task.columns = linear.in_features;
    if (is_dense(segment.format)) {
      const auto* bytes = static_cast<const std::byte*>(prepared) + quantized_bytes(linear, num_tokens);
      task.floats = reinterpret_cast<const float*>(bytes);
    } else {
      task.quantized = static_cast<const QuantizedBlock*>(prepared);
    }
    task.num_tokens = num_tokens;
    task.bias = linear.bias() == nullptr ? nullptr : linear.bias() + first;
    task.residual = residual == nullptr ? nullptr : residual + first;
    task.out = out + first;
    task.stride = stride;
    kernels.rows[static_cast<int>(segment.format)](task);
  }
}

}  // namespace inferneo
