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

// Some rows of one KV head of one sequence, against one chunk of keys or against all of them.
struct Work {
  Plan plan;
  int64_t seq, kv_head, begin, count;  // rows [begin, begin + count)
  int64_t chunk;                       // of keys, or -1: all chunks, one after the other
  float* part;                         // where the part of one chunk goes

  int64_t first_chunk() const { return chunk < 0 ? 0 : chunk; }
  // How many keys of the sequence the last of the rows sees, of `group` rows to a token.
  int64_t num_visible(int64_t group) const { return plan.seq_len - plan.query_len + (begin + count - 1) / group + 1; }
};

// f(r, the keys it sees, where its query and output begin) for each row of a work, r from 0 on.
template <class F>
void for_rows(const AttentionTask& task, const Work& work, F f) {
  const int64_t group = task.num_heads / task.cache.num_kv_heads, first_head = work.kv_head * group;
  const int64_t first_token = task.sequences.query_start_loc[work.seq];
  const int64_t num_before = work.plan.seq_len - work.plan.query_len;
  int64_t token = work.begin / group, head = work.begin % group;
  for (int64_t r = 0; r < work.count; ++r) {
    f(r, num_before + token + 1, ((first_token + token) * task.num_heads + first_head + head) * task.cache.head_dim);
    if (++head == group) head = 0, ++token;
  }
}

// The granules of `count` keys or values of a work's sequence, from position `first` on, a multiple of kGranule; `side`
// is the cache's k or v. Blocks that are no whole granules are put together in `copies`, if that is not null.
void find(const AttentionTask& task, const Work& work, const std::byte* side, int64_t first, int64_t count,
          std::byte* copies, const void** granules) {
  const CacheView& cache = task.cache;
  const int32_t* const table = task.sequences.block_tables + work.seq * task.sequences.max_blocks;
  const auto row = [&](int64_t position) {
    return side + cache.offset(table[position / cache.block_size], work.kv_head, position % cache.block_size);
  };
  if (cache.block_size % kGranule == 0 || copies == nullptr) {
    for (int64_t i = 0; i < count; i += kGranule) *granules++ = row(first + i);
    return;
  }
  const int64_t row_bytes = cache.row_bytes();
  for (int64_t i = 0; i < count; ++i) {
    if (i % kGranule == 0) *granules++ = copies + i * row_bytes;
    std::memcpy(copies + i * row_bytes, row(first + i), row_bytes);
  }
}

// Floats of scratch memory for everything but copies.
int64_t attend_floats(int64_t head_dim) {
  return attention_scratch(head_dim) + kRowTile * (head_dim + padded_dim(head_dim));
}

// Bytes of a chunk's keys and values, if they have to be copied.
int64_t copy_bytes(const CacheView& cache) {
  return cache.block_size % kGranule == 0 ? 0 : 2 * kKeyChunk * cache.row_bytes();
}

AttentionState part_state(float* part, int64_t num_rows, int64_t head_dim) {
  return {part, part + num_rows, part + 2 * num_rows, padded_dim(head_dim)};
}

class Item {
 public:
  // next: what the lane does afterwards, or null.
  Item(const AttentionTask& task, const Work& work, const Work* next, float* scratch)
      : task_(task), work_(work), next_(next), group_(task.num_heads / task.cache.num_kv_heads), scratch_(scratch) {
    const int64_t head_dim = task.cache.head_dim;
    queries_ = scratch + attention_scratch(head_dim);
    copies_ = reinterpret_cast<std::byte*>(scratch + attend_floats(head_dim));
    num_visible_ = work.num_visible(group_);
    for_rows(task, work, [&](int64_t r, int64_t visible, int64_t offset) {
      visible_[r] = visible;
      rows_[r] = offset;
    });
  }

  // One chunk, to the work's part.
  void run_part() const {
    const int64_t head_dim = task_.cache.head_dim;
    run_chunk(work_.chunk, true, false, part_state(work_.part, work_.count, head_dim));
  }

