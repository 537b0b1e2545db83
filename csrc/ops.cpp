// The sampler's operators torch.ops.inferneo.*, and the team's: checks, threads and tensors around sampler.h, on the
// libtorch stable ABI.
#include <Python.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <string>

#include "owned.h"
#include "sampler.h"
#include "sampler_ops.h"

namespace inferneo {
namespace {

constexpr int64_t kMaxVocabSize = int64_t{1} << 22;  // keeps the mass of a row, vocab_size * 2**40, in an int64

void check_vocab_size(int64_t vocab_size) {
  check(vocab_size >= 1 && vocab_size <= kMaxVocabSize, "logits has a vocabulary of ", vocab_size,
        "; it must be in [1, ", kMaxVocabSize, "]");
}

Tensor checked_logits(const Tensor& logits) {
  const ScalarType dtype = logits.scalar_type();
  const Tensor result = checked("logits", logits, dtype == ScalarType::BFloat16 ? dtype : ScalarType::Float, {-1, -1});
  check_vocab_size(result.size(1));
  return result;
}

// f(row, threads, workspace) for every row: rows side by side when there are enough, else each on all threads.
template <class F>
void for_each_row(int64_t num_rows, Team& team, F&& f) {
  thread_local Workspace workspace;
  const Threads all = team.threads();
  if (all.count == 1 || num_rows < all.count) {
    for (int64_t row = 0; row < num_rows; ++row) f(row, all, workspace);
    return;
  }
  std::atomic<int64_t> next{0};
  const Threads one{1, all.run, all.pool};
  run_lanes(all, all.count, [&](int) {
    for (int64_t row = next++; row < num_rows; row = next++) f(row, one, workspace);
  });
}

}  // namespace

Sampling::Sampling(int64_t num_seqs, int64_t vocab_size, const Tensor& floats, const Tensor& ints,
                   const std::optional<Tensor>& token_counts, const std::optional<Tensor>& bias_start,
                   const std::optional<Tensor>& bias_ids, const std::optional<Tensor>& bias_values)
    : num_seqs_(num_seqs),
      vocab_size_(vocab_size),
      floats_(checked("floats", floats, ScalarType::Float, {num_seqs, kNumFloats})),
      ints_(checked("ints", ints, ScalarType::Long, {num_seqs, kNumInts})) {
  check_vocab_size(vocab_size);
  if (token_counts) counts_ = checked("token_counts", *token_counts, ScalarType::Int, {-1, vocab_size});
  const bool biased = bias_start.has_value();
  check(bias_ids.has_value() == biased && bias_values.has_value() == biased,
        "bias_start, bias_ids and bias_values must be given together");
  if (!biased) return;
  bias_start_ = checked("bias_start", *bias_start, ScalarType::Int, {num_seqs + 1});
  bias_ids_ = checked("bias_ids", *bias_ids, ScalarType::Int, {-1});
  bias_values_ = checked("bias_values", *bias_values, ScalarType::Float, {bias_ids_->size(0)});
}

void Sampling::check_values() const {
  const int64_t num_count_rows = counts_ ? counts_->size(0) : 0;
  for (int64_t row = 0; row < num_seqs_; ++row) {
    const int64_t count_row = data<int64_t>(ints_)[row * kNumInts + kCountRow];
    check(count_row < num_count_rows, "the count_row of row ", row, " is ", count_row, "; token_counts has ",
          num_count_rows, " rows");
  }
  if (!bias_start_) return;
  const int64_t count = bias_ids_->size(0);
  const auto* offsets = data<int32_t>(*bias_start_);
  bool rises = offsets[0] == 0 && offsets[num_seqs_] == count;
  for (int64_t i = 0; i < num_seqs_; ++i) rises = rises && offsets[i] <= offsets[i + 1];
  check(rises, "bias_start must rise from 0 to ", count, ", the number of biases");
  for (int64_t i = 0; i < count; ++i) {
    const int32_t id = data<int32_t>(*bias_ids_)[i];
    check(id >= 0 && id < vocab_size_, "bias_ids[", i, "] is ", id, "; it is in [0, ", vocab_size_, ")");
    const float value = data<float>(*bias_values_)[i];
    check(value < std::numeric_limits<float>::infinity(), "bias_values[", i, "] is ", value,
          "; a bias is finite, or -inf to forbid the token");
  }
}

template <class T>
void Sampling::draw(Team& team, const T* logits, int64_t ahead, int64_t* token_ids) const {
  check_values();
  const Isa isa = cpu_isa();
  const auto* floats = data<float>(floats_);
  const auto* ints = data<int64_t>(ints_);
  const int32_t* counts = counts_ ? data<int32_t>(*counts_) : nullptr;
  const int32_t* bias_start = bias_start_ ? data<int32_t>(*bias_start_) : nullptr;
  const int32_t* bias_ids = bias_start_ ? data<int32_t>(*bias_ids_) : nullptr;
  const float* bias_values = bias_start_ ? data<float>(*bias_values_) : nullptr;
  for_each_row(num_seqs_, team, [&](int64_t row, const Threads& threads, Workspace& workspace) {
    int64_t row_ints[kNumInts];
    std::copy_n(ints + row * kNumInts, kNumInts, row_ints);
    row_ints[kPosition] += ahead;
    RowParams params{floats + row * kNumFloats, row_ints, nullptr, nullptr, nullptr, 0};
    if (row_ints[kCountRow] >= 0) params.counts = counts + row_ints[kCountRow] * vocab_size_;
    if (bias_start != nullptr) {
      params.bias_ids = bias_ids + bias_start[row];
      params.bias_values = bias_values + bias_start[row];
      params.num_biases = bias_start[row + 1] - bias_start[row];
    }
    token_ids[row] = sample_row(logits + row * vocab_size_, vocab_size_, params, isa, threads, workspace);
  });
}

template void Sampling::draw(Team&, const float*, int64_t, int64_t*) const;
template void Sampling::draw(Team&, const BFloat16*, int64_t, int64_t*) const;

namespace {

template <class T>
void score_rows(const Tensor& logits, const Tensor& targets, int64_t num_logprobs, Team& team, const Scores& out) {
  const Isa isa = cpu_isa();
  const int64_t vocab_size = logits.size(1);
  const T* all_logits = data<T>(logits);
  const auto* target = data<int64_t>(targets);
  auto* logprobs = mutable_data<float>(std::get<0>(out));
  auto* ranks = mutable_data<int64_t>(std::get<1>(out));
  auto* top_ids = mutable_data<int64_t>(std::get<2>(out));
  auto* top_logprobs = mutable_data<float>(std::get<3>(out));
  for_each_row(logits.size(0), team, [&](int64_t row, const Threads& threads, Workspace& workspace) {
    const ScoreOutput score =
        score_row(all_logits + row * vocab_size, vocab_size, target[row], num_logprobs, isa, threads, workspace,
                  top_ids + row * num_logprobs, top_logprobs + row * num_logprobs);
    logprobs[row] = score.logprob;
    ranks[row] = score.rank;
  });
}

}  // namespace

Scores score(Team& team, const Tensor& logits, const Tensor& targets, int64_t num_logprobs) {
  const Tensor x = checked_logits(logits);
  const int64_t num_rows = x.size(0);
  const int64_t vocab_size = x.size(1);
  const Tensor ids = checked("targets", targets, ScalarType::Long, {num_rows});
  check(num_logprobs >= 0 && num_logprobs <= vocab_size, "num_logprobs is ", num_logprobs, "; it is in [0, ",
        vocab_size, "] (the vocabulary)");
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t id = data<int64_t>(ids)[row];
    check(id >= -1 && id < vocab_size, "targets[", row, "] is ", id, "; a target is in [0, ", vocab_size,
          "), or -1 for none");
  }
  Scores out{torch::stable::empty({num_rows}, ScalarType::Float), torch::stable::empty({num_rows}, ScalarType::Long),
             torch::stable::empty({num_rows, num_logprobs}, ScalarType::Long),
             torch::stable::empty({num_rows, num_logprobs}, ScalarType::Float)};
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? score_rows<BFloat16> : score_rows<float>;
  run(x, ids, num_logprobs, team, out);
  return out;
}

