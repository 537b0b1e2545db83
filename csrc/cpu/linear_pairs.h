// Formats of four bits, two blocks at a time; part of linear_kernels.h.
//
// The dot products of codes leave little to win: what remains is what scales them. In fp32 that takes a block three
// instructions of the multipliers (the product of both scales, two multiply-adds) beside its eight dot products; in
// 16 bits it takes a pair of blocks three:
//
//   block b of a row and a token     sum_b = sum of (code - 8) * activation      |sum_b| <= 8 * 127 * 32 < 2**15
//   the row                          d_b = its scale in steps of the row, m_b = its value at code 8 in 8 steps; |d_b|,
//                                    |m_b| <= 2**14
//   the token                        s_b = its scale in units of the token, at most 2**15 - 1
//                                    x_b = s_b * the sum of its codes / 2**12, rounded; |x_b| < 2**15
//   the pair                         p = sum over both blocks of sum_b * (d_b * s_b / 2**15, rounded) + m_b * x_b
//
// p is an integer below 2**31. The row's result is step * unit * 2**15 times the fp32 sum of all p. All these
// roundings add 0.03% to the variance that int8 activations cause, 1% where one column is 300 times the others.

// Two blocks of V::kRows rows from row `first` of the group on, added to the sums of T tokens.
template <class V, Format F, int T>
INFERNEO_INLINE void add_pair(const uint8_t* unit, bool is_whole, int first, const PairBlock* acts, int64_t quad_step,
                              typename V::Floats (&sum)[T]) {
  constexpr int64_t kAhead = T == 1 ? kPrefetchNear : kPrefetchFar;
  constexpr int64_t kUnitBytes = scale_bytes(F) + 2 * code_bytes(F);
  const uint8_t* codes = unit + scale_bytes(F);
  const auto act = [&](int t) -> const PairBlock& { return acts[t / kQuad * quad_step]; };
  // Both sums in one register: the first moves up 16 bits, the second begins at 2**15, so that it never borrows.
  typename V::Ints sums[T];
  V::prefetch(unit + kAhead, kUnitBytes / 2);
  for (int t = 0; t < T; ++t) sums[t] = V::broadcast(&act(t).start[0][t % kQuad]);
  add_nibbles<V, F>(codes, first, [&](int t) { return act(t).codes[0][t % kQuad]; }, sums, sums);
  for (int t = 0; t < T; ++t) {
    sums[t] = V::add(V::template shift_left<16>(sums[t]), V::broadcast(&act(t).start[1][t % kQuad]));
  }
  V::prefetch(unit + kUnitBytes / 2 + kAhead, kUnitBytes / 2);
  if (is_whole) {
    add_nibbles<V, F>(codes + code_bytes(F), first, [&](int t) { return act(t).codes[1][t % kQuad]; }, sums, sums);
  }
  const auto d = V::load(unit + 4 * first), m = V::load(unit + scale_bytes(F) - 64 + 4 * first);
  for (int t = 0; t < T; ++t) {
    const auto scale = V::scale_words(d, V::broadcast(&act(t).scale[t % kQuad]));
    auto total = V::dot_words(V::flip_low_sign(sums[t]), scale);
    if constexpr (traits(F).offset_bits == 0) {
      total = V::add_dot_words(total, m, V::broadcast(&act(t).sum[t % kQuad]));
    }
    sum[t] = V::add(sum[t], V::to_floats(total));
  }
}

// sum[t] = the products of V::kRows rows, from row `first` of a group, with T tokens.
template <class V, Format F, int T>
INFERNEO_INLINE void paired_tile(const RowsTask& task, int64_t group, int first, int64_t token,
                                 typename V::Floats (&sum)[T]) {
  constexpr int64_t kUnitBytes = scale_bytes(F) + 2 * code_bytes(F);
  const int64_t blocks = blocks_in(task.columns), pairs = pairs_in(task.columns);
  const uint8_t* unit = task.groups + group * group_bytes(F, task.columns);
  const PairBlock* acts = task.pairs + token / kQuad * pairs;
  const uint8_t* steps = task.steps + group * kStepBytes;
  V::prefetch(steps + kPrefetchNear, 1);
  for (int t = 0; t < T; ++t) sum[t] = V::zero();
#pragma GCC unroll 1
  for (int64_t b = 0; b < blocks; b += 2, unit += kUnitBytes, ++acts) {
    add_pair<V, F, T>(unit, b + 1 < blocks, first, acts, pairs, sum);
  }
  const auto step = V::bf16(steps + 2 * first);
  for (int t = 0; t < T; ++t) sum[t] = V::mul(sum[t], V::mul(step, V::broadcast(task.units + token + t)));
}

// As in QuadCodes, of a whole row.
INFERNEO_INLINE float largest_magnitude(const float* x, int64_t columns) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < columns; ++i) {
    const uint32_t bits = float_bits(x[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest < kSmallestLargest ? 0.0f : bits_float(largest);
}

// Blocks of pairs are quantised as all others; their scales are then counted in a unit of the token.
template <class V>
void quantize_pairs(const float* x, int64_t rows, int64_t columns, PairBlock* out, float* units, Lane lane) {
  for_quads(rows, lane, [&](int64_t quad, int64_t row, int count) {
    float per_unit[kQuad] = {};
    for (int t = 0; t < count; ++t) {
      const float largest = largest_magnitude(x + (row + t) * columns, columns);
      per_unit[t] = largest == 0.0f ? 0.0f : 32767.0f / largest;
      units[row + t] = largest * (32768.0f / (127.0f * 32767.0f));  // 2**15 of them: scale_words divides by so much
    }
    for (int t = count; t < kQuad && rows > 1; ++t) units[row + t] = 0.0f;  // one row alone has one unit
    for (int64_t b = 0; b < 2 * pairs_in(columns); ++b) {
      const bool is_first = b % 2 == 0;
      PairBlock& pair = out[quad * pairs_in(columns) + b / 2];
      QuadCodes made = {};
      if (b < blocks_in(columns)) {
        made = quantize_quad<V>(x + row * columns + b * kBlockColumns, columns, count, pair.codes[b % 2]);
      }
      for (int t = 0; t < kQuad; ++t) {
        const uint32_t scale =
            (float_bits(made.largest[t] * per_unit[t] + kRoundCode) - float_bits(kRoundCode)) & 0xffffu;
        const int32_t sum = (made.sum[t] * static_cast<int32_t>(scale) + (1 << 11)) >> 12;
        const uint32_t low_sum = static_cast<uint32_t>(sum) & 0xffffu;
        pair.start[b % 2][t] = -8 * made.sum[t] + (is_first ? 0 : 1 << 15);
        pair.scale[t] = static_cast<int32_t>(is_first ? scale << 16 : static_cast<uint32_t>(pair.scale[t]) | scale);
        pair.sum[t] = static_cast<int32_t>(is_first ? low_sum << 16 : static_cast<uint32_t>(pair.sum[t]) | low_sum);
      }
    }
  });
}
