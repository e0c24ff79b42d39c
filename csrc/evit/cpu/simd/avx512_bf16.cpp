// Attention in bfloat16 for processors with AVX-512 and its bfloat16 products (vdpbf16ps), which do twice as
// many products as float32 multiply-adds in the same time.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "attention_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After the standard headers, so that none of their functions uses instructions that a processor may lack.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#define EVIT_SIMD_NAMESPACE avx512_bf16
#define EVIT_SIMD_BYTES 64
#include "vectors.inc"

// These use vectors.inc and must come after it.
#include "attention_kernels.inc"
#include "pairs.inc"

namespace evit::cpu::avx512_bf16 {

const AttentionKernels<BFloat16>& attention_table() { return attention_kernels_of<Pairs>; }

}  // namespace evit::cpu::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
