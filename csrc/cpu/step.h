// What a step hands to its tape.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace inferneo {

// The fields of ModelInput in inferneo_core/batch.py.
struct StepInput {
  const int64_t* token_ids;
  const int64_t* positions;
  const int64_t* slot_mapping;
  const int64_t* rows;
  SequenceViews sequences;
  int64_t num_tokens, num_rows;
};

// What is left of a step once all keys and values are in the cache: the rows alone.
class RowsStep {
 public:
  // The rows of `step`; false if nothing can be left out, for they are all of its tokens, or are not the last ones of
  // some of its sequences, in order.
  bool take(const StepInput& step);

  // One token a row, each a sequence's only one; its ids, positions and slots are not there. Valid until the next is
  // taken.
  const StepInput& step() const { return step_; }

 private:
  std::vector<int64_t> rows_;
  std::vector<int32_t> starts_, seq_lens_, block_tables_;
  StepInput step_ = {};
};

}  // namespace inferneo