  // All chunks, one after the other, to the output.
  void run() const {
    float largest[kRowTile], sum[kRowTile];
    const int64_t head_dim = task_.cache.head_dim;
    const AttentionState state{largest, sum, queries_ + kRowTile * head_dim, padded_dim(head_dim)};
    const int64_t num_chunks = ceil_div(num_visible_, kKeyChunk);
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      run_chunk(chunk, chunk == 0, chunk + 1 == num_chunks, state);
    }
  }

 private:
  void run_chunk(int64_t chunk, bool is_first, bool is_last, const AttentionState& state) const {
    const int64_t first = chunk * kKeyChunk;
    const int64_t num_keys = std::min(num_visible_ - first, kKeyChunk);
    const int64_t num = num_granules(num_keys);
    const void* granules[2 * (kKeyChunk / kGranule) + kAhead];
    find(task_, work_, task_.cache.k, first, num_keys, copies_, granules);
    find(task_, work_, task_.cache.v, first, num_keys, copies_ + copy_bytes(task_.cache) / 2, granules + num);
    find_next(first + kKeyChunk, granules + 2 * num);
    int64_t row_keys[kRowTile];
    for (int64_t r = 0; r < work_.count; ++r) row_keys[r] = std::clamp<int64_t>(visible_[r] - first, 0, num_keys);
    const AttentionTile tile{granules,
                             num_keys,
                             work_.count,
                             task_.cache.head_dim,
                             row_keys,
                             queries_,
                             rows_,
                             is_first ? task_.q : nullptr,
                             is_last ? task_.out : nullptr};
    task_.kernels.attend[static_cast<int>(task_.cache.type)](tile, state, scratch_);
  }

  // The kAhead granules that come after this chunk, the last one repeated: position `first` of this sequence if its
  // next chunk is this item's, too, otherwise the next item's first.
  void find_next(int64_t first, const void** granules) const {
    const Work* const work = work_.chunk < 0 && first < num_visible_ ? &work_ : next_;
    int64_t count = 0;
    if (work != nullptr) {
      if (work == next_) first = work->first_chunk() * kKeyChunk;
      const int64_t num_keys = work->num_visible(group_) - first;
      count = std::min(num_granules(num_keys), kAhead);
      find(task_, *work, task_.cache.k, first, count * kGranule, nullptr, granules);
    }
    std::fill(granules + count, granules + kAhead, granules[count - 1]);  // granules[-1] is this chunk's last
  }

  const AttentionTask& task_;
  const Work& work_;
  const Work* next_;
  const int64_t group_;
  float* scratch_;
  float* queries_;
  std::byte* copies_;
  int64_t num_visible_;
  int64_t visible_[kRowTile], rows_[kRowTile];
};

// A lane's walk through the items of a task: each item falls to one lane.
class Items {
 public:
  explicit Items(const AttentionTask& task) : task_(task) {}

  // Returns false if none is left.
  bool take(Work& work) {
    const int64_t item = task_.ticket++;
    while (item >= end_) {  // items ascend, so each lane walks the sequences once
      if (++seq_ == task_.sequences.num_seqs) return false;
      part_start_ += plan_.part_floats;
      plan_ = plan(task_, seq_);
      end_ += plan_.num_items;
    }
    const int64_t num_kv_heads = task_.cache.num_kv_heads, index = item - (end_ - plan_.num_items);
    const int64_t kv_head = index % num_kv_heads;  // neighbours in a block of the cache
    if (plan_.in_chunks) {
      const int64_t chunk = index / num_kv_heads, part = kv_head * plan_.num_chunks + chunk;
      float* const place = task_.parts + part_start_ + part * floats_of_part(plan_.num_rows, task_.cache.head_dim);
      work = {plan_, seq_, kv_head, 0, plan_.num_rows, chunk, place};
    } else {
      const int64_t begin = (plan_.num_tiles - 1 - index / num_kv_heads) * kRowTile;  // the longest first
      work = {plan_, seq_, kv_head, begin, std::min(kRowTile, plan_.num_rows - begin), -1, nullptr};
    }
    return true;
  }

 private:
  const AttentionTask& task_;
  int64_t seq_ = -1, end_ = 0, part_start_ = 0;
  Plan plan_{};
};

}  // namespace

int64_t part_floats(const SequenceViews& sequences, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim) {
  int64_t total = 0;
  for (int64_t seq = 0; seq < sequences.num_seqs; ++seq) {
    total += plan(sequences, seq, num_heads, num_kv_heads, head_dim).part_floats;
  }
  return total;
}

int64_t attend_scratch(const CacheView& cache) {
  return attend_floats(cache.head_dim) + copy_bytes(cache) / static_cast<int64_t>(sizeof(float));
}

void attend_items(const AttentionTask& task, float* scratch) {
  Items items(task);
  Work work{}, next{};
  for (bool is_work = items.take(work); is_work; work = next) {  // the next is known early: its keys are on their way
    is_work = items.take(next);
    const Item item(task, work, is_work ? &next : nullptr, scratch);
    if (work.chunk < 0) {
      item.run();
    } else {
      item.run_part();
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
