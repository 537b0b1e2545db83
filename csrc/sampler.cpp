#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "select.h"

namespace inferneo {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Maxima {
  float largest;
  bool has_nan;
};

template <class T>
Maxima find_maxima(const Row<T>& row, Isa isa, const Threads& threads, Workspace& workspace) {
  const int64_t blocks = num_blocks(row.vocab_size);
  workspace.maxima.resize(blocks);
  int32_t* maxima = workspace.maxima.data();
  const int64_t has_nan = reduce_blocks<int64_t>(
      threads, blocks, [&](int64_t begin, int64_t end) { return passes<T>(isa).block_maxima(row, begin, end, maxima); },
      std::bit_or<>());
  return {key_float(*std::max_element(maxima, maxima + blocks)), has_nan != 0};
}

template <class T>
int64_t total_mass(const Row<T>& row, float largest, Isa isa, const Threads& threads) {
  return reduce_blocks<int64_t>(
      threads, num_blocks(row.vocab_size),
      [&](int64_t begin, int64_t end) { return passes<T>(isa).mass(row, largest, begin, end); }, std::plus<>());
}

// Appends the tokens whose value key lies in [low, high); visits only blocks that hold one.
template <class T>
void collect(const Row<T>& row, int64_t low, int64_t high, Workspace& workspace) {
  std::vector<TokenKey>& tokens = workspace.tokens;
  for (int64_t block = 0; block < num_blocks(row.vocab_size); ++block) {
    if (workspace.maxima[block] < low) continue;
    const int64_t begin = block * kBlock;
    const int64_t end = std::min(begin + kBlock, row.vocab_size);
    size_t count = tokens.size();
    tokens.resize(count + kBlock);
    for (int64_t i = begin; i < end; ++i) {  // stores always and advances on a hit: no branch to mispredict
      const int32_t key = ordered_key(scaled(row.logits[i], row.inv_temperature));
      tokens[count] = token_key(key, static_cast<uint32_t>(i));
      count += key >= low && key < high;
    }
    tokens.resize(count);
  }
}

constexpr int64_t kEveryKey = int64_t{1} << 32;  // above every int32 key

// The value key of the count-th largest block maximum: count blocks reach it, so at least count tokens do.
int32_t nth_block_maximum(int64_t count, Workspace& workspace) {
  const auto blocks = static_cast<int64_t>(workspace.maxima.size());
  if (count > blocks) return INT32_MIN;
  workspace.order.resize(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    workspace.order[block] = token_key(workspace.maxima[block], static_cast<uint32_t>(block));
  }
  return value_key(prefix_cut(workspace.order.data(), nullptr, blocks, count));
}

// trunc(fp64(p) * fp64(mass)), and at least 1.
int64_t prefix_target(float p, int64_t mass) {
  const double target = static_cast<double>(p) * static_cast<double>(mass);
  return target >= 1.0 ? static_cast<int64_t>(target) : 1;
}

// Filters one row in the reference's order; leaves the kept tokens in workspace.tokens.
template <class T>
class Filter {
 public:
  Filter(const Row<T>& row, const RowParams& params, float largest, Isa isa, const Threads& threads,
         Workspace& workspace)
      : row_(row), params_(params), largest_(largest), isa_(isa), threads_(threads), workspace_(workspace) {}

  static bool is_needed(const RowParams& params, int64_t vocab_size) {
    const float* p = params.floats;
    return is_top_k(params, vocab_size) || p[kTypicalP] < 1.0f || p[kTopP] < 1.0f || p[kMinP] > 0.0f;
  }

  void run() {
    const float* p = params_.floats;
    std::vector<TokenKey>& tokens = workspace_.tokens;
    tokens.clear();
    int64_t mass = -1;  // of the tokens before top-p; -1: that of the candidates
    if (is_top_k(params_, row_.vocab_size)) {
      const int64_t top_k = params_.ints[kTopK];
      collect(row_, std::max(nth_block_maximum(top_k, workspace_), kLowest), kEveryKey, workspace_);
      const uint64_t cut = prefix_cut(tokens.data(), nullptr, size(), top_k);
      tokens.resize(keep_prefix(tokens.data(), nullptr, size(), cut));
    } else if (p[kTypicalP] < 1.0f) {
      collect(row_, kLowest, kEveryKey, workspace_);
    } else if (p[kTopP] < 1.0f) {
      mass = total_mass(row_, largest_, isa_, threads_);
      collect_mass(prefix_target(p[kTopP], mass));
    } else {
      // A superset: 0.01 covers the rounding of logarithm and weights while min_p is many units of mass, and
      // apply_min_p decides. Below that every token is a candidate.
      const float min_p = std::min(p[kMinP], 1.0f);
      collect(row_, min_p > 1e-6f ? lower_key(0.01f - std::log(min_p)) : kLowest, kEveryKey, workspace_);
    }
    if (p[kTypicalP] < 1.0f) apply_typical();
    if (p[kTopP] < 1.0f) apply_top_p(mass);
    if (p[kMinP] > 0.0f) apply_min_p();
  }

