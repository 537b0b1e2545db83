// Causal grouped-query attention of one step over the paged cache, shared among lanes.
//
// A sequence whose query rows fit one tile (every decode) is cut into chunks of keys, so that a long context occupies
// all lanes; the chunks' parts are merged afterwards. A longer query is cut into tiles of rows that each go through the
// chunks in turn. Both merge the same parts in the same order, so the bits do not tell which it was.
//
// Blocks of a multiple of 16 tokens are read where they lie; of other blocks, a chunk is put together first.
#pragma once

#include <atomic>
#include <cstdint>

#include "row_kernels.h"
#include "team.h"

namespace inferneo {

// One layer of the paged cache: k and v are [num_blocks, num_kv_heads, block_size] rows, dense within a block.
struct CacheView {
  std::byte* k;
  std::byte* v;
  CacheType type;
  int64_t num_blocks, num_kv_heads, block_size, head_dim;
  int64_t block_stride;  // bytes from block to block

  int64_t row_bytes() const { return cache_row_bytes(type, head_dim); }

  // Bytes from the start of k or v to a slot of one head.
  int64_t offset(int64_t block, int64_t head, int64_t place) const {
    return block * block_stride + (head * block_size + place) * row_bytes();
  }
};

// The sequences of a step; the fields of AttentionMetadata in inferneo_core/batch.py.
struct SequenceViews {
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const int32_t* block_tables;
  int64_t num_seqs, max_blocks;
};

struct AttentionTask {
  const RowKernels& kernels;
  const float* q;  // [num_tokens, num_heads, head_dim]
  float* out;      // the same
  int64_t num_heads;
  CacheView cache;
  SequenceViews sequences;
  float* parts;                  // part_floats() floats
  std::atomic<int64_t>& ticket;  // 0 before the first lane begins: the next item of work
};

// Floats that the parts of sequences in chunks take; 0: none is, and merge_parts has nothing to do.
int64_t part_floats(const SequenceViews& sequences, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim);

// Floats of scratch memory a lane needs, 64-byte aligned.
int64_t attend_scratch(const CacheView& cache);

// A lane's share of the work; when all lanes are done the parts are there.
void attend_items(const AttentionTask& task, float* scratch);

// A lane's share of merging them.
void merge_parts(const AttentionTask& task, Lane lane);

}  // namespace inferneo
