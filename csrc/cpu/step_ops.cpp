// The operators that run a tape: torch.ops.inferneo.{tape_run, tape_step, tape_again, tape_time, tape_times}.
//
// What differs from step to step is checked at each run, for it decides which memory is read and written.
#include <algorithm>
#include <optional>
#include <utility>
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

// The blocks of a sequence's first num_tokens tokens.
void check_blocks(const SequenceViews& s, int64_t seq, int64_t num_tokens, const Recording& r) {
  const int64_t num_blocks = (num_tokens + r.block_size - 1) / r.block_size;
  check(num_blocks <= s.max_blocks, "sequence ", seq, " has ", num_tokens, " tokens; its block table has room for ",
        s.max_blocks * r.block_size);
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int32_t block = s.block_tables[seq * s.max_blocks + i];
    check(block >= 0 && block < r.num_blocks, "block_tables[", seq, "][", i, "] is ", block, "; it is in [0, ",
          r.num_blocks, ")");
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
    check_blocks(s, seq, seq_len, r);
  }
}

// What a step must be for num_steps to follow one another, each of the tokens that the last one draws: one token a
// sequence, drawn after, and room for all of them.
void check_burst(const StepInput& first, int64_t num_steps, const Recording& r) {
  const SequenceViews& s = first.sequences;
  check(r.reads_ids && r.reads_positions && r.reads_sequences && r.reads_rows, "the tape cannot go on by itself");
  check(first.num_tokens == s.num_seqs && first.num_rows == s.num_seqs, "only a step of one token a sequence, each ",
        "drawn after, can be followed by others");
  const int64_t num_ids = r.tape.width(r.tape.num_values() - 1);
  check(num_ids <= r.vocab_size, "the output head has ", num_ids, " tokens, the embedding ", r.vocab_size);
  for (int64_t seq = 0; seq < s.num_seqs; ++seq) {
    check(first.rows[seq] == seq, "rows[", seq, "] is ", first.rows[seq], "; in a burst it is ", seq);
    const int64_t position = first.positions[seq], end = position + num_steps;
    check(s.seq_lens[seq] == position + 1, "sequence ", seq, " has ", s.seq_lens[seq],
          " tokens and decodes the one at ", position);
    check(end <= r.max_model_len, "sequence ", seq, " would have ", end, " tokens; it may have ", r.max_model_len);
    check_blocks(s, seq, end, r);
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

// The steps of a burst: the first as it was given, then, in memory of its own, each a token further.
class Burst {
 public:
  // The step after `step`, which drew `drawn`.
  const StepInput& next(const StepInput& step, const int64_t* drawn, int64_t block_size) {
    const int64_t n = step.num_tokens;
    // Into themselves after the first time: each entry is read before it is written.
    for (std::vector<int64_t>* column : {&token_ids_, &positions_, &slots_}) column->resize(n);
    seq_lens_.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t position = step.positions[i] + 1;
      // Where nothing could be drawn the sequence goes on to no purpose: with a token that there is.
      token_ids_[i] = std::max<int64_t>(drawn[i], 0);
      positions_[i] = position;
      const int64_t block = step.sequences.block_tables[i * step.sequences.max_blocks + position / block_size];
      slots_[i] = block * block_size + position % block_size;
      seq_lens_[i] = static_cast<int32_t>(position) + 1;
    }
    view_ = step;
    view_.token_ids = token_ids_.data();
    view_.positions = positions_.data();
    view_.slot_mapping = slots_.data();
    view_.sequences.seq_lens = seq_lens_.data();
    return view_;
  }

 private:
  std::vector<int64_t> token_ids_, positions_, slots_;
  std::vector<int32_t> seq_lens_;
  StepInput view_ = {};
};

}  // namespace

// Steps with the sampler's tensors behind them.
struct WholeStep {
  Step step;
  std::optional<Sampling> sampling;  // none where no row is sampled
  int64_t num_steps;
  Tensor token_ids;  // [num_steps * num_rows]
  Burst burst = {};