 private:
  static constexpr int32_t kLowest = kNegativeInfinityKey + 1;  // the least finite value: -inf is never a candidate

  static bool is_top_k(const RowParams& params, int64_t vocab_size) {
    return params.ints[kTopK] > 0 && params.ints[kTopK] < vocab_size;
  }

  int64_t size() const { return static_cast<int64_t>(workspace_.tokens.size()); }

  int32_t lower_key(float window) const {
    return largest_ < kInfinity ? std::max(ordered_key(largest_ - window + 0.0f), kLowest) : ordered_key(kInfinity);
  }

  // weights of the current tokens; returns their mass.
  int64_t weigh() {
    workspace_.weights.resize(workspace_.tokens.size());
    return list_passes(isa_).weigh(workspace_.tokens.data(), size(), largest_, workspace_.weights.data());
  }

  // Collects windows of descending values until their mass reaches the target. The weights of a value below the last
  // window are 0, so what it holds is enough.
  void collect_mass(int64_t target) {
    int64_t high = kEveryKey;
    for (const float window : {2.0f, 4.0f, 8.0f, 12.0f, 16.0f, 29.0f}) {
      const int32_t low = lower_key(window);
      collect(row_, low, high, workspace_);
      if (weigh() >= target) return;
      high = low;
    }
  }

  float surprise_offset(TokenKey token, float mean) const {
    return std::fabs(-difference(value_of(token), largest_) - mean);
  }

  static uint64_t typical_key(float offset, TokenKey token) {  // ascending by offset, then by id, is descending by this
    return token_key(-1 - ordered_key(offset), id_of(token));
  }

  void apply_typical() {
    const int64_t mass = weigh();
    int64_t surprise = 0;
    for (int64_t i = 0; i < size(); ++i) {
      const float d = difference(value_of(workspace_.tokens[i]), largest_);
      if (workspace_.weights[i] > 0) surprise += static_cast<int64_t>(exp_float(d) * -d * 0x1p40f);
    }
    const auto mean = static_cast<float>(static_cast<double>(surprise) / static_cast<double>(mass));
    const auto key_of = [&](TokenKey token) { return typical_key(surprise_offset(token, mean), token); };
    workspace_.order.resize(workspace_.tokens.size());
    std::transform(workspace_.tokens.begin(), workspace_.tokens.end(), workspace_.order.begin(), key_of);
    const int64_t target = prefix_target(params_.floats[kTypicalP], mass);
    const uint64_t cut = prefix_cut(workspace_.order.data(), workspace_.weights.data(), size(), target);
    std::erase_if(workspace_.tokens, [&](TokenKey token) { return key_of(token) < cut; });
  }

  void apply_top_p(int64_t mass) {
    const int64_t own = weigh();
    const int64_t target = prefix_target(params_.floats[kTopP], mass < 0 ? own : mass);
    const uint64_t cut = prefix_cut(workspace_.tokens.data(), workspace_.weights.data(), size(), target);
    workspace_.tokens.resize(keep_prefix(workspace_.tokens.data(), nullptr, size(), cut));
  }

  void apply_min_p() {
    weigh();
    const int64_t most = *std::max_element(workspace_.weights.begin(), workspace_.weights.end());
    const double share = std::min(params_.floats[kMinP], 1.0f);
    const auto floor = static_cast<int64_t>(share * static_cast<double>(most));
    size_t kept = 0;
    for (size_t i = 0; i < workspace_.tokens.size(); ++i) {
      workspace_.tokens[kept] = workspace_.tokens[i];
      kept += workspace_.weights[i] >= floor;
    }
    workspace_.tokens.resize(kept);
  }

