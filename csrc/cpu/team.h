// A team of threads that runs one function at a time, all lanes side by side, with barriers in between.
//
// A decode step has some 150 barriers, a dozen microseconds apart, so lanes spin at them; and between steps too, for
// the next one is usually near. Whoever has spun in vain yields, and after some 1 ms sleeps: an idle team costs
// nothing, and a lane that has lost its core to another process gets that of a lane which waits for it. Two lanes that
// wake on one core while another is free are parted (StayHere, spread).
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../parallel.h"

namespace inferneo {

// One thread's place in a team. Work is split by (index, count); lane 0 is the caller.
struct Lane {
  int index;
  int count;
};

// The share [begin, end) of `total` things, in whole granules, that falls to a lane.
struct Share {
  int64_t begin, end;
};

inline Share share(int64_t total, int64_t granule, Lane lane) {
  const int64_t granules = (total + granule - 1) / granule;
  const int64_t end = granules * (lane.index + 1) / lane.count * granule;
  return {granules * lane.index / lane.count * granule, end < total ? end : total};
}

class Team {
 public:
  static constexpr uint64_t kMagic = 0x6d616574'6e726669;

  // Starts count - 1 workers, 1 <= count <= kMaxLanes; the thread that calls run is the other lane.
  explicit Team(int count);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int count() const { return count_; }

  // task(context, lane) once on every lane; returns when all have returned. One caller at a time: others wait.
  void run(void (*task)(void* context, Lane lane), void* context);

  template <class F>
  void run(F&& f) {
    run([](void* context, Lane lane) { (*static_cast<F*>(context))(lane); }, &f);
  }

  // Returns once every lane of the running task is here. What a lane wrote before is seen by all after.
  void barrier(Lane lane);

  // f(items) for runs of [0, count), each item once, on whichever lane: each goes through its own share, then through
  // what slower lanes have left of theirs. It takes half of what is left at a time, so that runs are long at first and
  // short at the end. At most once between two barriers.
  template <class F>
  void share_out(int64_t count, Lane lane, F f) {
    if (lane.count == 1) {
      if (count > 0) f(Share{0, count});
      return;
    }
    const int phase = phase_of(lane);
    for (int i = 0; i < lane.count; ++i) {
      const int owner = (lane.index + i) % lane.count;
      const Share whole = share(count, 1, {owner, lane.count});
      std::atomic<int64_t>& taken = taken_[owner].items[phase];
      int64_t begin = whole.begin + taken.load(std::memory_order_relaxed);
      while (begin < whole.end) {
        const int64_t half = (whole.end - begin + 1) / 2;
        begin = whole.begin + taken.fetch_add(half, std::memory_order_relaxed);
        const int64_t end = begin + half < whole.end ? begin + half : whole.end;
        if (begin < end) f(Share{begin, end});
        begin = end;
      }
    }
  }

  // The team as the sampler wants it; for the thread that may call run.
  Threads threads();

 private:
  // A counter that threads wait on: they spin, then yield, then sleep.
  struct alignas(128) Counter {  // 128: two lines, for the prefetcher takes them in pairs
    std::atomic<uint32_t> value{0};
    std::atomic<uint32_t> num_sleeping{0};
    std::atomic<int> cpu{-1};  // of a lane's own counter: where its last task found it

    void advance();
    bool await(uint32_t wanted);  // until value has come to it; returns whether the thread slept
  };

  // How much of a lane's share is taken, by anybody: in this phase between two barriers, and in the next.
  struct alignas(128) Taken {
    std::atomic<int64_t> items[2] = {};
  };
  int phase_of(Lane lane) const { return arrivals_[lane.index].value.load(std::memory_order_relaxed) % 2; }

  void start();
  void work(int index, uint32_t seen);
  // A worker that wakes on a lower lane's CPU goes to one that no lane has, if it may run there. Only then: while
  // another process holds a core, two lanes do better on the other one (a decode step 7.0 ms, else 11.9).
  void spread(int index);

  const int count_;
  std::unique_ptr<Counter[]> arrivals_;  // the barriers that each lane has come to
  std::unique_ptr<Taken[]> taken_;
  Counter tasks_;  // how many there were
  void (*task_)(void* context, Lane lane) = nullptr;
  void* context_ = nullptr;
  bool stopping_ = false;
  pid_t owner_ = 0;  // the process that the workers live in
  std::mutex turn_;
  std::vector<std::thread> workers_;
};

}  // namespace inferneo