  void run(Recording& r, Team& team) {
    const int64_t num_rows = step.num_rows();
    if (!r.logits || r.logits->size(0) != num_rows) {
      r.logits = torch::stable::empty({num_rows, r.tape.width(r.tape.num_values() - 1)}, ScalarType::Float);
    }
    auto* logits = mutable_data<float>(*r.logits);
    auto* drawn = mutable_data<int64_t>(token_ids);
    const StepInput* now = &step.checked_view(r);
    check(num_rows == 0 || sampling, "a step that samples needs floats and ints");
    if (num_steps > 1) check_burst(*now, num_steps, r);
    for (int64_t i = 0; i < num_steps; ++i) {
      if (i > 0) now = &burst.next(*now, drawn + (i - 1) * num_rows, r.block_size);
      r.tape.replay(team, cpu_isa(), *now, nullptr, logits);
      if (!sampling) continue;
      const int64_t start = now_ns();
      sampling->draw(team, logits, i, drawn + i * num_rows);
      r.sampler_ns += now_ns() - start;
    }
  }
};

namespace {

// num_steps whole steps: the tape, which ends in lm_head, then the sampler. The first is of these tensors; each later
// one computes the tokens that the one before drew. Gives nothing if no row is sampled; otherwise the token ids, step
// by step, and, if num_logprobs is not negative, logprobs, ranks, top_ids and top_logprobs of the only step.
std::vector<Tensor> tape_step(const Tensor& tape, const Tensor& team, const Tensor& token_ids, const Tensor& positions,
                              const Tensor& slot_mapping, const std::vector<Tensor>& sequences, const Tensor& rows,
                              const std::optional<Tensor>& floats, const std::optional<Tensor>& ints,
                              const std::optional<Tensor>& token_counts, const std::optional<Tensor>& bias_start,
                              const std::optional<Tensor>& bias_ids, const std::optional<Tensor>& bias_values,
                              int64_t num_logprobs, int64_t num_steps) {
  Recording& r = recording(tape);
  Team& lanes = owned<Team>("team", team);
  check(r.tape.num_nodes() > 0 && r.tape.num_inputs() == 0, "the tape is not one of a whole step");
  check(num_steps >= 1 && (num_steps == 1 || num_logprobs < 0), "num_steps is ", num_steps,
        "; it is at least 1, and no more where log-probabilities are reported");
  r.last_step.reset();
  Step step(r, token_ids, positions, slot_mapping, sequences, rows, token_ids.numel());
  const int64_t num_rows = step.num_rows();
  std::optional<Sampling> sampling;
  if (num_rows > 0 && floats && ints) {
    sampling.emplace(num_rows, r.tape.width(r.tape.num_values() - 1), *floats, *ints, token_counts, bias_start,
                     bias_ids, bias_values);
  }
  auto whole = std::make_shared<WholeStep>(WholeStep{std::move(step), std::move(sampling), num_steps,
                                                     torch::stable::empty({num_steps * num_rows}, ScalarType::Long)});
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
// arguments cost more than its sampler: fifteen of them, unpacked in a cold cache.
void tape_again(const Tensor& tape, const Tensor& team) {
  Recording& r = recording(tape);
  const std::shared_ptr<WholeStep> step = r.last_step;
  check(step != nullptr, "there is no step to run again: the last one failed, sampled nothing or gave logprobs");
  step->run(r, owned<Team>("team", team));
}

// Whether the tape's nodes are timed from now on; gives how many there are.
int64_t tape_time(const Tensor& tape, bool on) {
  Recording& r = recording(tape);
  r.tape.time_nodes(on);
  r.sampler_ns = 0;
  return r.tape.num_nodes();
}

// Nanoseconds of each node, then of the sampler, over all runs since this was last asked: int64 [num_nodes + 1]; [0]
// while nodes are not timed.
Tensor tape_times(const Tensor& tape) {
  Recording& r = recording(tape);
  std::vector<int64_t> durations = r.tape.take_node_ns();
  const int64_t sampler_ns = std::exchange(r.sampler_ns, 0);
  if (!durations.empty()) durations.push_back(sampler_ns);
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
      "Tensor? bias_values, int num_logprobs, int num_steps) -> Tensor[]");
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
