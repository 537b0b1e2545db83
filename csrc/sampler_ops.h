// The sampler over tensors, for the operators that end in it.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/team.h"
#include "tensor_args.h"

namespace inferneo {

// Draws into token_ids, int64 [num_seqs]; the other arguments are a SamplingBatch's. Throws std::runtime_error,
// "ShapeError: ...", if they disagree.
void sample(Team& team, const Tensor& logits, const Tensor& floats, const Tensor& ints,
            const std::optional<Tensor>& token_counts, const std::optional<Tensor>& bias_start,
            const std::optional<Tensor>& bias_ids, const std::optional<Tensor>& bias_values, const Tensor& token_ids);

using Scores = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // logprobs, ranks, top_ids, top_logprobs

Scores score(Team& team, const Tensor& logits, const Tensor& targets, int64_t num_logprobs);

}  // namespace inferneo
