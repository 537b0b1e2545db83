// Sharing work among threads, whoever owns them: an engine's team in the extension, std::thread in the C++ tests.
#pragma once

#include <cstdint>

namespace inferneo {

// Calls task(context, lane) once for every lane in [0, lanes), on as many threads as there are.
using RunLanes = void (*)(void* pool, int lanes, void (*task)(void* context, int lane), void* context);

struct Threads {
  int count;
  RunLanes run;
  void* pool;  // whatever `run` works with
};

constexpr int kMaxLanes = 256;
constexpr int64_t kMinBlocksALane = 256;  // 16,384 tokens, some 2 us of work: what waking a thread costs

template <class F>
void run_lanes(const Threads& threads, int lanes, F&& f) {
  threads.run(threads.pool, lanes, [](void* context, int lane) { (*static_cast<F*>(context))(lane); }, &f);
}

// combine(f(begin, end), ...) over shares of [0, blocks). The operations combined are exact and commutative (integer
// sums, maxima), so the result does not depend on the number of threads.
template <class R, class F, class Combine>
R reduce_blocks(const Threads& threads, int64_t blocks, F&& f, Combine&& combine) {
  const int64_t wanted = blocks / kMinBlocksALane;
  const int64_t most = threads.count < kMaxLanes ? threads.count : kMaxLanes;
  const int lanes = static_cast<int>(wanted < most ? wanted : most);
  if (lanes <= 1) return f(int64_t{0}, blocks);
  R results[kMaxLanes];
  run_lanes(threads, lanes, [&](int lane) { results[lane] = f(blocks * lane / lanes, blocks * (lane + 1) / lanes); });
  R result = results[0];
  for (int lane = 1; lane < lanes; ++lane) result = combine(result, results[lane]);
  return result;
}

}  // namespace inferneo
