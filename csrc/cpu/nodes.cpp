#include "nodes.h"

#include <algorithm>

namespace inferneo {
namespace {

constexpr int64_t kFloat = sizeof(float);

float* floats(std::byte* bytes) { return reinterpret_cast<float*>(bytes); }

}  // namespace

void EmbedNode::run(const Frame& frame, int64_t, Lane lane) const {
  const Share tokens = share(frame.step.num_tokens, 1, lane);
  if (tokens.begin == tokens.end) return;
  float* const out = frame.values[output] + tokens.begin * weight_.in_features;
  unpack_rows(weight_, frame.step.token_ids + tokens.begin, tokens.end - tokens.begin, out);
}

// prepare: the normed rows, then the prepared ones.
int64_t ProductNode::prepare_bytes(int64_t rows) const {
  return round_up(rows * weight_.in_features * kFloat, 64) + round_up(prepared_bytes(weight_, rows), 64);
}

int64_t ProductNode::shared_bytes(const StepInput& step) const {
  return num_rows(step) > 1 ? prepare_bytes(num_rows(step)) : 0;
}

int64_t ProductNode::lane_bytes(const StepInput& step) const { return num_rows(step) == 1 ? prepare_bytes(1) : 0; }

const void* ProductNode::prepare(const Frame& frame, const float* x, const int64_t* rows, Lane lane) const {
  const int64_t count = num_rows(frame.step), width = weight_.in_features;
  const bool alone = count == 1;
  std::byte* const scratch = alone ? frame.scratch(lane) : frame.shared;
  const Lane preparer = alone ? Lane{0, 1} : lane;
  const float* source = x;
  if (norm_weight_ != nullptr) {
    const Share mine = share(count, 1, preparer);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const float* row = x + (rows == nullptr ? i : rows[i]) * width;
      frame.rows.rms_norm(row, norm_weight_, eps_, width, floats(scratch) + i * width);
    }
    source = floats(scratch);
    if (!alone) frame.team.barrier(lane);
  }
  std::byte* const out = scratch + round_up(count * width * kFloat, 64);
  prepare_rows(frame.linear, weight_, source, count, out, preparer);
  if (!alone) frame.team.barrier(lane);
  return out;
}

void ProductNode::multiply(const Frame& frame, const void* prepared, int64_t begin, int64_t end, float* out,
                           int64_t stride, const float* residual) const {
  if (begin < end) {
    linear_rows(frame.linear, weight_, prepared, num_rows(frame.step), begin, end, out, stride, residual);
  }
}

// Behind what prepare needs: the keys and values of all tokens, [num_tokens, 2 * num_kv_heads * head_dim].
int64_t QkvRopeStoreNode::shared_bytes(const StepInput& step) const {
  const int64_t kv_width = 2 * cache_.num_kv_heads * cache_.head_dim;
  return prepare_bytes(step.num_tokens) + step.num_tokens * kv_width * kFloat;
}

void QkvRopeStoreNode::run(const Frame& frame, int64_t, Lane lane) const {
  constexpr int64_t kManyTokens = 16;
  const int64_t num_tokens = frame.step.num_tokens;
  const int64_t q_width = num_heads() * cache_.head_dim, kv_width = weight_.out_features - q_width;
  const void* prepared = prepare(frame, frame.values[inputs[0]], nullptr, lane);
  // A lane makes whole heads and rotates them itself. Where heads do not divide evenly (15 by 2 lanes), many tokens are
  // worth a barrier more: the products are split by rows, what follows them by tokens.
  const bool is_split = num_tokens >= kManyTokens;
  const Share rows = share(weight_.out_features, is_split ? row_granule : cache_.head_dim, lane);
  float* const q = frame.values[output];
  float* const kv = floats(frame.shared + prepare_bytes(num_tokens)) - q_width;  // as if a row began with Q
  multiply(frame, prepared, rows.begin, std::min(rows.end, q_width), q, q_width);
  multiply(frame, prepared, std::max(rows.begin, q_width), rows.end, kv, kv_width);
  if (is_split) {
    frame.team.barrier(lane);
    rotate_and_store(frame, q, kv, share(num_tokens, 1, lane), {0, weight_.out_features});
  } else {
    rotate_and_store(frame, q, kv, {0, num_tokens}, rows);
  }
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
  const Share rows = share(weight_.out_features, row_granule, lane);
  const float* residual = inputs.size() > 1 ? frame.values[inputs[1]] : nullptr;
  multiply(frame, prepared, rows.begin, rows.end, frame.values[output], weight_.out_features, residual);
}

int64_t GateUpSiluNode::rows_at_once(int64_t num_tokens) const {
  constexpr int64_t kFloatsAtOnce = 32768, kFewestRows = 64;
  const int64_t rows = std::max(round_up(kFloatsAtOnce / num_tokens, row_granule), kFewestRows);
  return std::min(rows, weight_.out_features / 2);
}

// Behind what prepare needs: the products with some rows of up.
int64_t GateUpSiluNode::lane_bytes(const StepInput& step) const {
  return ProductNode::lane_bytes(step) + step.num_tokens * rows_at_once(step.num_tokens) * kFloat;
}

void GateUpSiluNode::run(const Frame& frame, int64_t, Lane lane) const {
  const int64_t width = weight_.out_features / 2, num_tokens = frame.step.num_tokens;
  const int64_t at_once = rows_at_once(num_tokens);
  const void* prepared = prepare(frame, frame.values[inputs[0]], nullptr, lane);
  const Share rows = share(width, row_granule, lane);
  float* const gate = frame.values[output];
  float* const up = floats(frame.scratch(lane) + ProductNode::lane_bytes(frame.step));
  for (int64_t begin = rows.begin; begin < rows.end; begin += at_once) {
    const int64_t end = std::min(begin + at_once, rows.end);
    multiply(frame, prepared, begin, end, gate, width);
    multiply(frame, prepared, width + begin, width + end, up - width - begin, at_once);  // row 0 would lie there
    for (int64_t token = 0; token < num_tokens; ++token) {
      frame.rows.silu_mul(gate + token * width + begin, up + token * at_once, end - begin);
    }
  }
}

void LmHeadNode::run(const Frame& frame, int64_t, Lane lane) const {
  if (frame.step.num_rows == 0) return;
  const void* prepared = prepare(frame, frame.values[inputs[0]], frame.step.rows, lane);
  const Share rows = share(weight_.out_features, row_granule, lane);
  multiply(frame, prepared, rows.begin, rows.end, frame.values[output], weight_.out_features);
}

}  // namespace inferneo
