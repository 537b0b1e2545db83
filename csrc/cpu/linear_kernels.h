// The kernels of linear.h, once for all instruction sets. Each linear_<isa>.cpp includes this file inside the region it
// compiles for its instructions, after defining the vector class V:
//
//   V::kRows                    rows of a group that one vector holds
//   V::kTokens, V::kPairTokens  the most tokens that a tile keeps in registers; multiples of kQuad
//   V::dots_in_words(bits)      how many dots of codes of so many bits are summed in 16 bits; 0: V::dot sums them in 32
//   V::kSignedBytes             dot_bytes takes the codes of 8 bits as signed; otherwise as unsigned
//   V::Floats, V::Ints          kRows floats, kRows int32 (or 4 * kRows code bytes)
//
// Everything is integers, or fp32 sums and fused multiply-adds in one order, so that every V gives the same bits.
#include "linear_task.h"

namespace inferneo {
namespace {

// The loops over 32 columns have no branches, so that they vectorise.
INFERNEO_INLINE int32_t largest_of_block(const float* x) {
  int32_t largest = 0;  // by bits: a NaN is above all
  for (int i = 0; i < kBlockColumns; ++i) {
    const auto bits = static_cast<int32_t>(float_bits(x[i]) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

INFERNEO_INLINE void codes_of_block(const float* x, float inverse, int8_t* codes) {
  for (int i = 0; i < kBlockColumns; ++i) {
    codes[i] = static_cast<int8_t>(float_bits(x[i] * inverse + kRoundCode) - float_bits(kRoundCode));
  }
}

struct QuadScale {
  QuadFloats largest;  // magnitude; NaN if one is, so that it spoils the block visibly; 0 below kSmallestLargest
  QuadFloats inverse;  // of the scale
};

// Of a block of `count` tokens, each `stride` floats behind the one before.
template <class V>
INFERNEO_INLINE QuadScale scale_of_quad(const float* x, int64_t stride, int count) {
  const auto scale = [](QuadInts bits) -> QuadScale {
    const QuadInts largest = bits < kSmallestLargest ? QuadInts{} : bits;
    return {reinterpret_cast<QuadFloats>(largest),
            largest == 0 ? QuadFloats{} : 127.0f / reinterpret_cast<QuadFloats>(largest)};
  };
  if constexpr (requires { &V::largest_of_quad; }) {
    if (count == kQuad) return scale(V::largest_of_quad(x, stride));
  }
  QuadInts bits = {};
  for (int t = 0; t < count; ++t) bits[t] = largest_of_block(x + t * stride);
  return scale(bits);
}

// Other tokens' codes are left as they are: what scales them is 0.
template <class V>
INFERNEO_INLINE QuadSums codes_of_quad(const float* x, int64_t stride, int count, QuadFloats inverse,
                                       int8_t (&codes)[kQuad][kBlockColumns]) {
  if constexpr (requires { &V::codes_of_quad; }) {
    if (count == kQuad) return V::codes_of_quad(x, stride, inverse, codes);
  }
  QuadSums sums = {};
  for (int t = 0; t < count; ++t) {
    codes_of_block(x + t * stride, inverse[t], codes[t]);
    sums.head[t] = V::sum_of_16(codes[t]);
    sums.all[t] = sums.head[t] + V::sum_of_16(codes[t] + 16);
  }
  return sums;
}

// The codes of columns 4 * j to 4 * j + 3 (below 8 bits).
template <class V, Format F>
INFERNEO_INLINE typename V::Ints with_high_bits(typename V::Ints codes, const uint8_t* block_codes, int j, int first) {
  constexpr int kBits = traits(F).bits;
  if constexpr (kBits >= 5)
    codes = V::template add_where<16>(codes, load_as<uint64_t>(block_codes + 256 + 8 * j) >> 4 * first);
  if constexpr (kBits >= 6)
    codes = V::template add_where<32>(codes, load_as<uint64_t>(block_codes + 320 + 8 * j) >> 4 * first);
  return codes;
}

// The codes of a block below 8 bits, times activations: of the first 16 columns to head, of the last 16 to tail; they
// may be the same. x(t): token t's.
template <class V, Format F, int T, class Activations>
INFERNEO_INLINE void add_nibbles(const uint8_t* codes, int first, Activations x, typename V::Ints (&head)[T],
                                 typename V::Ints (&tail)[T]) {
  constexpr int kInWords = V::dots_in_words(traits(F).bits);
  constexpr bool kHalves = traits(F).scaling == Scaling::kSuperHalves;
  typename V::Ints words[kHalves ? 2 : 1][T];  // sums in 16 bits, on their way to head and tail
  INFERNEO_UNROLL
  for (int j = 0; j < 4; ++j) {
    const auto packed = V::load(codes + 4 * first + 64 * j);
    INFERNEO_UNROLL
    for (int half = 0; half < 2; ++half) {
      const auto nibbles = half == 0 ? V::low_nibbles(packed) : V::high_nibbles(packed);
      const auto weights = with_high_bits<V, F>(nibbles, codes, j + 4 * half, first);
      auto& sums = half == 0 ? head : tail;
      for (int t = 0; t < T; ++t) {
        const int8_t* const columns = x(t) + 16 * half + 4 * j;
        if constexpr (kInWords == 0) {
          sums[t] = V::dot(sums[t], weights, columns);
        } else {
          const int nth = kHalves ? j : 2 * j + half;  // of the dots that go to one sum
          auto& word = words[kHalves ? half : 0][t];
          const auto products = V::products_in_words(weights, columns);
          word = nth % kInWords == 0 ? products : V::add_words(word, products);
          if (nth % kInWords == kInWords - 1) sums[t] = V::add(sums[t], V::sum_words(word));
        }
      }
    }
  }
}

// f(a quad, how many tokens it has) for each of these. f is inlined twice, so that a whole quad's count is a constant.
template <class F>
INFERNEO_INLINE void for_quads(int64_t rows, Share quads, F f) {
  const int64_t end = rows / kQuad < quads.end ? rows / kQuad : quads.end;
  for (int64_t quad = quads.begin; quad < end; ++quad) f(quad, kQuad);
  if (quads.begin <= end && end < quads.end) f(end, static_cast<int>(rows - end * kQuad));
}

// The codes of each block of a quad go to codes(block); put(block, the largest magnitudes, the sums of the codes).
template <class V, class Codes, class Put>
INFERNEO_INLINE void quantize_quad(const float* x, int64_t columns, int count, Codes codes, Put put) {
  const int64_t blocks = blocks_in(columns);
  QuadScale next = scale_of_quad<V>(x, columns, count);
  for (int64_t b = 0; b < blocks; ++b) {
    const QuadScale scale = next;  // found a block ahead: the codes wait for its division
    const float* const block = x + b * kBlockColumns;
    next = scale_of_quad<V>(b + 1 < blocks ? block + kBlockColumns : block, columns, count);
    put(b, scale.largest, codes_of_quad<V>(block, columns, count, scale.inverse, codes(b)));
  }
}

template <class V>
void quantize(const float* x, int64_t rows, int64_t columns, QuantizedBlock* out, Share quads) {
  for_quads(rows, quads, [=](int64_t quad, int count) INFERNEO_INLINE_LAMBDA {
    const float* const first = x + (quad - quads.begin) * kQuad * columns;
    QuantizedBlock* const blocks = out + quad * blocks_in(columns);
    const auto codes = [=](int64_t b) -> auto& { return blocks[b].codes; };
    quantize_quad<V>(first, columns, count, codes, [=](int64_t b, QuadFloats largest, QuadSums sums) {
      const QuadFloats scale = largest / 127.0f;
      store_as(blocks[b].scale, scale);
      store_as(blocks[b].sum, scale * __builtin_convertvector(sums.all, QuadFloats));
      store_as(blocks[b].negative_sum, -sums.all);
      store_as(blocks[b].negative_head, -sums.head);
    });
  });
}

#include "linear_pairs.h"

template <class V>
struct Scales {
  typename V::Floats d,
      m;  // m: the minimum (kAffine, kSuperAffine), or the scale of the last 16 columns (kSuperHalves)
};

// Of block `nth` of a unit.
template <class V, Format F>
INFERNEO_INLINE Scales<V> block_scales(const uint8_t* unit, int nth, int first) {
  constexpr Scaling kScaling = traits(F).scaling;
  const auto d = V::halves(unit + (kScaling == Scaling::kSymmetric ? 32 * nth : 0) + 2 * first);
  const uint8_t* small = unit + 64 + 32 * nth + first;
  if constexpr (kScaling == Scaling::kSymmetric) {
    return {d, d};
  } else if constexpr (kScaling == Scaling::kAffine) {
    return {d, V::halves(unit + 32 + 2 * first)};
  } else if constexpr (kScaling == Scaling::kSuperAffine) {
    const auto minimum = V::mul(V::halves(unit + 32 + 2 * first), V::unsigned_bytes(small + 16));
    return {V::mul(d, V::unsigned_bytes(small)), V::sub(V::zero(), minimum)};
  } else {
    return {V::mul(d, V::signed_bytes(small)), V::mul(d, V::signed_bytes(small + 16))};
  }
}

// Block `nth` of a unit, V::kRows rows from row `first` on, added to the sums of T tokens.
template <class V, Format F, int T>
INFERNEO_INLINE void add_block(const uint8_t* unit, int nth, int first, const QuantizedBlock* acts, int64_t quad_step,
                               typename V::Floats (&sum)[T]) {
  constexpr FormatTraits f = traits(F);
  constexpr bool kHalves = f.scaling == Scaling::kSuperHalves;
  constexpr bool kMinimum = f.scaling == Scaling::kAffine || f.scaling == Scaling::kSuperAffine;
  constexpr int kOffsetBits = f.bits == 8 && V::kSignedBytes ? 0 : f.offset_bits;
  const auto act = [&](int t) -> const QuantizedBlock& { return acts[t / kQuad * quad_step]; };
  typename V::Ints head[T];
  typename V::Ints tail[kHalves ? T : 1];
  for (int t = 0; t < T; ++t) {
    if constexpr (kOffsetBits == 0) {
      head[t] = V::zero_ints();
    } else {
      const auto total = V::broadcast(&act(t).negative_sum[t % kQuad]);
      if constexpr (kHalves) {
        const auto part = V::broadcast(&act(t).negative_head[t % kQuad]);
        head[t] = V::template shift_left<kOffsetBits>(part);
        tail[t] = V::template shift_left<kOffsetBits>(V::sub(total, part));
      } else {
        head[t] = V::template shift_left<kOffsetBits>(total);
      }
    }
  }
  const uint8_t* codes = unit + scale_bytes(F) + nth * code_bytes(F);
  if constexpr (f.bits == 8) {
    INFERNEO_UNROLL
    for (int j = 0; j < 8; ++j) {
      const auto vector = V::load(codes + 4 * first + 64 * j);
      // One token waits for memory: it is read in order, else GCC takes a later line first, and the output head a tenth
      // longer.
      if constexpr (T == 1) asm volatile("" ::: "memory");
      for (int t = 0; t < T; ++t) head[t] = V::dot_bytes(head[t], vector, &act(t).codes[t % kQuad][4 * j]);
    }
  } else {
    const auto x = [&](int t) { return act(t).codes[t % kQuad]; };
    if constexpr (kHalves) {
      add_nibbles<V, F>(codes, first, x, head, tail);
    } else {
      add_nibbles<V, F>(codes, first, x, head, head);
    }
  }
  const Scales<V> scales = block_scales<V, F>(unit, nth, first);
  for (int t = 0; t < T; ++t) {
    const auto scale = V::broadcast(&act(t).scale[t % kQuad]);
    sum[t] = V::fma(V::to_floats(head[t]), V::mul(scales.d, scale), sum[t]);
    if constexpr (kMinimum) sum[t] = V::fma(scales.m, V::broadcast(&act(t).sum[t % kQuad]), sum[t]);
    if constexpr (kHalves) sum[t] = V::fma(V::to_floats(tail[t]), V::mul(scales.m, scale), sum[t]);
  }
}

// sum[t] = the products of V::kRows rows, from row `first` of the group, with T tokens.
template <class V, Format F, int T>
INFERNEO_INLINE void quantised_tile(const uint8_t* unit, int64_t columns, int first, const QuantizedBlock* quads,
                                    typename V::Floats (&sum)[T]) {
  constexpr int kBlocks = unit_blocks(F);
  constexpr int64_t kAhead = T == 1 ? kPrefetchNear : kPrefetchFar;
  const int64_t blocks = columns / kBlockColumns;
  for (int t = 0; t < T; ++t) sum[t] = V::zero();
  for (int64_t b = 0; b < blocks; unit += scale_bytes(F) + kBlocks * code_bytes(F)) {
    V::prefetch(unit + kAhead, scale_bytes(F));
#pragma GCC unroll 1
    for (int nth = 0; nth < kBlocks && b < blocks; ++nth, ++b) {
      V::prefetch(unit + scale_bytes(F) + nth * code_bytes(F) + kAhead, code_bytes(F));
      add_block<V, F, T>(unit, nth, first, quads + b, blocks, sum);
    }
  }
}

// The same for dense formats: even columns and odd ones are summed apart, each in ascending order.
template <class V, Format F, int T>
INFERNEO_INLINE void dense_tile(const uint8_t* pair, int64_t columns, int first, const float* quads,
                                typename V::Floats (&sum)[T]) {
  constexpr int64_t kPairBytes = 2 * kGroupRows * (traits(F).bits / 8);
  constexpr int64_t kAhead = T == 1 ? kPrefetchNear : kPrefetchFar;
  const int64_t padded = round_up(columns, 2);
  typename V::Floats odd[T];
  for (int t = 0; t < T; ++t) sum[t] = odd[t] = V::zero();
  for (int64_t k = 0; k < padded; k += 2, pair += kPairBytes) {
    V::prefetch(pair + kAhead, kPairBytes);
    typename V::Floats even_weights, odd_weights;
    if constexpr (F == Format::kFP32) {
      even_weights = V::load_floats(pair + 4 * first);
      odd_weights = V::load_floats(pair + 64 + 4 * first);
    } else if constexpr (F == Format::kFP16) {
      even_weights = V::halves(pair + 2 * first);
      odd_weights = V::halves(pair + 32 + 2 * first);
    } else {
      const auto both = V::load(pair + 4 * first);
      even_weights = V::low_bf16(both);
      odd_weights = V::high_bf16(both);
    }
    for (int t = 0; t < T; ++t) {
      const float* x = quads + (t / kQuad * padded + k) * kQuad + t % kQuad;
      sum[t] = V::fma(even_weights, V::broadcast(x), sum[t]);
      odd[t] = V::fma(odd_weights, V::broadcast(x + kQuad), odd[t]);
    }
  }
  for (int t = 0; t < T; ++t) sum[t] = V::add(sum[t], odd[t]);
}

// Writes the sums of V::kRows rows from `row` on, of the T tokens from `token` on.
template <class V, int T>
INFERNEO_INLINE void put_tile(const RowsTask& task, int64_t token, int64_t row, typename V::Floats (&sum)[T]) {
  if (row < task.row_begin || row + V::kRows > task.row_end || token + T > task.num_tokens) {
    float values[T][V::kRows];
    INFERNEO_UNROLL
    for (int t = 0; t < T; ++t) V::store(values[t], sum[t]);
    return put_edge(task, token, T, row, V::kRows, values[0]);
  }
  const int64_t stride = task.stride, place = token * stride + row;
  if (task.bias != nullptr) {
    const auto bias = V::load_floats(task.bias + row);
    INFERNEO_UNROLL
    for (int t = 0; t < T; ++t) sum[t] = V::add(sum[t], bias);
  }
  if (task.residual != nullptr) {
    const float* const residual = task.residual + place;
    INFERNEO_UNROLL
    for (int t = 0; t < T; ++t) sum[t] = V::add(V::load_floats(residual + t * stride), sum[t]);
  }
  float* const out = task.out + place;
  INFERNEO_UNROLL
  for (int t = 0; t < T; ++t) V::store(out + t * stride, sum[t]);
}

template <class V, Format F, int T>
INFERNEO_INLINE void tile(const RowsTask& task, int64_t group, int first, int64_t token) {
  typename V::Floats sum[T];
  const uint8_t* bytes = task.groups + group * group_bytes(F, task.columns);
  if constexpr (is_dense(F)) {
    dense_tile<V, F, T>(bytes, task.columns, first, task.floats + token * round_up(task.columns, 2), sum);
  } else if constexpr (is_paired(F)) {
    paired_tile<V, F, T>(task, group, first, token, sum);
  } else {
    quantised_tile<V, F, T>(bytes, task.columns, first, task.quantized + token / kQuad * blocks_in(task.columns), sum);
  }
  put_tile<V>(task, token, group * kGroupRows + first, sum);
}

template <class V, Format F>
void rows(const RowsTask& task) {
  constexpr int kTokens = is_paired(F) ? V::kPairTokens : V::kTokens;
  for (int64_t group = task.row_begin / kGroupRows; group * kGroupRows < task.row_end; ++group) {
    for (int first = 0; first < kGroupRows; first += V::kRows) {
      if (task.num_tokens == 1) {
        tile<V, F, 1>(task, group, first, 0);
        continue;
      }
      for (int64_t token = 0; token < task.num_tokens;) {
        const int count = next_tile(task.num_tokens - token, kTokens);
        if constexpr (kTokens >= 12) {
          if (count == 12) tile<V, F, 12>(task, group, first, token);
        }
        if constexpr (kTokens >= 8) {
          if (count == 8) tile<V, F, 8>(task, group, first, token);
        }
        if (count == 4) tile<V, F, 4>(task, group, first, token);
        token += count;
      }
    }
  }
}

template <class V>
constexpr LinearKernels kLinearKernels = {
    quantize<V>,
    quantize_pairs<V>,
    {rows<V, Format::kQ4_0>, rows<V, Format::kQ4_1>, rows<V, Format::kQ5_0>, rows<V, Format::kQ5_1>,
     rows<V, Format::kQ8_0>, rows<V, Format::kQ4_K>, rows<V, Format::kQ5_K>, rows<V, Format::kQ6_K>,
     rows<V, Format::kBF16>, rows<V, Format::kFP16>, rows<V, Format::kFP32>}};

}  // namespace
}  // namespace inferneo
