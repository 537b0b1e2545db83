#include "nodes.h"

#include <algorithm>

namespace inferneo {
namespace {

constexpr int64_t kFloat = sizeof(float);
// The activations of so few are prepared by every lane for itself, which costs less than a barrier and reading what
// another core wrote.
constexpr int64_t kOwnTokens = 16;

float* floats(std::byte* bytes) { return reinterpret_cast<float*>(bytes); }

}  // namespace

void EmbedNode::run(const Frame& frame, int64_t, Lane lane) const {
  const Share tokens = share(frame.step.num_tokens, 1, lane);
  if (tokens.begin == tokens.end) return;
  float* const out = frame.values[output] + tokens.begin * weight_.in_features;
  unpack_rows(weight_, frame.step.token_ids + tokens.begin, tokens.end - tokens.begin, out);
}

ProductNode::ProductNode(const PackedLinear& weight, const float* norm_weight, float eps)
    : weight_(weight),
      in_features_(weight.in_features),
      out_features_(weight.out_features),
      slab_(slab_tokens(weight)),
      norm_weight_(norm_weight),
      eps_(eps),
      normed_bytes_(norm_weight == nullptr ? 0 : round_up(kQuad * weight.in_features * kFloat, 64)),
      quad_bytes_(round_up(prepared_bytes(weight, kQuad), 64)) {}

int64_t ProductNode::shared_bytes(const StepInput& step) const {
  return num_rows(step) > kOwnTokens ? quads_in(num_rows(step)) * quad_bytes_ : 0;
}

// A lane norms one quad after the other, where it quantises it.
int64_t ProductNode::lane_bytes(const StepInput& step) const {
  return normed_bytes_ + (num_rows(step) > kOwnTokens ? 0 : quads_in(num_rows(step)) * quad_bytes_);
}

const void* ProductNode::prepare(const Frame& frame, const float* x, const int64_t* rows, Lane lane) const {
  const int64_t num_quads = quads_in(num_rows(frame.step));
  std::byte* const scratch = frame.scratch(lane);
  const bool is_shared = num_rows(frame.step) > kOwnTokens;
  std::byte* const out = is_shared ? frame.shared : scratch + normed_bytes_;
  const auto prepare_quads = [&](Share quads) {
    for (int64_t quad = quads.begin; quad < quads.end; ++quad) prepare_quad(frame, x, rows, scratch, out, quad);
  };
  if (is_shared) {
    frame.team.share_out(num_quads, lane, prepare_quads);
    frame.team.barrier(lane);
  } else {
    prepare_quads({0, num_quads});
  }
  return out;
}

void ProductNode::prepare_quad(const Frame& frame, const float* x, const int64_t* rows, std::byte* scratch,
                               std::byte* out, int64_t quad) const {
  const int64_t count = num_rows(frame.step), width = in_features_;
  const int64_t first = quad * kQuad, end = std::min(first + kQuad, count);
  const float* source = x + first * width;
  if (norm_weight_ != nullptr) {
    float* const normed = floats(scratch);
    for (int64_t i = first; i < end; ++i) {
      const float* row = x + (rows == nullptr ? i : rows[i]) * width;
      frame.rows.rms_norm(row, norm_weight_, eps_, width, normed + (i - first) * width);
    }
    source = normed;
  }
  prepare_rows(frame.linear, weight_, source, count, out, {quad, quad + 1});
}

void ProductNode::multiply(const Frame& frame, const void* prepared, Share tokens, Share rows, float* out,
                           int64_t stride, const float* residual) const {
  if (rows.begin < rows.end) {
    linear_rows(frame.linear, weight_, prepared, num_rows(frame.step), tokens, rows, out, stride, residual);
  }
}

int64_t ProductNode::shortest_piece(int64_t num_tokens) const {
  constexpr int64_t kProducts = 1 << 17;  // 0.7 us, for few tokens: no lane waits long for another's last piece
  return kProducts / (in_features_ * std::min(num_tokens, slab_)) + 1;
}

int64_t ProductNode::longest_piece(int64_t num_tokens) const {
  constexpr int64_t kResults = 1 << 15;  // 128 KiB, an eighth of an L2: what follows a piece finds them there
  return std::max(shortest_piece(num_tokens), kResults / std::min(num_tokens, slab_));
}

template <class F>
void ProductNode::share_product(const Frame& frame, Lane lane, int64_t rows, int64_t granule, F f) const {
  const int64_t tokens = num_rows(frame.step);
  if (tokens == 1) {  // bound by memory, which is read best from end to end
    const Share mine = share(rows, granule, lane);
    if (mine.begin < mine.end) f(Share{0, 1}, mine);
    return;
  }
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t each = ceil_div(rows, lane.count), cuts = ceil_div(each, shortest_piece(tokens));
  const int64_t at_once = std::min(round_up(ceil_div(each, cuts), granule), rows), num_pieces = ceil_div(rows, at_once);
  const int64_t most_pieces = std::max(longest_piece(tokens) / at_once, int64_t{1});
  frame.team.share_out(ceil_div(tokens, slab_) * num_pieces, lane, [&](Share pieces) {
    while (pieces.begin < pieces.end) {
      const int64_t token = pieces.begin / num_pieces * slab_, first = pieces.begin % num_pieces;
      const int64_t count = std::min({pieces.end - pieces.begin, num_pieces - first, most_pieces});
      f(Share{token, std::min(token + slab_, tokens)},
        Share{first * at_once, std::min((first + count) * at_once, rows)});
      pieces.begin += count;
    }
  });
}

// Behind what prepare needs: the keys and values of all tokens, [num_tokens, 2 * num_kv_heads * head_dim].
int64_t QkvRopeStoreNode::shared_bytes(const StepInput& step) const {
  const int64_t kv_width = 2 * cache_.num_kv_heads * cache_.head_dim;
  return ProductNode::shared_bytes(step) + step.num_tokens * kv_width * kFloat;
}

void QkvRopeStoreNode::run(const Frame& frame, int64_t, Lane lane) const {
  constexpr int64_t kManyTokens = 16, kTokensAtOnce = 4;
  const int64_t num_tokens = frame.step.num_tokens, num_rows = out_features_;
  const int64_t q_width = num_heads() * cache_.head_dim, kv_width = num_rows - q_width;
  const void* prepared = prepare(frame, frame.values[inputs[0]], nullptr, lane);
  // A lane makes whole heads and rotates them itself. Where heads do not divide evenly (15 by 2 lanes), many tokens are
  // worth a barrier more: the products are split by rows, what follows them by tokens.
  const bool is_split = num_tokens >= kManyTokens;
  float* const q = frame.values[output];
  float* const kv = floats(frame.shared + ProductNode::shared_bytes(frame.step)) - q_width;  // as if a row began with Q
  share_product(frame, lane, num_rows, is_split ? row_granule : cache_.head_dim, [&](Share tokens, Share rows) {
    multiply(frame, prepared, tokens, {rows.begin, std::min(rows.end, q_width)}, q, q_width);
    multiply(frame, prepared, tokens, {std::max(rows.begin, q_width), rows.end}, kv, kv_width);
    if (!is_split) rotate_and_store(frame, q, kv, tokens, rows);
  });
  if (!is_split) return;
  frame.team.barrier(lane);
  frame.team.share_out((num_tokens + kTokensAtOnce - 1) / kTokensAtOnce, lane, [&](Share items) {
    const Share tokens{items.begin * kTokensAtOnce, std::min(items.end * kTokensAtOnce, num_tokens)};
    rotate_and_store(frame, q, kv, tokens, {0, num_rows});
  });
}

// Rotates these rows of Q and K, whole heads, and brings those of K and V into the cache.
void QkvRopeStoreNode::rotate_and_store(const Frame& frame, float* q, float* kv, Share tokens, Share rows) const {
  const int64_t head_dim = cache_.head_dim, k_width = cache_.num_kv_heads * head_dim;
  const int64_t q_width = num_heads() * head_dim, v_begin = q_width + k_width;
  const auto store_row = frame.rows.store[static_cast<int>(cache_.type)];
  for (int64_t token = tokens.begin; token < tokens.end; ++token) {
    const float* cos_sin = rope_ + frame.step.positions[token] * head_dim;
    const int64_t block = frame.step.slot_mapping[token] / cache_.block_size;
    const int64_t place = frame.step.slot_mapping[token] % cache_.block_size;
    for (int64_t row = rows.begin; row < rows.end; row += head_dim) {
      const bool is_query = row < q_width, is_key = !is_query && row < v_begin;
      float* const head = is_query ? q + token * q_width + row : kv + token * 2 * k_width + row;
      if (is_query || is_key) frame.rows.rotate(head, cos_sin, head_dim);
      if (is_query) continue;
      const int64_t kv_head = (row - (is_key ? q_width : v_begin)) / head_dim;
      store_row(head, head_dim, (is_key ? cache_.k : cache_.v) + cache_.offset(block, kv_head, place));
    }
  }
}

int64_t AttentionNode::shared_bytes(const StepInput& step) const {
  return part_floats(step.sequences, num_heads_, cache_.num_kv_heads, cache_.head_dim) * kFloat;
}

int64_t AttentionNode::lane_bytes(const StepInput&) const { return attend_scratch(cache_) * kFloat; }

void AttentionNode::run(const Frame& frame, int64_t index, Lane lane) const {
  const AttentionTask task{frame.rows, frame.values[inputs[0]], frame.values[output], num_heads_,
                           cache_,     frame.step.sequences,    floats(frame.shared), frame.tickets[index]};
  attend_items(task, floats(frame.scratch(lane)));
  if (part_floats(task.sequences, num_heads_, cache_.num_kv_heads, cache_.head_dim) == 0) return;
  frame.team.barrier(lane);
  merge_parts(task, lane);
}

void LinearAddNode::run(const Frame& frame, int64_t, Lane lane) const {
  const void* prepared = prepare(frame, frame.values[inputs[0]], nullptr, lane);
  const float* residual = inputs.size() > 1 ? frame.values[inputs[1]] : nullptr;
  const int64_t num_rows = out_features_;
  share_product(frame, lane, num_rows, row_granule, [&](Share tokens, Share rows) {
    multiply(frame, prepared, tokens, rows, frame.values[output], num_rows, residual);
  });
}

// Behind what prepare needs: a piece's products with rows of up.
int64_t GateUpSiluNode::lane_bytes(const StepInput& step) const {
  const int64_t width = out_features_ / 2, num_tokens = std::min(step.num_tokens, slab_);
  const int64_t rows = step.num_tokens == 1 ? width : round_up(longest_piece(step.num_tokens), row_granule);
  return ProductNode::lane_bytes(step) + num_tokens * std::min(rows, width) * kFloat;
}

void GateUpSiluNode::run(const Frame& frame, int64_t, Lane lane) const {
  const int64_t width = out_features_ / 2;
  const void* prepared = prepare(frame, frame.values[inputs[0]], nullptr, lane);
  float* const gate = frame.values[output];
  float* const up = floats(frame.scratch(lane) + ProductNode::lane_bytes(frame.step));
  share_product(frame, lane, width, row_granule, [&](Share tokens, Share rows) {
    const int64_t count = rows.end - rows.begin;
    float* const up_of_first = up - tokens.begin * count - (width + rows.begin);  // as if all of up were there
    multiply(frame, prepared, tokens, rows, gate, width);
    multiply(frame, prepared, tokens, {width + rows.begin, width + rows.end}, up_of_first, count);
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      frame.rows.silu_mul(gate + token * width + rows.begin, up + (token - tokens.begin) * count, count);
    }
  });
}

void LmHeadNode::run(const Frame& frame, int64_t, Lane lane) const {
  if (frame.step.num_rows == 0) return;
  const void* prepared = prepare(frame, frame.values[inputs[0]], frame.step.rows, lane);
  const int64_t num_rows = out_features_;
  share_product(frame, lane, num_rows, row_granule, [&](Share tokens, Share rows) {
    multiply(frame, prepared, tokens, rows, frame.values[output], num_rows);
  });
}

}  // namespace inferneo
