// row_kernels.h for the compiler's baseline.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "half.h"
#include "row_kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INFERNEO_LANES 4
#define INFERNEO_BF16_DOT 0
namespace inferneo {
namespace scalar {
namespace {
#include "row_kernels_impl.h"
}  // namespace

const RowKernels& row_kernels() { return kRowKernels; }

}  // namespace scalar
}  // namespace inferneo
