// The sampler over tensors, for the operators that end in it.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/team.h"
#include "tensor_args.h"

namespace inferneo {

// The tensors of a SamplingBatch. Their types and shapes are checked once, "ShapeError: ..." if they disagree; what
// they hold, at each draw.
class Sampling {
 public:
  Sampling(int64_t num_seqs, int64_t vocab_size, const Tensor& floats, const Tensor& ints,
           const std::optional<Tensor>& token_counts, const std::optional<Tensor>& bias_start,
           const std::optional<Tensor>& bias_ids, const std::optional<Tensor>& bias_values);

  // Draws into token_ids, [num_seqs], from logits [num_seqs, vocab_size]: each sequence's token at `ahead` places after
  // the one that the batch names.
  template <class T>
  void draw(Team& team, const T* logits, int64_t ahead, int64_t* token_ids) const;

 private:
  void check_values() const;

  int64_t num_seqs_, vocab_size_;
  Tensor floats_, ints_;
  std::optional<Tensor> counts_, bias_start_, bias_ids_, bias_values_;
};

using Scores = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // logprobs, ranks, top_ids, top_logprobs

Scores score(Team& team, const Tensor& logits, const Tensor& targets, int64_t num_logprobs);

}  // namespace inferneo