  const Row<T>& row_;
  const RowParams& params_;
  const float largest_;
  const Isa isa_;
  const Threads& threads_;
  Workspace& workspace_;
};

template <class T>
TokenKey draw_row(const Row<T>& row, const DrawKey& key, Isa isa, const Threads& threads, const Workspace& workspace) {
  const int32_t* maxima = workspace.maxima.data();
  const int64_t blocks = num_blocks(row.vocab_size);
  const auto draw = [&](int64_t begin, int64_t end, TokenKey best) {
    return passes<T>(isa).draw(row, key, maxima, begin, end, best);
  };
  // The block of the largest logit goes first: its score prunes the others.
  const int64_t likeliest = std::max_element(maxima, maxima + blocks) - maxima;
  const TokenKey best = draw(likeliest, likeliest + 1, 0);
  return reduce_blocks<TokenKey>(
      threads, blocks, [&](int64_t begin, int64_t end) { return draw(begin, end, best); },
      [](TokenKey a, TokenKey b) { return std::max(a, b); });
}

template <class T>
int64_t choose(const Row<T>& row, const RowParams& params, Isa isa, const Threads& threads, Workspace& workspace) {
  const Maxima maxima = find_maxima(row, isa, threads, workspace);
  if (maxima.has_nan || maxima.largest == -kInfinity) return -1;
  if (params.floats[kInvTemperature] == 0.0f) {
    const int32_t key = ordered_key(maxima.largest);
    int64_t i = (std::find(workspace.maxima.begin(), workspace.maxima.end(), key) - workspace.maxima.begin()) * kBlock;
    while (ordered_key(scaled(row.logits[i], row.inv_temperature)) != key) ++i;
    return i;
  }
  const auto seed = static_cast<uint64_t>(params.ints[kSeed]);
  const DrawKey key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                    static_cast<uint32_t>(params.ints[kPosition]), static_cast<uint32_t>(params.ints[kChoice])};
  TokenKey best;
  if (Filter<T>::is_needed(params, row.vocab_size)) {
    Filter<T>(row, params, maxima.largest, isa, threads, workspace).run();
    best = list_passes(isa).draw(workspace.tokens.data(), static_cast<int64_t>(workspace.tokens.size()), key);
  } else {
    best = draw_row(row, key, isa, threads, workspace);
  }
  return id_of(best);
}

}  // namespace

template <class T>
int64_t sample_row(const T* logits, int64_t vocab_size, const RowParams& params, Isa isa, const Threads& threads,
                   Workspace& workspace) {
  const float inv_temperature = params.floats[kInvTemperature];
  const float scale = inv_temperature == 0.0f ? 1.0f : inv_temperature;
  if (params.counts == nullptr && params.num_biases == 0) {
    return choose(Row<T>{logits, vocab_size, scale}, params, isa, threads, workspace);
  }
  workspace.adjusted.resize(vocab_size);
  float* adjusted = workspace.adjusted.data();
  const float* p = params.floats;
  passes<T>(isa).adjust(logits, vocab_size, params.counts, {p[kRepetition], p[kPresence], p[kFrequency]}, adjusted);
  for (int64_t i = 0; i < params.num_biases; ++i) {
    const float bias = params.bias_values[i];
    float& logit = adjusted[params.bias_ids[i]];
    logit = bias == -kInfinity ? bias : logit + bias;
  }
  return choose(Row<float>{adjusted, vocab_size, scale}, params, isa, threads, workspace);
}

template <class T>
ScoreOutput score_row(const T* logits, int64_t vocab_size, int64_t target, int64_t num_top, Isa isa,
                      const Threads& threads, Workspace& workspace, int64_t* top_ids, float* top_logprobs) {
  const Row<T> row{logits, vocab_size, 1.0f};
  const Maxima maxima = find_maxima(row, isa, threads, workspace);
  if (maxima.has_nan) {
    std::fill_n(top_ids, num_top, -1);
    std::fill_n(top_logprobs, num_top, kNan);
    return {kNan, 0};
  }
  const int64_t mass = total_mass(row, maxima.largest, isa, threads);
  const float log_mass = log_float(static_cast<float>(mass) * 0x1p-40f);
  const auto logprob = [&](float value) { return difference(value, maxima.largest) - log_mass; };

  if (num_top > 0) {
    std::vector<TokenKey>& tokens = workspace.tokens;
    tokens.clear();
    collect(row, nth_block_maximum(num_top, workspace), kEveryKey, workspace);
    const auto count = static_cast<int64_t>(tokens.size());
    tokens.resize(keep_prefix(tokens.data(), nullptr, count, prefix_cut(tokens.data(), nullptr, count, num_top)));
    std::sort(tokens.begin(), tokens.end(), std::greater<>());
    for (int64_t i = 0; i < num_top; ++i) {
      top_ids[i] = id_of(tokens[i]);
      top_logprobs[i] = logprob(value_of(tokens[i]));
    }
  }
  if (target < 0) return {kNan, 0};
  const float value = to_float(logits[target]);
  const int32_t key = ordered_key(value + 0.0f);  // a token of a lower id also ranks above at an equal value
  const int64_t above = passes<T>(isa).count_above(row, key - 1, 0, target) +
                        passes<T>(isa).count_above(row, key, target + 1, vocab_size);
  return {logprob(value), 1 + above};
}

#define INFERNEO_INSTANTIATE(T)                                                                                     \
  template int64_t sample_row<T>(const T*, int64_t, const RowParams&, Isa, const Threads&, Workspace&);             \
  template ScoreOutput score_row<T>(const T*, int64_t, int64_t, int64_t, Isa, const Threads&, Workspace&, int64_t*, \
                                    float*);
INFERNEO_INSTANTIATE(float)
INFERNEO_INSTANTIATE(BFloat16)

}  // namespace inferneo
