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

// After the standard headers, so that no function of theirs is compiled for a processor that is not there.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

// Nothing here crosses the ABI with a vector in a register: every such function is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
// What GCC 12 says of its own header's _mm512_undefined_ps.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define EVIT_SIMD_NAMESPACE avx512
#define EVIT_SIMD_BYTES 64
#include "vectors.inc"

// In its terms.
#include "attention_kernels.inc"
#include "row_kernels.inc"
#include "tables.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
