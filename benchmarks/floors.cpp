// What this machine can do at most, on one thread and on all: benchmarks/floors.py compiles and runs this.
//
// Prints one line: threads, GB/s of reading 96 MiB on huge pages, Gop/s of 8-bit dot products, GFLOP/s of fp32 FMA,
// nanoseconds of a round trip between the first two threads.
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kBytes = int64_t{96} << 20;
constexpr int kRounds = 50'000;
constexpr int kChains = 12;  // above latency times throughput of every CPU so far

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds from when all threads are there until all are done; the best of some tries.
template <class F>
double best_seconds(int threads, int tries, F f) {
  double best = 1e9;
  for (int i = 0; i < tries; ++i) {
    std::atomic<int> ready{0}, done{0};
    const auto body = [&](int thread) {
      ++ready;
      while (ready < threads) _mm_pause();
      f(thread);
      ++done;
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
    while (ready < threads - 1) _mm_pause();
    const double start = seconds_now();
    body(0);
    while (done < threads) _mm_pause();
    best = std::min(best, seconds_now() - start);
    for (std::thread& other : others) other.join();
  }
  return best;
}

#if defined(__AVX512F__)
using Ints = __m512i;
using Floats = __m512;
Ints load(const char* p) { return _mm512_load_si512(p); }
Ints mix(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#if defined(__AVX512VNNI__)
Ints dot(Ints sum, Ints a, Ints b) { return _mm512_dpbusd_epi32(sum, a, b); }
#else
Ints dot(Ints sum, Ints a, Ints b) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
}
#endif
#else
using Ints = __m256i;
using Floats = __m256;
Ints load(const char* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
Ints mix(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
Ints dot(Ints sum, Ints a, Ints b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#endif

// One stream a thread, fetched 1 KiB ahead into the L2: the fastest of what was tried on the reference machine.
void read_share(const char* memory, int thread, int threads) {
  const int64_t share = kBytes / threads / 256 * 256;
  const char* p = memory + share * thread;
  Ints sums[4] = {};
  for (const char* end = p + share; p < end; p += sizeof sums) {
    for (size_t i = 0; i < sizeof sums; i += 64) _mm_prefetch(p + 1024 + i, _MM_HINT_T1);
    for (size_t i = 0; i < 4; ++i) sums[i] = mix(sums[i], load(p + i * sizeof(Ints)));
  }
  for (Ints& sum : sums) asm volatile("" : "+v"(sum));
}

__attribute__((noinline)) void dot_products() {  // inlined, GCC 12 keeps the sums in memory
  Ints sums[kChains] = {}, x = {};
  asm volatile("" : "+v"(x));
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (Ints& sum : sums) {
      sum = dot(sum, x, x);
      asm volatile("" : "+v"(sum));
    }
  }
}

__attribute__((noinline)) void multiply_adds() {
  Floats sums[kChains] = {}, x = {};
  asm volatile("" : "+v"(x));
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (Floats& sum : sums) {
      sum = fma(x, x, sum);
      asm volatile("" : "+v"(sum));
    }
  }
}

double round_trip_ns() {
  constexpr int kTrips = 200;
  std::atomic<int> ball{0};
  const double seconds = best_seconds(2, 20, [&](int thread) {
    if (thread == 0) ball = 0;
    for (int i = 0; i < kTrips; ++i) {
      while (ball.load() % 2 != thread) _mm_pause();
      ball.fetch_add(1);
    }
  });
  return seconds / kTrips * 1e9;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  auto* memory = static_cast<char*>(std::aligned_alloc(size_t{2} << 20, kBytes + (2 << 20)));
  madvise(memory, kBytes, MADV_HUGEPAGE);
  std::memset(memory, 1, kBytes);
  const double read = best_seconds(threads, 8, [&](int thread) { read_share(memory, thread, threads); });
  const double dots = best_seconds(threads, 40, [](int) { dot_products(); });
  const double fmas = best_seconds(threads, 40, [](int) { multiply_adds(); });
  const double lanes = static_cast<double>(kRounds) * kChains * threads;
  std::printf("%d %.1f %.1f %.1f %.0f\n", threads, kBytes / read / 1e9, 2.0 * sizeof(Ints) * lanes / dots / 1e9,
              2.0 * sizeof(Floats) / 4 * lanes / fmas / 1e9, threads > 1 ? round_trip_ns() : 0.0);
  return 0;
}
