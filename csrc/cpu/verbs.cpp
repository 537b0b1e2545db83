// The operators that record a tape: torch.ops.inferneo.{make_tape, tape_input, tape_<verb>}; step_ops.cpp runs it.
//
// A verb's operator appends one node and returns the number of its value. Everything a node points to is held by the
// tape itself, so a tape outlives whatever Python drops. Shapes are checked as a node is recorded.
#include <algorithm>
#include <optional>
#include <vector>

#include "linear_args.h"
#include "nodes.h"
#include "recording.h"

namespace inferneo {
namespace {

const PackedLinear& packed(Recording& recording, const Tensor& weight) {
  recording.tensors.push_back(weight);
  return packed_linear_of(weight);
}

const float* held(Recording& recording, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  recording.tensors.push_back(checked(name, tensor, ScalarType::Float, shape));
  return data<float>(recording.tensors.back());
}

void check_width(const Recording& recording, const char* name, int64_t value, int64_t width) {
  check(value >= 0 && value < recording.tape.num_values(), name, " is value ", value, "; the tape has ",
        recording.tape.num_values());
  check(recording.tape.width(value) == width, name, " has ", recording.tape.width(value), " columns; it must have ",
        width);
}

CacheType cache_type(const Tensor& side) {
  switch (side.scalar_type()) {
    case ScalarType::Float:
      return CacheType::kFP32;
    case ScalarType::BFloat16:
      return CacheType::kBF16;
    case ScalarType::Half:
      return CacheType::kFP16;
    case ScalarType::Char:
      return CacheType::kInt8;
    default:
      check(false, "the cache has dtype ", torch::headeronly::toString(side.scalar_type()),
            "; it is Float, BFloat16, Half or Char (int8)");
      return CacheType::kFP32;
  }
}

CacheView cache_view(Recording& recording, const Tensor& k, const Tensor& v) {
  check(k.dim() == 4 && v.dim() == 4, "the cache has ", k.dim(),
        " dimensions; it is [num_blocks, num_kv_heads, "
        "block_size, head_dim]");
  for (int64_t i = 0; i < 4; ++i) {
    check(k.size(i) == v.size(i) && k.stride(i) == v.stride(i), "the cache's k and v differ in dimension ", i);
  }
  check(k.is_cpu() && v.is_cpu() && k.scalar_type() == v.scalar_type(),
        "the cache's k and v must be CPU tensors of one dtype");
  const int64_t block_elements = k.size(1) * k.size(2) * k.size(3);
  const bool is_dense = k.stride(3) == 1 && k.stride(2) == k.size(3) && k.stride(1) == k.size(2) * k.size(3);
  check(is_dense && k.stride(0) >= block_elements, "the cache's blocks must each be contiguous");
  const int64_t block_size = k.size(2);
  check(recording.block_size == 0 || recording.block_size == block_size, "the tape's caches differ in block_size");
  recording.block_size = block_size;
  recording.num_blocks = std::min(recording.num_blocks, k.size(0));
  const CacheType type = cache_type(k);
  const int64_t head_dim = k.size(3) - (type == CacheType::kInt8 ? kScaleBytes : 0);
  check(head_dim >= 1, "the cache's int8 rows have ", k.size(3), " bytes; they are head_dim codes and a scale of ",
        kScaleBytes);
  recording.tensors.push_back(k);
  recording.tensors.push_back(v);
  return {static_cast<std::byte*>(k.mutable_data_ptr()),
          static_cast<std::byte*>(v.mutable_data_ptr()),
          type,
          k.size(0),
          k.size(1),
          block_size,
          head_dim,
          k.stride(0) * static_cast<int64_t>(k.element_size())};
}

template <class N, class... Args>
int64_t add(Recording& recording, int64_t width, std::vector<int> inputs, Args&&... args) {
  auto node = std::make_unique<N>(std::forward<Args>(args)...);
  node->inputs = std::move(inputs);
  return recording.tape.add_node(std::move(node), width);
}

Tensor make_tape() { return own(std::make_unique<Recording>()); }

int64_t tape_input(const Tensor& tape, int64_t width) {
  check(width >= 1, "the input has ", width, " columns; it must have at least one");
  return recording(tape).tape.add_input(width);
}

int64_t tape_embed(const Tensor& tape, const Tensor& weight) {
  Recording& r = recording(tape);
  const PackedLinear& linear = packed(r, weight);
  check_keeps_rows(linear);
  r.vocab_size = std::min(r.vocab_size, linear.out_features);
  r.reads_ids = true;
  return add<EmbedNode>(r, linear.in_features, {}, linear);
}

int64_t tape_qkv_rope_store(const Tensor& tape, int64_t x, const Tensor& norm, double eps, const Tensor& weight,
                            const Tensor& rope, const Tensor& k, const Tensor& v) {
  Recording& r = recording(tape);
  const PackedLinear& linear = packed(r, weight);
  const CacheView cache = cache_view(r, k, v);
  check_width(r, "x", x, linear.in_features);
  const float* table = held(r, "rope", rope, {-1, cache.head_dim});
  const float* norm_weight = held(r, "the norm", norm, {linear.in_features});
  check(cache.head_dim % 2 == 0, "head_dim is ", cache.head_dim, "; RoPE rotates pairs, so it is even");
  const int64_t q_width = linear.out_features - 2 * cache.num_kv_heads * cache.head_dim;
  check(q_width > 0 && linear.out_features % cache.head_dim == 0, "w_qkv has ", linear.out_features,
        " rows; they must be (num_heads + 2 * ", cache.num_kv_heads, ") * ", cache.head_dim);
  r.max_model_len = std::min(r.max_model_len, rope.size(0));
  r.reads_positions = true;
  return add<QkvRopeStoreNode>(r, q_width, {static_cast<int>(x)}, linear, norm_weight, static_cast<float>(eps), table,
                               cache);
}

int64_t tape_attention(const Tensor& tape, int64_t q, const Tensor& k, const Tensor& v) {
  Recording& r = recording(tape);
  const CacheView cache = cache_view(r, k, v);
  check(q >= 0 && q < r.tape.num_values(), "q is value ", q, "; the tape has ", r.tape.num_values());
  const int64_t width = r.tape.width(q);
  check(width % (cache.num_kv_heads * cache.head_dim) == 0, "q has ", width,
        " columns; they must be a multiple of num_kv_heads * head_dim (", cache.num_kv_heads, " * ", cache.head_dim,
        ")");
  r.reads_sequences = true;
  return add<AttentionNode>(r, width, {static_cast<int>(q)}, width / cache.head_dim, cache);
}

int64_t tape_linear_add(const Tensor& tape, int64_t x, const Tensor& weight, std::optional<int64_t> residual) {
  Recording& r = recording(tape);
  const PackedLinear& linear = packed(r, weight);
  check_width(r, "x", x, linear.in_features);
  std::vector<int> inputs{static_cast<int>(x)};
  auto node = std::make_unique<LinearAddNode>(linear);
  if (residual) {
    check_width(r, "residual", *residual, linear.out_features);
    inputs.push_back(static_cast<int>(*residual));
    node->replaces = *residual == x ? -1 : inputs[1];  // x is read by all lanes while the output is written
  }
  node->inputs = std::move(inputs);
  return r.tape.add_node(std::move(node), linear.out_features);
}

int64_t tape_gate_up_silu(const Tensor& tape, int64_t x, const Tensor& norm, double eps, const Tensor& weight) {
  Recording& r = recording(tape);
  const PackedLinear& linear = packed(r, weight);
  check_width(r, "x", x, linear.in_features);
  check(linear.out_features % 2 == 0, "w_gate_up has ", linear.out_features, " rows; gate and up have as many each");
  const float* norm_weight = held(r, "the norm", norm, {linear.in_features});
  return add<GateUpSiluNode>(r, linear.out_features / 2, {static_cast<int>(x)}, linear, norm_weight,
                             static_cast<float>(eps));
}

int64_t tape_lm_head(const Tensor& tape, int64_t x, const Tensor& norm, double eps, const Tensor& weight) {
  Recording& r = recording(tape);
  const PackedLinear& linear = packed(r, weight);
  check_width(r, "x", x, linear.in_features);
  const float* norm_weight = held(r, "the norm", norm, {linear.in_features});
  r.reads_rows = true;
  return add<LmHeadNode>(r, linear.out_features, {static_cast<int>(x)}, linear, norm_weight, static_cast<float>(eps));
}

STABLE_TORCH_LIBRARY_FRAGMENT(inferneo, m) {
  m.def("make_tape() -> Tensor");
  m.def("tape_input(Tensor tape, int width) -> int");
  m.def("tape_embed(Tensor tape, Tensor weight) -> int");
  m.def(
      "tape_qkv_rope_store(Tensor tape, int x, Tensor norm, float eps, Tensor weight, Tensor rope, Tensor k, Tensor v) "
      "-> int");
  m.def("tape_attention(Tensor tape, int q, Tensor k, Tensor v) -> int");
  m.def("tape_linear_add(Tensor tape, int x, Tensor weight, int? residual) -> int");
  m.def("tape_gate_up_silu(Tensor tape, int x, Tensor norm, float eps, Tensor weight) -> int");
  m.def("tape_lm_head(Tensor tape, int x, Tensor norm, float eps, Tensor weight) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(inferneo, CPU, m) {
  m.impl("tape_input", TORCH_BOX(&tape_input));
  m.impl("tape_embed", TORCH_BOX(&tape_embed));
  m.impl("tape_qkv_rope_store", TORCH_BOX(&tape_qkv_rope_store));
  m.impl("tape_attention", TORCH_BOX(&tape_attention));
  m.impl("tape_linear_add", TORCH_BOX(&tape_linear_add));
  m.impl("tape_gate_up_silu", TORCH_BOX(&tape_gate_up_silu));
  m.impl("tape_lm_head", TORCH_BOX(&tape_lm_head));
}

STABLE_TORCH_LIBRARY_IMPL(inferneo, CompositeExplicitAutograd, m) { m.impl("make_tape", TORCH_BOX(&make_tape)); }

}  // namespace
}  // namespace inferneo
