#include "team.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

namespace inferneo {
namespace {

constexpr int kMostSpins = 1000;  // some 15 us: a barrier's wait while every lane has a core of its own
constexpr int kFewestSpins = 16;
constexpr int kYields = 2000;  // some 1 ms: longer than the host works between two steps, and open to others

// How often this thread spins before it offers its core to others: fewer times after each wait that was longer than
// that, more after each that was not. Two lanes on one core would else wait 15 us at every barrier for one another.
thread_local int patience = kMostSpins;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void sleep_while(std::atomic<uint32_t>& value, uint32_t old) {
#if defined(__linux__)
  syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
  value.wait(old);
#endif
}

void wake_all(std::atomic<uint32_t>& value) {
#if defined(__linux__)
  syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
  value.notify_all();
#endif
}

int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Keeps the calling thread where it is. Linux wakes a thread on its waker's CPU if the others look busy, as halted ones
// do to a virtual machine, and takes some 10 ms to part the two: longer than a short prompt.
class StayHere {
 public:
#if defined(__linux__)
  StayHere() {
    CPU_ZERO(&here_);
    CPU_SET(current_cpu(), &here_);
    is_set_ = sched_getaffinity(0, sizeof allowed_, &allowed_) == 0 && sched_setaffinity(0, sizeof here_, &here_) == 0;
  }
  ~StayHere() {
    cpu_set_t now;
    const bool is_here = is_set_ && sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&now, &here_);
    if (is_here) sched_setaffinity(0, sizeof allowed_, &allowed_);  // else somebody else has placed this thread
  }

 private:
  cpu_set_t here_, allowed_;
  bool is_set_;
#endif
};

}  // namespace

Team::Team(int count) : count_(count) { start(); }

Team::~Team() {
  if (owner_ != getpid()) {  // a fork's copy: the workers exist in the parent only
    for (std::thread& worker : workers_) worker.detach();
    return;
  }
  stopping_ = true;
  tasks_.advance();
  for (std::thread& worker : workers_) worker.join();
}

void Team::start() {
  owner_ = getpid();
  for (std::thread& worker : workers_) worker.detach();
  workers_.clear();
  arrivals_ = std::make_unique<Counter[]>(count_);
  taken_ = std::make_unique<Taken[]>(count_);
  tasks_.num_sleeping = 0;
  const uint32_t seen = tasks_.value;
  for (int index = 1; index < count_; ++index) workers_.emplace_back(&Team::work, this, index, seen);
}

void Team::run(void (*task)(void* context, Lane lane), void* context) {
  if (count_ == 1) return task(context, {0, 1});
  const std::lock_guard<std::mutex> turn(turn_);
  if (owner_ != getpid()) start();  // forked: the child needs workers of its own
  task_ = task;
  context_ = context;
  arrivals_[0].cpu.store(current_cpu(), std::memory_order_relaxed);
  tasks_.advance();
  task(context, {0, count_});
  barrier({0, count_});
}

Threads Team::threads() {
  const auto run_lanes = [](void* team, int lanes, void (*task)(void* context, int lane), void* context) {
    static_cast<Team*>(team)->run([=](Lane lane) {
      if (lane.index < lanes) task(context, lane.index);
    });
  };
  return {count_, run_lanes, this};
}

void Team::work(int index, uint32_t seen) {
  while (true) {
    const bool has_slept = tasks_.await(++seen);
    if (stopping_) return;
    if (has_slept) spread(index);
    task_(context_, {index, count_});
    barrier({index, count_});
  }
}

void Team::spread(int index) {
#if defined(__linux__)
  int cpu = current_cpu();
  const auto is_here = [&](const Counter& lane) { return lane.cpu == cpu; };
  cpu_set_t allowed;
  if (std::any_of(&arrivals_[0], &arrivals_[index], is_here) && sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    cpu_set_t vacant = allowed;
    for (int lane = 0; lane < count_; ++lane) {
      if (lane != index && arrivals_[lane].cpu >= 0) CPU_CLR(arrivals_[lane].cpu, &vacant);
    }
    if (CPU_COUNT(&vacant) > 0 && sched_setaffinity(0, sizeof vacant, &vacant) == 0) {
      sched_setaffinity(0, sizeof allowed, &allowed);
      cpu = current_cpu();
    }
  }
  arrivals_[index].cpu = cpu;
#else
  static_cast<void>(index);
#endif
}

// Every lane moves its own counter and watches the others': one transfer of a cache line where a shared one has two.
void Team::barrier(Lane lane) {
  if (lane.count == 1) return;
  const uint32_t mine = arrivals_[lane.index].value.load(std::memory_order_relaxed) + 1;
  taken_[lane.index].items[mine % 2].store(0, std::memory_order_relaxed);  // of the next phase; nobody is there yet
  arrivals_[lane.index].advance();
  for (int other = 0; other < lane.count; ++other) {
    if (other != lane.index) arrivals_[other].await(mine);
  }
}

void Team::Counter::advance() {
  value.fetch_add(1, std::memory_order_seq_cst);
  if (num_sleeping.load(std::memory_order_seq_cst) > 0) wake_all(value);
}

bool Team::Counter::await(uint32_t wanted) {
  const auto is_there = [&] { return static_cast<int32_t>(value.load(std::memory_order_seq_cst) - wanted) >= 0; };
  for (int spins = 0; spins < patience; ++spins) {
    if (is_there()) {
      patience = std::min(2 * patience, kMostSpins);
      return false;
    }
    pause();
  }
  patience = std::max(patience / 2, kFewestSpins);
  for (int yields = 0; yields < kYields; ++yields) {
    if (is_there()) return false;
    sched_yield();
  }
  [[maybe_unused]] const StayHere place{};
  num_sleeping.fetch_add(1, std::memory_order_seq_cst);
  for (uint32_t now = value; !is_there(); now = value) {
    if (static_cast<int32_t>(now - wanted) < 0) sleep_while(value, now);
  }
  num_sleeping.fetch_sub(1, std::memory_order_seq_cst);
  return true;
}

}  // namespace inferneo
