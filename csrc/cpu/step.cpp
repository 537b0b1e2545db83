#include "step.h"

#include <numeric>

namespace inferneo {

bool RowsStep::take(const StepInput& step) {
  const SequenceViews& from = step.sequences;
  if (step.num_rows == step.num_tokens || from.query_start_loc == nullptr) return false;
  seq_lens_.clear();
  block_tables_.clear();
  int64_t seq = 0;
  for (int64_t i = 0; i < step.num_rows; ++i, ++seq) {
    while (seq < from.num_seqs && from.query_start_loc[seq + 1] <= step.rows[i]) ++seq;
    if (seq == from.num_seqs || from.query_start_loc[seq + 1] - 1 != step.rows[i]) return false;
    const int32_t* table = from.block_tables + seq * from.max_blocks;
    seq_lens_.push_back(from.seq_lens[seq]);
    block_tables_.insert(block_tables_.end(), table, table + from.max_blocks);
  }
  rows_.resize(step.num_rows);
  starts_.resize(step.num_rows + 1);
  std::iota(rows_.begin(), rows_.end(), 0);
  std::iota(starts_.begin(), starts_.end(), 0);
  step_ = {};
  step_.rows = rows_.data();
  step_.sequences = {starts_.data(), seq_lens_.data(), block_tables_.data(), step.num_rows, from.max_blocks};
  step_.num_tokens = step_.num_rows = step.num_rows;
  return true;
}

}  // namespace inferneo
