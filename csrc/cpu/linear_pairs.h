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

// Four tokens' scales of a block in their units, and the sums of their codes as the kernels take them: 16 bits each.
struct UnitScales {
  QuadInts scale, sum;
};

INFERNEO_INLINE UnitScales in_units(QuadFloats largest, QuadInts sum, QuadFloats per_unit) {
  const QuadInts rounded = reinterpret_cast<QuadInts>(largest * per_unit + kRoundCode);
  const QuadInts scale = (rounded - static_cast<int32_t>(float_bits(kRoundCode))) & 0xffff;
  return {scale, (sum * scale + (1 << 11)) >> 12 & 0xffff};
}

// Blocks of pairs are quantised as all others; their scales are then counted in a unit of the token, which its whole
// row decides. Until then a pair holds what quantising gave: the sums in `start`, the largest of the first block in
// `scale` and of the second in `sum`.
template <class V>
INFERNEO_INLINE void quantize_quad_pairs(const float* x, int64_t columns, int count, PairBlock* pairs, float* units,
                                         int num_units) {
  const int64_t num_pairs = pairs_in(columns), blocks = blocks_in(columns);
  QuadInts most = {};  // by bits
  const auto codes = [=](int64_t b) -> auto& { return pairs[b / 2].codes[b % 2]; };
  const auto put = [=, &most](int64_t b, QuadFloats block_largest, QuadSums sums) {
    PairBlock& pair = pairs[b / 2];
    const QuadInts bits = reinterpret_cast<QuadInts>(block_largest);
    most = bits > most ? bits : most;
    store_as(b % 2 == 0 ? pair.scale : pair.sum, bits);
    store_as(pair.start[b % 2], sums.all);
  };
  quantize_quad<V>(x, columns, count, codes, put);
  if (blocks % 2 != 0) put(blocks, QuadFloats{}, QuadSums{});
  const QuadFloats largest = reinterpret_cast<QuadFloats>(most);
  const QuadFloats per_unit = largest == 0.0f ? QuadFloats{} : 32767.0f / largest;
  // 2**15 of them: scale_words divides by so much.
  const QuadFloats unit = largest * (32768.0f / (127.0f * 32767.0f));
  std::memcpy(units, &unit, num_units * sizeof(float));
  for (PairBlock* pair = pairs; pair < pairs + num_pairs; ++pair) {
    const auto first_sum = load_as<QuadInts>(pair->start[0]), second_sum = load_as<QuadInts>(pair->start[1]);
    const UnitScales first = in_units(load_as<QuadFloats>(pair->scale), first_sum, per_unit);
    const UnitScales second = in_units(load_as<QuadFloats>(pair->sum), second_sum, per_unit);
    store_as(pair->start[0], -8 * first_sum);
    store_as(pair->start[1], -8 * second_sum + (1 << 15));
    store_as(pair->scale, first.scale << 16 | second.scale);
    store_as(pair->sum, first.sum << 16 | second.sum);
  }
}

template <class V>
void quantize_pairs(const float* x, int64_t rows, int64_t columns, PairBlock* out, float* units, Share quads) {
  for_quads(rows, quads, [=](int64_t quad, int count) INFERNEO_INLINE_LAMBDA {
    const float* const first = x + (quad - quads.begin) * kQuad * columns;
    const int num_units = count == 1 && rows == 1 ? 1 : kQuad;  // one row alone has one unit
    quantize_quad_pairs<V>(first, columns, count, out + quad * pairs_in(columns), units + quad * kQuad, num_units);
  });
}
