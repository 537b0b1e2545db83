// Runs the team, attention and a step of rows without torch, for the sanitizers: tests/ops/test_cpu_native.py builds it
// with ASan and UBSan, then with TSan, and runs it once an instruction set; tests/ops/test_cpu_aarch64.py runs it on
// another processor. Every array has exactly the size it is said to have, so that one element too far is an error.
#include "attention.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "step.h"
#include "test_numbers.h"

namespace inferneo {
namespace {

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

void check_team(int lanes) {
  Team team(lanes);
  std::vector<int64_t> counts(lanes, 0);
  for (int task = 0; task < 50; ++task) {
    team.run([&](Lane lane) {
      for (int round = 0; round < 20; ++round) {
        ++counts[lane.index];
        team.barrier(lane);
        for (const int64_t count : counts) expect(count == task * 20 + round + 1, "a barrier waits for every lane");
        team.barrier(lane);
      }
    });
  }
  const Threads threads = team.threads();
  std::atomic<int> calls{0};
  run_lanes(threads, threads.count, [&](int) { ++calls; });
  expect(calls == lanes, "run_lanes reaches every lane");
}

void check_share_out(int lanes) {
  Team team(lanes);
  for (const int64_t count : {0, 1, 3, 64}) {
    std::vector<int> times(count, 0);
    team.run([&](Lane lane) {
      for (int round = 1; round <= 50; ++round) {
        team.share_out(count, lane, [&](Share items) {
          expect(items.begin < items.end, "no run is empty");
          for (int64_t i = items.begin; i < items.end; ++i) ++times[i];
        });
        team.barrier(lane);
        for (const int n : times) expect(n == round, "each item falls to one lane, once");
        team.barrier(lane);
      }
    });
  }
  std::atomic<int64_t> num_done{0};
  constexpr int64_t kCount = 24;
  team.run([&](Lane lane) {
    team.share_out(kCount, lane, [&](Share items) {
      const int64_t num_items = items.end - items.begin;
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
      while (items.begin == 0 && num_done < kCount - num_items) {
        std::this_thread::yield();
        expect(std::chrono::steady_clock::now() < deadline, "others do what a lane that is held up has left");
      }
      num_done += num_items;
    });
  });
  expect(num_done == kCount, "every item is done");
}

void check_rows_step() {
  const std::vector<int32_t> starts{0, 5, 6, 46}, seq_lens{5, 9, 40}, tables{0, 1, 2, 3, 4, 5};
  StepInput step = {};
  step.sequences = {starts.data(), seq_lens.data(), tables.data(), 3, 2};
  step.num_tokens = 46;
  const auto takes = [&](const std::vector<int64_t>& rows, RowsStep& rest) {
    step.rows = rows.data();
    step.num_rows = static_cast<int64_t>(rows.size());
    return rest.take(step);
  };
  RowsStep rest;
  for (const std::vector<int64_t>& rows : {std::vector<int64_t>{3}, {0, 4}, {2, 45}, {45, 4}, {4, 4}, {4, 6}}) {
    expect(!takes(rows, rest), "only sequences' last tokens, in order, are a step of their own");
  }
  expect(takes({}, rest) && rest.step().num_tokens == 0, "there may be none");
  expect(takes({4, 45}, rest), "some sequences' last tokens are a step of their own");
  const StepInput& two = rest.step();
  expect(two.num_tokens == 2 && two.num_rows == 2 && two.rows[1] == 1 && two.sequences.num_seqs == 2, "of two tokens");
  expect(two.sequences.query_start_loc[2] == 2 && two.sequences.seq_lens[1] == 40, "each its sequence's only one");
  expect(two.sequences.block_tables[2] == 4 && two.sequences.block_tables[3] == 5, "with its blocks");
}

struct Case {
  std::vector<int32_t> query_lens, seq_lens;
  int64_t num_heads, num_kv_heads, head_dim, block_size;
};

std::vector<float> attend(const Case& c, CacheType type, int lanes) {
  std::mt19937 random(7);
  const auto num_seqs = static_cast<int64_t>(c.seq_lens.size());
  int64_t max_blocks = 0, num_tokens = 0;
  std::vector<int32_t> starts{0};
  for (int64_t i = 0; i < num_seqs; ++i) {
    max_blocks = std::max<int64_t>(max_blocks, (c.seq_lens[i] + c.block_size - 1) / c.block_size);
    num_tokens += c.query_lens[i];
    starts.push_back(static_cast<int32_t>(num_tokens));
  }
  std::vector<int32_t> tables(num_seqs * max_blocks);
  for (size_t i = 0; i < tables.size(); ++i) tables[i] = static_cast<int32_t>(tables.size() - 1 - i);
  const int64_t row_bytes = cache_row_bytes(type, c.head_dim);
  const int64_t block_bytes = c.num_kv_heads * c.block_size * row_bytes;
  const int64_t bytes = num_seqs * max_blocks * block_bytes;
  const auto k = std::make_unique<std::byte[]>(bytes), v = std::make_unique<std::byte[]>(bytes);
  const RowKernels& kernels = row_kernels(cpu_isa());
  for (std::byte* side : {k.get(), v.get()}) {
    std::vector<float> row(c.head_dim);
    for (int64_t offset = 0; offset < bytes; offset += row_bytes) {
      for (float& x : row) x = draw_number(random);
      kernels.store[static_cast<int>(type)](row.data(), c.head_dim, side + offset);
    }
  }
  std::vector<float> q(num_tokens * c.num_heads * c.head_dim), out(q.size(), NAN);
  for (float& x : q) x = draw_number(random);

  const CacheView cache{k.get(),        v.get(),      type,       num_seqs * max_blocks,
                        c.num_kv_heads, c.block_size, c.head_dim, block_bytes};
  const SequenceViews sequences{starts.data(), c.seq_lens.data(), tables.data(), num_seqs, max_blocks};
  std::vector<float> parts(part_floats(sequences, c.num_heads, c.num_kv_heads, c.head_dim));
  std::atomic<int64_t> ticket{0};
  const AttentionTask task{kernels, q.data(), out.data(), c.num_heads, cache, sequences, parts.data(), ticket};
  Team team(lanes);
  std::vector<std::vector<float>> scratch(lanes, std::vector<float>(attend_scratch(cache)));
  team.run([&](Lane lane) {
    attend_items(task, scratch[lane.index].data());
    team.barrier(lane);
    merge_parts(task, lane);
  });
  for (const float x : out) expect(std::isfinite(x), "every output is written");
  return out;
}

int run() {
  for (const int lanes : {1, 2, 5}) {
    check_team(lanes);
    check_share_out(lanes);
  }
  check_rows_step();
  const Case cases[] = {
      {{1, 1, 70, 3}, {1, 600, 300, 257}, 9, 3, 64, 16},
      {{1, 5}, {256, 512}, 6, 2, 14, 5},
      {{2, 1}, {300, 40}, 50, 1, 8, 1},
      {{1, 9}, {515, 70}, 4, 2, 40, 32},
  };
  Checksum checksum;
  for (const Case& c : cases) {
    for (const CacheType type : {CacheType::kFP32, CacheType::kBF16, CacheType::kFP16, CacheType::kInt8}) {
      const std::vector<float> out = attend(c, type, 1);
      expect(out == attend(c, type, 3), "the bits do not depend on the lanes");
      checksum.add(out.data(), out.size());
    }
  }
  std::puts(isa_name(cpu_isa()));
  checksum.print();
  return 0;
}

}  // namespace
}  // namespace inferneo

int main() { return inferneo::run(); }
