// The operators that record and replay tapes (tape.h): torch.ops.inferneo.tape_*.
//
// A verb's operator appends one node and returns the number of its value. Everything a node points to is held by the
// tape itself, so a tape outlives whatever Python drops. Shapes are checked as a node is recorded; what differs from
// step to step is checked at each replay, for it decides which memory is read and written.
#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "../owned.h"
#include "../sampler_ops.h"
#include "linear_args.h"
#include "nodes.h"

namespace inferneo {
namespace {

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

// A tape and what keeps its pointers valid.
struct Recording {
  static constexpr uint64_t kMagic = 0x65706174'6e726669;

  Tape tape;
  std::vector<Tensor> tensors;
  // What every node of the tape can take.
  int64_t vocab_size = kNoLimit, max_model_len = kNoLimit, num_blocks = kNoLimit, block_size = 0;
  // What its nodes read of a step.
  bool reads_ids = false, reads_positions = false, reads_sequences = false, reads_rows = false;
};

Recording& recording(const Tensor& tape) { return owned<Recording>("tape", tape); }

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
    default:
      check(false, "the cache has dtype ", torch::headeronly::toString(side.scalar_type()),
            "; it is Float, BFloat16 or Half");
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
  recording.tensors.push_back(k);
  recording.tensors.push_back(v);
  return {static_cast<std::byte*>(k.mutable_data_ptr()),
          static_cast<std::byte*>(v.mutable_data_ptr()),
          cache_type(k),
          k.size(0),
          k.size(1),
          block_size,
          k.size(3),
          k.stride(0)};
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

void check_range(const char* name, const int64_t* values, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i) {
    check(values[i] >= 0 && values[i] < end, name, "[", i, "] is ", values[i], "; it is in [0, ", end, ")");
  }
}

void check_sequences(const SequenceViews& s, int64_t num_tokens, const Recording& r) {
  check(s.query_start_loc[0] == 0 && s.query_start_loc[s.num_seqs] == num_tokens,
        "query_start_loc must rise from 0 to num_tokens (", num_tokens, ")");
  for (int64_t seq = 0; seq < s.num_seqs; ++seq) {
    const int64_t query_len = s.query_start_loc[seq + 1] - s.query_start_loc[seq];
    const int64_t seq_len = s.seq_lens[seq];
    check(query_len >= 1 && seq_len >= query_len, "sequence ", seq, " has ", query_len, " query tokens of ", seq_len,
          "; there is at least one, and no more than the sequence has");
    const int64_t num_blocks = (seq_len + r.block_size - 1) / r.block_size;
    check(num_blocks <= s.max_blocks, "sequence ", seq, " has ", seq_len, " tokens; its block table has room for ",
          s.max_blocks * r.block_size);
    for (int64_t i = 0; i < num_blocks; ++i) {
      const int32_t block = s.block_tables[seq * s.max_blocks + i];
      check(block >= 0 && block < r.num_blocks, "block_tables[", seq, "][", i, "] is ", block, "; it is in [0, ",
            r.num_blocks, ")");
    }
  }
}

// The step's tensors, checked against what the tape can take.
class Step {
 public:
  Step(const Recording& r, const std::optional<Tensor>& token_ids, const std::optional<Tensor>& positions,
       const std::optional<Tensor>& slot_mapping, const std::vector<Tensor>& sequences,
       const std::optional<Tensor>& rows, int64_t num_tokens) {
    view_.num_tokens = num_tokens;
    check(!r.reads_ids || token_ids, "the tape needs token_ids");
    check(!r.reads_positions || (positions && slot_mapping), "the tape needs positions and slot_mapping");
    check(!r.reads_sequences || sequences.size() == 3, "the tape needs query_start_loc, seq_lens and block_tables");
    check(!r.reads_rows || rows, "the tape needs rows");
    check(num_tokens >= 1, "the step has no tokens");
    view_.token_ids = ids("token_ids", token_ids, num_tokens, r.vocab_size);
    view_.positions = ids("positions", positions, num_tokens, r.max_model_len);
    view_.slot_mapping =
        ids("slot_mapping", slot_mapping, num_tokens, r.block_size == 0 ? kNoLimit : r.num_blocks * r.block_size);
    view_.num_rows = rows ? rows->numel() : 0;
    view_.rows = ids("rows", rows, view_.num_rows, num_tokens);
    view_.sequences = {};
    if (!r.reads_sequences) return;
    const int64_t num_seqs = sequences[1].numel();
    SequenceViews& s = view_.sequences;
    s.query_start_loc = hold<int32_t>(checked("query_start_loc", sequences[0], ScalarType::Int, {num_seqs + 1}));
    s.seq_lens = hold<int32_t>(checked("seq_lens", sequences[1], ScalarType::Int, {num_seqs}));
    s.block_tables = hold<int32_t>(checked("block_tables", sequences[2], ScalarType::Int, {num_seqs, -1}));
    s.num_seqs = num_seqs;
    s.max_blocks = sequences[2].size(1);
    check_sequences(s, num_tokens, r);
  }

  const StepInput& view() const { return view_; }

 private:
  template <class T>
  const T* hold(Tensor tensor) {
    held_.push_back(std::move(tensor));
    return data<T>(held_.back());
  }

