// row_kernels.h for AVX-512 with BF16.
#include "half.h"
#include "row_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

// The headers come first: their inline functions must not be compiled for an instruction set that others lack.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prefer-vector-width=512")
#endif

#define INFERNEO_LANES 16
#define INFERNEO_BF16_DOT 1
namespace inferneo {
namespace avx512bf16 {
namespace {
#include "row_kernels_impl.h"
}  // namespace

const RowKernels& row_kernels() { return kRowKernels; }

}  // namespace avx512bf16
}  // namespace inferneo

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
