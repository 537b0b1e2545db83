// Runs the sampler without torch, for the sanitizers: tests/ops/test_sample_native.py builds it with ASan and UBSan and
// runs it once an instruction set, tests/ops/test_cpu_aarch64.py on another processor. Every array has exactly the size
// it is said to have, so that one element too far is an error.
#include "sampler.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/test_numbers.h"

namespace inferneo {
namespace {

void run_on_threads(void*, int lanes, void (*task)(void* context, int lane), void* context) {
  std::vector<std::thread> threads;
  for (int lane = 0; lane < lanes; ++lane) threads.emplace_back(task, context, lane);
  for (std::thread& thread : threads) thread.join();
}

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

template <class T>
T from_float(float x);
template <>
float from_float<float>(float x) {
  return x;
}
template <>
BFloat16 from_float<BFloat16>(float x) {
  return {static_cast<uint16_t>(float_bits(x) >> 16)};
}

void check_philox() {
  const PhiloxWords zeros = philox({0, 0, 0, 0}, 0);
  expect(zeros.x[0] == 0x6627e8d5 && zeros.x[3] == 0x9b00dbd8, "Philox of zeros");
  const PhiloxWords pi = philox({0xa4093822, 0x299f31d0, 0x243f6a88, 0x13198a2e}, 0x85a308d3, 0x03707344);
  expect(pi.x[0] == 0xd16cfe09 && pi.x[3] == 0x24126ea1, "Philox of the digits of pi");
}

template <class T>
void check_vocabulary(int64_t vocab_size, float scale, std::mt19937& random, Checksum& checksum) {
  const auto logits = std::make_unique<T[]>(vocab_size);
  const auto counts = std::make_unique<int32_t[]>(vocab_size);
  for (int64_t i = 0; i < vocab_size; ++i) {
    const float x = draw_number(random) * scale;
    logits[i] = from_float<T>(random() % 16 == 0 ? -INFINITY : x);
    counts[i] = random() % 4;
  }
  const int32_t bias_id = static_cast<int32_t>(vocab_size - 1);
  const float bias = 0.5f;
  Workspace one, two;
  for (int variant = 0; variant < 48; ++variant) {
    const float floats[kNumFloats] = {variant % 5 == 0 ? 0.0f : 0.9f,
                                      variant % 3 == 0 ? 0.8f : 1.0f,
                                      variant % 2 == 0 ? 0.1f : 0.0f,
                                      variant % 7 == 0 ? 0.7f : 1.0f,
                                      1.1f,
                                      0.2f,
                                      0.1f};
    const int64_t ints[kNumInts] = {variant % 4 == 0 ? 9 : variant % 4 == 1 ? 300 : 0, -variant, variant, 0, -1};
    const RowParams params{floats, ints, variant % 6 == 0 ? counts.get() : nullptr, &bias_id, &bias, variant % 8 == 0};
    const Isa isa = cpu_isa();
    const int64_t id = sample_row(logits.get(), vocab_size, params, isa, {1, run_on_threads, nullptr}, one);
    expect(id >= -1 && id < vocab_size, "the id is in the vocabulary");
    expect(id == sample_row(logits.get(), vocab_size, params, isa, {3, run_on_threads, nullptr}, two), "threads agree");
    const int64_t num_top = vocab_size < 20 ? vocab_size : 20;
    const auto top_ids = std::make_unique<int64_t[]>(num_top);
    const auto top_logprobs = std::make_unique<float[]>(num_top);
    const ScoreOutput score = score_row(logits.get(), vocab_size, id, num_top, isa, {3, run_on_threads, nullptr}, two,
                                        top_ids.get(), top_logprobs.get());
    expect(id < 0 || (score.rank >= 1 && score.rank <= vocab_size), "the rank is in the vocabulary");
    checksum.add(&id, 1);
    checksum.add(top_ids.get(), num_top);
    checksum.add(top_logprobs.get(), num_top);
  }
}

int run() {
  check_philox();
  std::mt19937 random(1);
  Checksum checksum;
  for (const int64_t vocab_size : {1, 2, 5, 63, 64, 65, 123, 1000, 40001}) {
    for (const float scale : {0.0f, 3.0f, 1e38f}) {
      check_vocabulary<float>(vocab_size, scale, random, checksum);
      check_vocabulary<BFloat16>(vocab_size, scale, random, checksum);
    }
  }
  std::puts(isa_name(cpu_isa()));
  checksum.print();
  return 0;
}

}  // namespace
}  // namespace inferneo

int main() { return inferneo::run(); }
