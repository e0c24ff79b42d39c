// The loops for processors with AVX-512 (F, BW, DQ, VL).
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "attention_kernels.h"
#include "row_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After the standard headers, so that none of their functions uses instructions that a processor may lack.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define EVIT_SIMD_NAMESPACE avx512
#define EVIT_SIMD_BYTES 64
#include "vectors.inc"

// These use vectors.inc and must come after it.
#include "attention_kernels.inc"
#include "row_kernels.inc"
#include "tables.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
