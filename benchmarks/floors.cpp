// What this machine can do at most, on one thread and on all: benchmarks/floors.py compiles this and calls it.
//
// Each function at the end makes one attempt and gives its seconds; to take the best of several is the caller's.
#include <immintrin.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kChains = 12;  // above latency times throughput of every CPU so far

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds from when all threads are there until all are done.
template <class F>
double seconds_of(int threads, F f) {
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
  const double seconds = seconds_now() - start;
  for (std::thread& other : others) other.join();
  return seconds;
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
void read_share(const char* memory, int64_t bytes, int thread, int threads) {
  const int64_t share = bytes / threads / 256 * 256;
  const char* p = memory + share * thread;
  Ints sums[4] = {};
  for (const char* end = p + share; p < end; p += sizeof sums) {
    for (size_t i = 0; i < sizeof sums; i += 64) _mm_prefetch(p + 1024 + i, _MM_HINT_T1);
    for (size_t i = 0; i < 4; ++i) sums[i] = mix(sums[i], load(p + i * sizeof(Ints)));
  }
  for (Ints& sum : sums) asm volatile("" : "+v"(sum));
}

// `rounds` times kChains independent instructions. Not inlined: GCC 12 would keep the sums in memory.
template <class Sums, class Operands, class F>
__attribute__((noinline)) void chains(int64_t rounds, F instruction) {
  Sums sums[kChains] = {};
  Operands x = {};
  asm volatile("" : "+v"(x));
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (Sums& sum : sums) {
      sum = instruction(sum, x);
      asm volatile("" : "+v"(sum));
    }
  }
}

constexpr double lanes(int64_t rounds, int threads) { return static_cast<double>(rounds) * kChains * threads; }

}  // namespace

extern "C" {

// Memory on huge pages, where the system gives them, filled with ones; the caller frees it.
char* floors_memory(int64_t bytes) {
  constexpr int64_t kHugePage = int64_t{2} << 20;
  auto* memory = static_cast<char*>(std::aligned_alloc(kHugePage, (bytes + kHugePage - 1) / kHugePage * kHugePage));
  if (memory == nullptr) return nullptr;
  madvise(memory, bytes, MADV_HUGEPAGE);
  std::memset(memory, 1, bytes);
  return memory;
}

void floors_free(char* memory) { std::free(memory); }

// Seconds of reading `bytes` bytes, each thread its own share.
double floors_read(const char* memory, int64_t bytes, int threads) {
  return seconds_of(threads, [&](int thread) { read_share(memory, bytes, thread, threads); });
}

// 8-bit operations a second, of `rounds` * kChains dot products a thread.
double floors_int8(int64_t rounds, int threads) {
  const double seconds =
      seconds_of(threads, [&](int) { chains<Ints, Ints>(rounds, [](Ints sum, Ints x) { return dot(sum, x, x); }); });
  return 2.0 * sizeof(Ints) * lanes(rounds, threads) / seconds;
}

// fp32 operations a second, of fused multiply-adds.
double floors_fp32(int64_t rounds, int threads) {
  const double seconds = seconds_of(
      threads, [&](int) { chains<Floats, Floats>(rounds, [](Floats sum, Floats x) { return fma(x, x, sum); }); });
  return 2.0 * sizeof(Floats) / 4 * lanes(rounds, threads) / seconds;
}

// bf16 operations a second; of fp32 ones where there is no instruction for bf16.
double floors_bf16(int64_t rounds, int threads) {
#if defined(__AVX512BF16__)
  const double seconds = seconds_of(threads, [&](int) {
    chains<Floats, __m512bh>(rounds, [](Floats sum, __m512bh x) { return _mm512_dpbf16_ps(sum, x, x); });
  });
  return 2.0 * sizeof(Floats) / 2 * lanes(rounds, threads) / seconds;
#else
  return floors_fp32(rounds, threads);
#endif
}

// Nanoseconds of a round trip between two threads.
double floors_round_trip() {
  constexpr int kTrips = 200;
  std::atomic<int> ball{0};
  const double seconds = seconds_of(2, [&](int thread) {
    for (int i = 0; i < kTrips; ++i) {
      while (ball.load() % 2 != thread) _mm_pause();
      ball.fetch_add(1);
    }
  });
  return seconds / kTrips * 1e9;
}

}  // extern "C"
