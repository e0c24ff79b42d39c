// Attention in bfloat16 for processors with AVX-512 and its bfloat16 products (vdpbf16ps): twice the products of
// a float32 multiply-add in the same time.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "attention_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After the standard headers, so that no function of theirs is compiled for a processor that is not there.
#if defined(__clang__)
#pragma clang attribute push(                                                                  \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

// Nothing here crosses the ABI with a vector in a register: every such function is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
// What GCC 12 says of its own header's _mm512_undefined_ps.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define EVIT_SIMD_NAMESPACE avx512_bf16
#define EVIT_SIMD_BYTES 64
#include "vectors.inc"

// In its terms.
#include "attention_kernels.inc"

namespace evit::cpu::avx512_bf16 {
namespace {

// Elements are two bfloat16: channels of a key, or one channel of two tokens' values. Their products are exact
// and summed in float32; subnormal numbers count as 0, which the processor does not let one choose.
struct Pairs {
  using Value = BFloat16;
  using Arithmetic = Pairs;
  using A = float;
  using Element = uint32_t;
  static constexpr int64_t values_in_element = 2;
  static constexpr int64_t logits_padding = 32;

  EVIT_INLINE void multiply_add(FloatV& sum, Element a, const UintV& b) {
    sum = _mm512_dpbf16_ps(sum, bits_as<__m512bh>(UintV{} + a), bits_as<__m512bh>(b));
  }

  EVIT_INLINE UintV load(const BFloat16* values, int64_t count) {
    UintV pairs = {};
    __builtin_memcpy(&pairs, values, count >= 32 ? 64 : count > 0 ? count * sizeof(BFloat16) : 0);
    return pairs;
  }
  // `count` values of a row, those of the next row above them.
  EVIT_INLINE UintV load_rows(const BFloat16* first, const BFloat16* second, int64_t count) {
    const UintV low = widened(first, count);
    return second != nullptr ? low | (widened(second, count) << 16) : low;
  }
  EVIT_INLINE UintV widened(const BFloat16* values, int64_t count) {
    if (count >= 16) return load_bits(values);
    BFloat16 buffer[16] = {};
    if (count > 0) __builtin_memcpy(buffer, values, count * sizeof(BFloat16));
    return load_bits(buffer);
  }

  // Logits in units of ln(2), so that 2^x is what is left to do.
  static float factor(double scale) { return static_cast<float>(scale * 1.4426950408889634); }

  // 2^x for x up to 0, -Inf or NaN, to 3e-6 of it: 2^n * 2^f with |f| <= 1/2 and 2^f by the polynomial of the
  // fourth degree that is 1 at 0 and has the least relative error. bfloat16 keeps 4e-3.
  EVIT_INLINE __m512 exp2(__m512 value) {
    // NaN comes through: the second argument is returned then. 2^-150 is 0 in bfloat16.
    const __m512 x = _mm512_max_ps(_mm512_set1_ps(-150.0f), value);
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 series = _mm512_set1_ps(0.00958285299f);
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(0.0559064247f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(0.240240986f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(0.693124193f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(series, n);
  }

  // As Widened's. The sum is that of the rounded probabilities, so that the output is a mean of the values to
  // the rounding of float32, whatever bfloat16 makes of the weights.
  EVIT_INLINE float exponentials(float* logits, int64_t padded_count) {
    __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    // NaN does not get here, but it gets into the sum.
    for (int64_t i = 0; i < padded_count; i += 16)
      largest = _mm512_max_ps(_mm512_loadu_ps(logits + i), largest);
    const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    const __m512bh ones = bits_as<__m512bh>(UintV{} + 0x3f803f80u);
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < padded_count; i += 32) {
      const __m512 low = exp2(_mm512_sub_ps(_mm512_loadu_ps(logits + i), maximum));
      const __m512 high = exp2(_mm512_sub_ps(_mm512_loadu_ps(logits + i + 16), maximum));
      const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
      total = _mm512_dpbf16_ps(total, both, ones);
      // Over logits that have been read: 16 elements of two take the place of 16 of the 32.
      __builtin_memcpy(logits + i / 2, &both, sizeof both);
    }
    return sum_lanes<float, 16>(FloatV(total));
  }
};

}  // namespace

const AttentionKernels<BFloat16>& attention_table() { return attention_kernels_of<Pairs>; }

}  // namespace evit::cpu::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
