// row_kernels.h for AVX2 and FMA.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define INFERNEO_LANES 8
#define INFERNEO_BF16_DOT 0
namespace inferneo {
namespace avx2 {
namespace {
#include "row_kernels_impl.h"
}  // namespace

const RowKernels& row_kernels() { return kRowKernels; }

}  // namespace avx2
}  // namespace inferneo

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