  const int64_t* ids(const char* name, const std::optional<Tensor>& tensor, int64_t count, int64_t end) {
    if (!tensor) return nullptr;
    const auto* values = hold<int64_t>(checked(name, *tensor, ScalarType::Long, {count}));
    check_range(name, values, count, end);
    return values;
  }

  StepInput view_;
  std::vector<Tensor> held_;
};

// Runs a tape on inputs of the caller's; gives the last node's value.
Tensor tape_run(const Tensor& tape, const Tensor& team, const std::vector<Tensor>& inputs,
                const std::optional<Tensor>& token_ids, const std::optional<Tensor>& positions,
                const std::optional<Tensor>& slot_mapping, const std::vector<Tensor>& sequences,
                const std::optional<Tensor>& rows) {
  Recording& r = recording(tape);
  check(static_cast<int64_t>(inputs.size()) == r.tape.num_inputs(), "the tape has ", r.tape.num_inputs(),
        " inputs; it was given ", inputs.size());
  check(r.tape.num_nodes() > 0, "the tape is empty");
  const int64_t num_tokens = token_ids ? token_ids->numel() : inputs.empty() ? 0 : inputs[0].size(0);
  const Step step(r, token_ids, positions, slot_mapping, sequences, rows, num_tokens);
  std::vector<Tensor> held;
  std::vector<float*> addresses;
  for (size_t i = 0; i < inputs.size(); ++i) {
    held.push_back(checked("an input", inputs[i], ScalarType::Float, {num_tokens, r.tape.input_width(i)}));
    addresses.push_back(const_cast<float*>(data<float>(held.back())));
  }
  const int64_t out_rows = r.reads_rows ? step.view().num_rows : num_tokens;
  Tensor out = torch::stable::empty({out_rows, r.tape.width(r.tape.num_values() - 1)}, ScalarType::Float);
  r.tape.replay(owned<Team>("team", team), cpu_isa(), step.view(), addresses.data(), mutable_data<float>(out));
  return out;
}

// A whole step: the tape, which ends in lm_head, then the sampler. Gives nothing if no row is sampled; otherwise the
// token ids and, if num_logprobs is not negative, logprobs, ranks, top_ids and top_logprobs.
std::vector<Tensor> tape_step(const Tensor& tape, const Tensor& team, const Tensor& token_ids, const Tensor& positions,
                              const Tensor& slot_mapping, const std::vector<Tensor>& sequences, const Tensor& rows,
                              const std::optional<Tensor>& floats, const std::optional<Tensor>& ints,
                              const std::optional<Tensor>& token_counts, const std::optional<Tensor>& bias_start,
                              const std::optional<Tensor>& bias_ids, const std::optional<Tensor>& bias_values,
                              int64_t num_logprobs) {
  Recording& r = recording(tape);
  Team& lanes = owned<Team>("team", team);
  check(r.tape.num_nodes() > 0 && r.tape.num_inputs() == 0, "the tape is not one of a whole step");
  const Step step(r, token_ids, positions, slot_mapping, sequences, rows, token_ids.numel());
  const int64_t num_rows = step.view().num_rows;
  Tensor logits = torch::stable::empty({num_rows, r.tape.width(r.tape.num_values() - 1)}, ScalarType::Float);
  r.tape.replay(lanes, cpu_isa(), step.view(), nullptr, mutable_data<float>(logits));
  if (num_rows == 0) return {};
  check(floats && ints, "a step that samples needs floats and ints");
  Tensor sampled = sample(lanes, logits, *floats, *ints, token_counts, bias_start, bias_ids, bias_values);
  if (num_logprobs < 0) return {sampled};
  const auto [logprobs, ranks, top_ids, top_logprobs] = score(lanes, logits, sampled, num_logprobs);
  return {sampled, logprobs, ranks, top_ids, top_logprobs};
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
  m.def(
      "tape_run(Tensor tape, Tensor team, Tensor[] inputs, Tensor? token_ids, Tensor? positions, Tensor? slot_mapping, "
      "Tensor[] sequences, Tensor? rows) -> Tensor");
  m.def(
      "tape_step(Tensor tape, Tensor team, Tensor token_ids, Tensor positions, Tensor slot_mapping, Tensor[] "
      "sequences, "
      "Tensor rows, Tensor? floats, Tensor? ints, Tensor? token_counts, Tensor? bias_start, Tensor? bias_ids, "
      "Tensor? bias_values, int num_logprobs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(inferneo, CPU, m) {
  m.impl("tape_input", TORCH_BOX(&tape_input));
  m.impl("tape_embed", TORCH_BOX(&tape_embed));
  m.impl("tape_qkv_rope_store", TORCH_BOX(&tape_qkv_rope_store));
  m.impl("tape_attention", TORCH_BOX(&tape_attention));
  m.impl("tape_linear_add", TORCH_BOX(&tape_linear_add));
  m.impl("tape_gate_up_silu", TORCH_BOX(&tape_gate_up_silu));
  m.impl("tape_lm_head", TORCH_BOX(&tape_lm_head));
  m.impl("tape_run", TORCH_BOX(&tape_run));
  m.impl("tape_step", TORCH_BOX(&tape_step));
}

STABLE_TORCH_LIBRARY_IMPL(inferneo, CompositeExplicitAutograd, m) { m.impl("make_tape", TORCH_BOX(&make_tape)); }

}  // namespace
}  // namespace inferneo
