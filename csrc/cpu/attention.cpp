#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace inferneo {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded_dim(int64_t head_dim) { return ceil_div(head_dim, 16) * 16; }

// How one sequence's attention is cut into items.
struct Plan {
  int64_t query_len, seq_len, num_rows, num_tiles, num_chunks;  // rows, tiles: of one KV head
  bool in_chunks;
  int64_t num_items;
  int64_t part_floats;  // of the whole sequence
};

// A part: [num_rows] largest, [num_rows] sum, [num_rows, padded_dim] values.
int64_t floats_of_part(int64_t num_rows, int64_t head_dim) { return num_rows * (2 + padded_dim(head_dim)); }

Plan plan(const SequenceViews& sequences, int64_t seq, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim) {
  Plan p{};
  p.query_len = sequences.query_start_loc[seq + 1] - sequences.query_start_loc[seq];
  p.seq_len = sequences.seq_lens[seq];
  p.num_rows = p.query_len * (num_heads / num_kv_heads);
  p.num_tiles = ceil_div(p.num_rows, kRowTile);
  p.num_chunks = ceil_div(p.seq_len, kKeyChunk);
  p.in_chunks = p.num_tiles == 1 && p.num_chunks > 1;
  p.num_items = num_kv_heads * (p.in_chunks ? p.num_chunks : p.num_tiles);
  p.part_floats = p.in_chunks ? p.num_items * floats_of_part(p.num_rows, head_dim) : 0;
  return p;
}

Plan plan(const AttentionTask& task, int64_t seq) {
  return plan(task.sequences, seq, task.num_heads, task.cache.num_kv_heads, task.cache.head_dim);
}

// Some rows of one KV head of one sequence.
struct Rows {
  int64_t seq, kv_head, begin, count;
};

class Item {
 public:
  Item(const AttentionTask& task, const Plan& plan, const Rows& rows, float* scratch)
      : task_(task), plan_(plan), rows_(rows), group_(task.num_heads / task.cache.num_kv_heads), scratch_(scratch) {
    const int64_t head_dim = task.cache.head_dim;
    queries_ = scratch + attention_scratch(head_dim);
    const float factor = 1.0f / std::sqrt(static_cast<float>(head_dim));
    for (int64_t r = 0; r < rows.count; ++r) {
      task.kernels.scale(task.q + row_offset(rows.begin + r), factor, head_dim, queries_ + r * head_dim);
    }
  }

  // state = the part of one chunk. Returns the rows it begins with that see none of it.
  int64_t run_chunk(int64_t chunk, const AttentionState& state) const {
    const int64_t first = chunk * kKeyChunk;
    const int64_t num_visible = visible(rows_.begin + rows_.count - 1);
    const int64_t num_keys = std::min(num_visible - first, kKeyChunk);
    const int64_t num_next = std::clamp<int64_t>(num_visible - first - kKeyChunk, 0, kKeyTile);
    const void* keys[kKeyChunk + kKeyTile];  // and the first ones of the next chunk
    const void* values[kKeyChunk];
    int64_t row_keys[kRowTile];
    find(task_.cache.k, first, num_keys + num_next, keys);
    find(task_.cache.v, first, num_keys, values);
    int64_t blind = 0;
    for (int64_t r = 0; r < rows_.count; ++r) {
      row_keys[r] = std::clamp<int64_t>(visible(rows_.begin + r) - first, 0, num_keys);
      blind += row_keys[r] == 0;
    }
    const AttentionTile tile{keys,     values,  keys + num_keys, num_keys, num_next, rows_.count, task_.cache.head_dim,
                             queries_, row_keys};
    task_.kernels.attend[static_cast<int>(task_.cache.type)](tile, state, scratch_);
    return blind;
  }

