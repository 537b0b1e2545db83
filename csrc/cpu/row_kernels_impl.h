// The kernels of row_kernels.h over the vectors of simd.h. Included as simd.h is.

#include "attention_impl.h"

void rms_norm(const float* x, const float* weight, float eps, int64_t count, float* out) {
  Vec sums[4][kSumVecs] = {};
  int64_t i = 0;
  for (; i + 4 * kSumLanes <= count; i += 4 * kSumLanes) {
#pragma GCC unroll 16
    for (int64_t j = 0; j < 4 * kSumVecs; ++j) {
      const Vec v = load(x + i + j * kLanes);
      Vec& sum = sums[j / kSumVecs][j % kSumVecs];
      sum = fma(v, v, sum);
    }
  }
  Vec total[kSumVecs];
  for (int64_t j = 0; j < kSumVecs; ++j) total[j] = (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);
  float rest = 0.0f;
  for (; i < count; ++i) rest += x[i] * x[i];
  const float squares = sum_lanes(total) + rest;
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(count) + eps);
  for (i = 0; i < count; ++i) out[i] = x[i] * factor * weight[i];
}

void rotate(float* head, const float* cos_sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  const auto turn = [&](auto& first, auto& second, auto cosine, auto sine) {
    const auto turned = first * cosine - second * sine;
    second = second * cosine + first * sine;
    first = turned;
  };
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    Vec first = load(head + i), second = load(head + half + i);
    turn(first, second, load(cos_sin + i), load(cos_sin + half + i));
    store(head + i, first);
    store(head + half + i, second);
  }
  for (; i < half; ++i) turn(head[i], head[half + i], cos_sin[i], cos_sin[half + i]);
}

INFERNEO_INLINE void silu_mul_lanes(float* gate, const float* up) {
  const Vec x = load(gate);
  const Vec e = exp2_fused<false>(larger(x, splat(-87.0f)) * -kLog2E);  // below, exp(-x) would overflow
  store(gate, x / (1.0f + e) * load(up));
}

void silu_mul(float* gate, const float* up, int64_t count) {
  int64_t i = 0;
#pragma GCC unroll 4  // a prompt of 512 comes in rows of 64
  for (; i + kLanes <= count; i += kLanes) silu_mul_lanes(gate + i, up + i);
  if (i == count) return;
  float gates[kLanes] = {}, ups[kLanes] = {};
  std::memcpy(gates, gate + i, (count - i) * sizeof(float));
  std::memcpy(ups, up + i, (count - i) * sizeof(float));
  silu_mul_lanes(gates, ups);
  std::memcpy(gate + i, gates, (count - i) * sizeof(float));
}

template <class T>
void store_row(const float* x, int64_t count, void* out) {
  T* const row = static_cast<T*>(out);
  for (int64_t i = 0; i < count; ++i) from_float(x[i], row[i]);
}

// The largest magnitude becomes +-127. A row that is not finite gets a scale that is not, and so stays visible.
template <>
void store_row<Code>(const float* x, int64_t count, void* out) {
  uint32_t most = 0;  // magnitudes compare as their bits do, NaN above all
  for (int64_t i = 0; i < count; ++i) most = std::max(most, float_bits(x[i]) & 0x7fffffffu);
  const float scale = bits_float(most) / 127.0f;
  const bool is_usable = scale > 0.0f && scale < INFINITY;
  Code* const row = static_cast<Code*>(out);
  for (int64_t i = 0; i < count; ++i) {
    const float code = std::clamp(x[i] / scale, -127.0f, 127.0f);  // beyond 127 only where the scale is subnormal
    row[i].value = static_cast<int8_t>(is_usable ? (code + kRoundToInt) - kRoundToInt : 0.0f);
  }
  std::memcpy(row + count, &scale, sizeof scale);
}

constexpr RowKernels kRowKernels{
    {attend<float>, attend<BFloat16>, attend<Half>, attend<Code>},
    merge,
    scale,
    rms_norm,
    rotate,
    silu_mul,
    {store_row<float>, store_row<BFloat16>, store_row<Half>, store_row<Code>},
};
