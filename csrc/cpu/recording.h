// A tape with what its pointers point to and the limits of what it can be handed: what the operators tape_* work on.
#pragma once

#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "../owned.h"
#include "tape.h"

namespace inferneo {

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

struct WholeStep;  // step_ops.cpp

struct Recording {
  static constexpr uint64_t kMagic = 0x65706174'6e726669;

  Tape tape;
  std::vector<Tensor> tensors;  // keep the tape's pointers valid
  // What every node of the tape can take.
  int64_t vocab_size = kNoLimit, max_model_len = kNoLimit, num_blocks = kNoLimit, block_size = 0;
  // What its nodes read of a step.
  bool reads_ids = false, reads_positions = false, reads_sequences = false, reads_rows = false;
  std::optional<Tensor> logits;          // of the last step; the next one of as many rows writes over them
  std::shared_ptr<WholeStep> last_step;  // what tape_again runs
  int64_t sampler_ns = 0;                // since tape_times was last asked
};

inline Recording& recording(const Tensor& tape) { return owned<Recording>("tape", tape); }

}  // namespace inferneo