  // All chunks, one after the other, to the output.
  void run() const {
    const int64_t head_dim = task_.cache.head_dim, stride = padded_dim(head_dim);
    float largest[kRowTile], sum[kRowTile], part_largest[kRowTile], part_sum[kRowTile];
    float* const values = queries_ + kRowTile * head_dim;
    const AttentionState whole{largest, sum, values, stride};
    const AttentionState part{part_largest, part_sum, values + kRowTile * stride, stride};
    const int64_t num_chunks = ceil_div(visible(rows_.begin + rows_.count - 1), kKeyChunk);
    run_chunk(0, whole);
    for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
      for (int64_t r = run_chunk(chunk, part); r < rows_.count; ++r) {
        task_.kernels.merge(largest[r], sum[r], values + r * stride, part_largest[r], part_sum[r],
                            part.values + r * stride, head_dim);
      }
    }
    for (int64_t r = 0; r < rows_.count; ++r) {
      task_.kernels.scale(values + r * stride, 1.0f / sum[r], head_dim, task_.out + row_offset(rows_.begin + r));
    }
  }

  // Where a row's query and output begin.
  int64_t row_offset(int64_t row) const {
    const int64_t token = task_.sequences.query_start_loc[rows_.seq] + row / group_;
    return (token * task_.num_heads + rows_.kv_head * group_ + row % group_) * task_.cache.head_dim;
  }

 private:
  // How many keys of the sequence a row sees.
  int64_t visible(int64_t row) const { return plan_.seq_len - plan_.query_len + row / group_ + 1; }

  // Where the keys or values of some positions lie; `side` is the cache's k or v.
  void find(const std::byte* side, int64_t first, int64_t count, const void** rows) const {
    const CacheView& cache = task_.cache;
    const int32_t* const table = task_.sequences.block_tables + rows_.seq * task_.sequences.max_blocks;
    const int64_t row_bytes = cache.head_dim * cache_type_bytes(cache.type);
    int64_t index = first / cache.block_size, place = first % cache.block_size;
    for (int64_t i = 0; i < count; ++index, place = 0) {
      const std::byte* row = side + cache.offset(table[index], rows_.kv_head, place);
      for (; place < cache.block_size && i < count; ++place, row += row_bytes) rows[i++] = row;
    }
  }

  const AttentionTask& task_;
  const Plan& plan_;
  const Rows rows_;
  const int64_t group_;
  float* scratch_;
  float* queries_;
};

AttentionState part_state(float* part, int64_t num_rows, int64_t head_dim) {
  return {part, part + num_rows, part + 2 * num_rows, padded_dim(head_dim)};
}

}  // namespace

int64_t part_floats(const SequenceViews& sequences, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim) {
  int64_t total = 0;
  for (int64_t seq = 0; seq < sequences.num_seqs; ++seq) {
    total += plan(sequences, seq, num_heads, num_kv_heads, head_dim).part_floats;
  }
  return total;
}

int64_t attend_scratch(int64_t head_dim) {
  return attention_scratch(head_dim) + kRowTile * (head_dim + 2 * padded_dim(head_dim));
}

void attend_items(const AttentionTask& task, float* scratch) {
  int64_t seq = -1, next_first = 0, part_start = 0;
  Plan p{};
  for (int64_t item = task.ticket++;; item = task.ticket++) {
    while (item >= next_first) {  // items ascend, so each lane walks the sequences once
      if (++seq == task.sequences.num_seqs) return;
      part_start += p.part_floats;
      p = plan(task, seq);
      next_first += p.num_items;
    }
    const int64_t index = item - (next_first - p.num_items);
    if (p.in_chunks) {
      const int64_t chunk = index % p.num_chunks;
      const Item work(task, p, {seq, index / p.num_chunks, 0, p.num_rows}, scratch);
      float* const part = task.parts + part_start + index * floats_of_part(p.num_rows, task.cache.head_dim);
      work.run_chunk(chunk, part_state(part, p.num_rows, task.cache.head_dim));
    } else {
      const int64_t tile = p.num_tiles - 1 - index / task.cache.num_kv_heads;  // the longest first
      const int64_t begin = tile * kRowTile;
      const Rows rows{seq, index % task.cache.num_kv_heads, begin, std::min(kRowTile, p.num_rows - begin)};
      Item(task, p, rows, scratch).run();
    }
  }
}

void merge_parts(const AttentionTask& task, Lane lane) {
  const int64_t head_dim = task.cache.head_dim;
  const int64_t group = task.num_heads / task.cache.num_kv_heads;
  float* part = task.parts;
  int64_t turn = 0;
  for (int64_t seq = 0; seq < task.sequences.num_seqs; ++seq) {
    const Plan p = plan(task, seq);
    if (!p.in_chunks) continue;
    for (int64_t kv_head = 0; kv_head < task.cache.num_kv_heads; ++kv_head) {
      const int64_t floats = floats_of_part(p.num_rows, head_dim);
      const AttentionState whole = part_state(part, p.num_rows, head_dim);
      for (int64_t r = 0; r < p.num_rows; ++r) {
        if (turn++ % lane.count != lane.index) continue;
        const int64_t num_keys = p.seq_len - p.query_len + r / group + 1;
        float* const values = whole.values + r * whole.stride;
        for (int64_t chunk = 1; chunk * kKeyChunk < num_keys; ++chunk) {
          const AttentionState later = part_state(part + chunk * floats, p.num_rows, head_dim);
          task.kernels.merge(whole.largest[r], whole.sum[r], values, later.largest[r], later.sum[r],
                             later.values + r * later.stride, head_dim);
        }
        const int64_t token = task.sequences.query_start_loc[seq] + r / group;
        const int64_t head = kv_head * group + r % group;
        task.kernels.scale(values, 1.0f / whole.sum[r], head_dim,
                           task.out + (token * task.num_heads + head) * head_dim);
      }
      part += p.num_chunks * floats;
    }
  }
}

}  // namespace inferneo
