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

// No vector crosses a function call here: every function that takes one is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
// GCC 12 warns about _mm512_undefined_ps in its own header.
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define EVIT_SIMD_NAMESPACE avx512_bf16
#define EVIT_SIMD_BYTES 64
#include "vectors.inc"

// These use vectors.inc and must come after it.
#include "attention_kernels.inc"

namespace evit::cpu::avx512_bf16 {
namespace {

// An element is two bfloat16: two channels of a key, or one channel of two tokens' values. Their products are
// exact and summed in float32; subnormal numbers count as 0, which cannot be changed on the processor.
struct Pairs {
  using Value = BFloat16;
  using Arithmetic = Pairs;
  using A = float;
  using Element = uint32_t;
  static constexpr int64_t values_in_element = 2;
  static constexpr int64_t logits_padding = 32;

  EVIT_INLINE void multiply_add(FloatV& sum, Element a, const UintV& b) {
    UintV everywhere = UintV{} + a;
#if defined(__clang__) && __clang_major__ == 16
    asm("" : "+v"(everywhere));  // clang 16 does not survive a broadcast that becomes bfloat16
#endif
    sum = _mm512_dpbf16_ps(sum, bits_as<__m512bh>(everywhere), bits_as<__m512bh>(b));
  }

  EVIT_INLINE UintV load(const BFloat16* values, int64_t count) {
    const __mmask32 there = count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0;
    return UintV(_mm512_maskz_loadu_epi16(there, values));
  }
  // `count` values of a row in the lower halves, those of the next row in the upper halves.
  EVIT_INLINE UintV load_rows(const BFloat16* first, const BFloat16* second, int64_t count) {
    const UintV low = widened(first, count);
    return second != nullptr ? low | (widened(second, count) << 16) : low;
  }
  EVIT_INLINE UintV widened(const BFloat16* values, int64_t count) {
    const __mmask16 there = count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0;
    return UintV(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, values)));
  }

  EVIT_INLINE void store(BFloat16* out, const FloatV& values) {
    const __m256bh rounded = _mm512_cvtneps_pbh(values);
    __builtin_memcpy(out, &rounded, sizeof rounded);
  }

  static float factor(double scale) { return static_cast<float>(scale * Power<float>::unit); }

  EVIT_INLINE FloatV exponential(const FloatV& x) { return FloatV(exp2_vector(__m512(x), kPowerOf4)); }

  // Pairs of neighbours in a row: 16 elements overwrite 32 values that have been read.
  static const Element* rows(float* values, int64_t stride, int64_t count, int64_t padded_count) {
    for (int64_t i = 0; i < count; ++i) {
      float* row = values + i * stride;
      for (int64_t n = 0; n < padded_count; n += 32) {
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + n + 16), _mm512_loadu_ps(row + n));
        __builtin_memcpy(row + n / 2, &both, sizeof both);
      }
    }
    return reinterpret_cast<const Element*>(values);
  }
  // Pairs of neighbours in a column; 0 below the last row.
  static const Element* columns(const float* values, int64_t stride, int64_t count, int64_t padded_count,
                                Element* packed) {
    for (int64_t i = 0; i < count; i += 2)
      for (int64_t n = 0; n < padded_count; n += 16) {
        const float* at = values + i * stride + n;
        const __m512 below = i + 1 < count ? _mm512_loadu_ps(at + stride) : _mm512_setzero_ps();
        // The second argument is the lower half.
        const __m512i both = bits_as<__m512i>(_mm512_cvtne2ps_pbh(below, _mm512_loadu_ps(at)));
        const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
        const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
        const __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        __builtin_memcpy(packed + i / 2 * stride + n, &pairs, sizeof pairs);
      }
    return packed;
  }

  // Like Widened's. The sum is that of the rounded probabilities, so that the weights of the values sum to 1
  // up to float32 rounding, although they are rounded to bfloat16.
  EVIT_INLINE float exponentials(float* logits, int64_t padded_count, float largest) {
    const __m512 maximum = _mm512_set1_ps(largest);
    const __m512bh ones = bits_as<__m512bh>(UintV{} + 0x3f803f80u);
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < padded_count; i += 32) {
      const __m512 low = exp2_vector(_mm512_sub_ps(_mm512_loadu_ps(logits + i), maximum), kPowerOf4);
      const __m512 high = exp2_vector(_mm512_sub_ps(_mm512_loadu_ps(logits + i + 16), maximum), kPowerOf4);
      const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
      total = _mm512_dpbf16_ps(total, both, ones);
      // Overwrites logits that have been read: 16 pairs take the place of 16 of the 32.
      __builtin_memcpy(logits + i / 2, &both, sizeof both);
    }
    return _mm512_reduce_add_ps(total);
  }

  // Like Widened's. A row has pairs of neighbours: the lower halves are the even tokens.
  EVIT_INLINE void add_weighted(const float* rows, int64_t stride, int64_t count, int64_t tokens,
                                const float* factors, float* sums) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    for (int64_t n = 0; n < tokens; n += 32) {
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
      for (int64_t i = 0; i < count; ++i) {
        const __m512i pairs = _mm512_loadu_si512(rows + i * stride + n / 2);
        const __m512 factor = _mm512_set1_ps(factors[i]);
        even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), factor, even);
        odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pairs, upper)), factor, odd);
      }
      const __m512 first = _mm512_permutex2var_ps(even, low, odd);
      _mm512_storeu_ps(sums + n, _mm512_add_ps(_mm512_loadu_ps(sums + n), first));
      if (n + 16 >= tokens) continue;  // `sums` is padded to 16 values only
      const __m512 second = _mm512_permutex2var_ps(even, high, odd);
      _mm512_storeu_ps(sums + n + 16, _mm512_add_ps(_mm512_loadu_ps(sums + n + 16), second));
    }
  }
};

}  // namespace

const AttentionKernels<BFloat16>& attention_table() { return attention_kernels_of<Pairs>; }

}  // namespace evit::cpu::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
