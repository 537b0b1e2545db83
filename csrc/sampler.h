// One row of the sampler: from logits to a token, and from logits to log-probabilities.
//
// The semantics are those of inferneo_core/ops/torch_sampling.py, bit for bit. What is faster here: no sort. Block
// maxima bound the tokens that a filter can keep; those few candidates are cut by radix selection; the draw sees only
// them.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"
#include "passes.h"

namespace inferneo {

// The columns of SamplingBatch.floats and .ints; inferneo_core/batch.py holds the same numbers.
enum FloatColumn { kInvTemperature, kTopP, kMinP, kTypicalP, kRepetition, kPresence, kFrequency, kNumFloats };
enum IntColumn { kTopK, kSeed, kPosition, kChoice, kCountRow, kNumInts };

struct RowParams {
  const float* floats;    // [kNumFloats]
  const int64_t* ints;    // [kNumInts]
  const int32_t* counts;  // [vocab_size], or null
  const int32_t* bias_ids;
  const float* bias_values;
  int64_t num_biases;
};

// Scratch memory of one thread, kept between calls so that a warm call allocates nothing.
struct Workspace {
  std::vector<float> adjusted;
  std::vector<int32_t> maxima;
  std::vector<TokenKey> tokens;
  std::vector<int64_t> weights;
  std::vector<uint64_t> order;
};

// The chosen token, or -1 if a logit is NaN or no token is allowed.
template <class T>
int64_t sample_row(const T* logits, int64_t vocab_size, const RowParams& params, Isa isa, const Threads& threads,
                   Workspace& workspace);

struct ScoreOutput {
  float logprob;
  int64_t rank;
};

// Log-probability and rank of `target` (-1: none), and the num_top most likely tokens, most likely first.
template <class T>
ScoreOutput score_row(const T* logits, int64_t vocab_size, int64_t target, int64_t num_top, Isa isa,
                      const Threads& threads, Workspace& workspace, int64_t* top_ids, float* top_logprobs);

}  // namespace inferneo
