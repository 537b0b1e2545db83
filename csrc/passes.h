// The loops over the vocabulary, each compiled once an instruction set from the same scalar source (passes.cpp).
#pragma once

#include <cstdint>

#include "arith.h"

namespace inferneo {

constexpr int64_t kBlock = 64;  // tokens a block: the grain of maxima, pruning and work sharing

inline int64_t num_blocks(int64_t vocab_size) { return (vocab_size + kBlock - 1) / kBlock; }

// One row of logits as the choice sees it: z[i] = logits[i] * inv_temperature.
template <class T>
struct Row {
  const T* logits;
  int64_t vocab_size;
  float inv_temperature;
};

struct Penalties {
  float repetition, presence, frequency;
};

template <class T>
struct Passes {
  // maxima[b] = the largest ordered_key of block b, for blocks [begin, end). Returns whether any z is NaN.
  int64_t (*block_maxima)(const Row<T>& row, int64_t begin, int64_t end, int32_t* maxima);
  // The sum of weight(z - largest) over blocks [begin, end).
  int64_t (*mass)(const Row<T>& row, float largest, int64_t begin, int64_t end);
  // How many z in [begin, end) (tokens, not blocks) have a key above `key`.
  int64_t (*count_above)(const Row<T>& row, int32_t key, int64_t begin, int64_t end);
  // The token_key of the best score among `best` and the tokens of blocks [begin, end).
  TokenKey (*draw)(const Row<T>& row, const DrawKey& key, const int32_t* maxima, int64_t begin, int64_t end,
                   TokenKey best);
  // adjusted[i] = the penalised logit, for the whole row. counts may be null: a plain copy.
  void (*adjust)(const T* logits, int64_t vocab_size, const int32_t* counts, const Penalties& penalties,
                 float* adjusted);
};

// The loops over a list of candidate tokens.
struct ListPasses {
  // weights[i] = weight(value_of(tokens[i]) - largest); returns their sum.
  int64_t (*weigh)(const TokenKey* tokens, int64_t count, float largest, int64_t* weights);
  // The token_key of the best score among the tokens.
  TokenKey (*draw)(const TokenKey* tokens, int64_t count, const DrawKey& key);
};

// Of one machine's, each has all that those before it have. kNeon: with dot products.
enum class Isa { kScalar, kNeon, kAvx2, kAvx512, kAvx512Bf16 };

// The best instruction set of this machine, or the one that INFERNEO_CPU_ISA names.
// Throws std::runtime_error if the variable holds something else or the machine lacks what it asks for.
Isa cpu_isa();
const char* isa_name(Isa isa);

template <class T>
const Passes<T>& passes(Isa isa);
const ListPasses& list_passes(Isa isa);

}  // namespace inferneo
