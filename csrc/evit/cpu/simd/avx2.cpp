// The loops for processors with AVX2 and FMA.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "attention_kernels.h"
#include "row_kernels.h"

#if defined(__x86_64__)

// After the standard headers, so that none of their functions uses instructions that a processor may lack.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define EVIT_SIMD_NAMESPACE avx2
#define EVIT_SIMD_BYTES 32
#include "vectors.inc"

// These use vectors.inc and must come after it.
#include "attention_kernels.inc"
#include "row_kernels.inc"
#include "tables.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
