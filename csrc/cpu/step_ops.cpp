// The operators that run a tape: torch.ops.inferneo.{tape_run, tape_step, tape_again, tape_time, tape_times}.
//
// What differs from step to step is checked at each run, for it decides which memory is read and written.
#include <algorithm>
#include <optional>
#include <vector>

#include "../sampler_ops.h"
#include "recording.h"

namespace inferneo {
namespace {

// values: null where the tape reads none.
void check_range(const char* name, const int64_t* values, int64_t count, int64_t end) {
  if (values == nullptr) return;
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

// A step's tensors. Their types and shapes are checked once; what they hold, at each run.
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
    view_.token_ids = ids("token_ids", token_ids, num_tokens);
    view_.positions = ids("positions", positions, num_tokens);
    view_.slot_mapping = ids("slot_mapping", slot_mapping, num_tokens);
    view_.num_rows = rows ? rows->numel() : 0;
    view_.rows = ids("rows", rows, view_.num_rows);
    if (!r.reads_sequences) return;
    const int64_t num_seqs = sequences[1].numel();
    SequenceViews& s = view_.sequences;
    s.query_start_loc = hold<int32_t>(checked("query_start_loc", sequences[0], ScalarType::Int, {num_seqs + 1}));
    s.seq_lens = hold<int32_t>(checked("seq_lens", sequences[1], ScalarType::Int, {num_seqs}));
    s.block_tables = hold<int32_t>(checked("block_tables", sequences[2], ScalarType::Int, {num_seqs, -1}));
    s.num_seqs = num_seqs;
    s.max_blocks = sequences[2].size(1);
  }

  int64_t num_rows() const { return view_.num_rows; }

  // The step, if all that its tensors hold now is in range.
  const StepInput& checked_view(const Recording& r) const {
    const int64_t n = view_.num_tokens;
    check_range("token_ids", view_.token_ids, n, r.vocab_size);
    check_range("positions", view_.positions, n, r.max_model_len);
    const int64_t num_slots = r.block_size == 0 ? kNoLimit : r.num_blocks * r.block_size;
    check_range("slot_mapping", view_.slot_mapping, n, num_slots);
    check_range("rows", view_.rows, view_.num_rows, n);
    if (r.reads_sequences) check_sequences(view_.sequences, n, r);
    return view_;
  }

 private:
  template <class T>
  const T* hold(Tensor tensor) {
    held_.push_back(std::move(tensor));
    return data<T>(held_.back());
  }

  const int64_t* ids(const char* name, const std::optional<Tensor>& tensor, int64_t count) {
    return tensor ? hold<int64_t>(checked(name, *tensor, ScalarType::Long, {count})) : nullptr;
  }

  StepInput view_ = {};
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
  const int64_t out_rows = r.reads_rows ? step.num_rows() : num_tokens;
  Tensor out = torch::stable::empty({out_rows, r.tape.width(r.tape.num_values() - 1)}, ScalarType::Float);
  r.tape.replay(owned<Team>("team", team), cpu_isa(), step.checked_view(r), addresses.data(), mutable_data<float>(out));
  return out;
}

}  // namespace

// A step with the sampler's tensors behind it.
struct WholeStep {
  Step step;
  std::optional<Tensor> floats, ints, token_counts, bias_start, bias_ids, bias_values;
  Tensor token_ids;

  void run(Recording& r, Team& team) {
    const int64_t num_rows = step.num_rows();
    if (!r.logits || r.logits->size(0) != num_rows) {
      r.logits = torch::stable::empty({num_rows, r.tape.width(r.tape.num_values() - 1)}, ScalarType::Float);
    }
    r.tape.replay(team, cpu_isa(), step.checked_view(r), nullptr, mutable_data<float>(*r.logits));
    r.sampler_ns = 0;
    if (num_rows == 0) return;
    check(floats && ints, "a step that samples needs floats and ints");
    const int64_t start = now_ns();
    sample(team, *r.logits, *floats, *ints, token_counts, bias_start, bias_ids, bias_values, token_ids);
    r.sampler_ns = now_ns() - start;
  }
};

namespace {

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
  r.last_step.reset();
  Step step(r, token_ids, positions, slot_mapping, sequences, rows, token_ids.numel());
  const int64_t num_rows = step.num_rows();
  auto whole = std::make_shared<WholeStep>(WholeStep{std::move(step), floats, ints, token_counts, bias_start, bias_ids,
                                                     bias_values, torch::stable::empty({num_rows}, ScalarType::Long)});
  whole->run(r, lanes);
  if (num_rows == 0) return {};
  if (num_logprobs >= 0) {
    const auto [logprobs, ranks, top_ids, top_logprobs] = score(lanes, *r.logits, whole->token_ids, num_logprobs);
    return {whole->token_ids, logprobs, ranks, top_ids, top_logprobs};
  }
  r.last_step = whole;
  return {whole->token_ids};
}

// The last tape_step once more, with what its tensors hold now; into the token ids that it gave. A decode step's
// arguments cost more than its sampler: fourteen of them, unpacked in a cold cache.
void tape_again(const Tensor& tape, const Tensor& team) {
  Recording& r = recording(tape);
  const std::shared_ptr<WholeStep> step = r.last_step;
  check(step != nullptr, "there is no step to run again: the last one failed, sampled nothing or gave logprobs");
  step->run(r, owned<Team>("team", team));
}

// Whether the tape's nodes are timed from now on; gives how many there are.
int64_t tape_time(const Tensor& tape, bool on) {
  recording(tape).tape.time_nodes(on);
  return recording(tape).tape.num_nodes();
}

// Nanoseconds of each node in the last timed replay, then of the sampler: int64 [num_nodes + 1]; [0] before there was
// one.
Tensor tape_times(const Tensor& tape) {
  const Recording& r = recording(tape);
  std::vector<int64_t> durations = r.tape.node_ns();
  if (!durations.empty()) durations.push_back(r.sampler_ns);
  const auto count = static_cast<int64_t>(durations.size());
  Tensor out = torch::stable::empty({count}, ScalarType::Long);
  std::copy(durations.begin(), durations.end(), mutable_data<int64_t>(out));
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(inferneo, m) {
  m.def(
      "tape_run(Tensor tape, Tensor team, Tensor[] inputs, Tensor? token_ids, Tensor? positions, Tensor? slot_mapping, "
      "Tensor[] sequences, Tensor? rows) -> Tensor");
  m.def(
      "tape_step(Tensor tape, Tensor team, Tensor token_ids, Tensor positions, Tensor slot_mapping, Tensor[] "
      "sequences, "
      "Tensor rows, Tensor? floats, Tensor? ints, Tensor? token_counts, Tensor? bias_start, Tensor? bias_ids, "
      "Tensor? bias_values, int num_logprobs) -> Tensor[]");
  m.def("tape_again(Tensor tape, Tensor team) -> ()");
  m.def("tape_time(Tensor tape, bool on) -> int");
  m.def("tape_times(Tensor tape) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(inferneo, CPU, m) {
  m.impl("tape_run", TORCH_BOX(&tape_run));
  m.impl("tape_step", TORCH_BOX(&tape_step));
  m.impl("tape_again", TORCH_BOX(&tape_again));
  m.impl("tape_time", TORCH_BOX(&tape_time));
  m.impl("tape_times", TORCH_BOX(&tape_times));
}

}  // namespace
}  // namespace inferneo