namespace {

Tensor sample_op(const Tensor& team, const Tensor& logits, const Tensor& floats, const Tensor& ints,
                 const std::optional<Tensor>& token_counts, const std::optional<Tensor>& bias_start,
                 const std::optional<Tensor>& bias_ids, const std::optional<Tensor>& bias_values) {
  const Tensor x = checked_logits(logits);
  const Sampling sampling(x.size(0), x.size(1), floats, ints, token_counts, bias_start, bias_ids, bias_values);
  Tensor token_ids = torch::stable::empty({x.size(0)}, ScalarType::Long);
  Team& lanes = owned<Team>("team", team);
  auto* drawn = mutable_data<int64_t>(token_ids);
  if (x.scalar_type() == ScalarType::BFloat16) {
    sampling.draw(lanes, data<BFloat16>(x), 0, drawn);
  } else {
    sampling.draw(lanes, data<float>(x), 0, drawn);
  }
  return token_ids;
}

Scores score_op(const Tensor& team, const Tensor& logits, const Tensor& targets, int64_t num_logprobs) {
  return score(owned<Team>("team", team), logits, targets, num_logprobs);
}

std::string cpu_isa_name() { return isa_name(cpu_isa()); }

Tensor make_team(int64_t num_threads) {
  check(num_threads >= 1 && num_threads <= kMaxLanes, "num_threads is ", num_threads, "; it is in [1, ", kMaxLanes,
        "]");
  return own(std::make_unique<Team>(static_cast<int>(num_threads)));
}

STABLE_TORCH_LIBRARY(inferneo, m) {
  m.def(
      "sample(Tensor team, Tensor logits, Tensor floats, Tensor ints, Tensor? token_counts, Tensor? bias_start, "
      "Tensor? bias_ids, Tensor? bias_values) -> Tensor");
  m.def("score(Tensor team, Tensor logits, Tensor targets, int num_logprobs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_isa() -> str");
  m.def("make_team(int num_threads) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(inferneo, CPU, m) {
  m.impl("sample", TORCH_BOX(&sample_op));
  m.impl("score", TORCH_BOX(&score_op));
}

STABLE_TORCH_LIBRARY_IMPL(inferneo, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa_name));
  m.impl("make_team", TORCH_BOX(&make_team));
}

}  // namespace
}  // namespace inferneo

// Importing inferneo_core._C only loads this library, which registers the operators.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
