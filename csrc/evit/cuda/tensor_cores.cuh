// Tensor cores of compute capability 8.0 and later, for 16-bit elements: products of 16 x 16 by 16 x 8
// matrices that a warp holds in registers, and the loads that bring them there from shared memory. Every
// function that names a warp is called by all of its lanes together.
//
// What a lane holds, with row = lane / 4 and pair = lane % 4 * 2 (two neighbours share a register, the one
// with the lower number in the lower half):
//
//   A  16 x 16   a[0]: A[row][pair, pair + 1]       a[1]: A[row + 8][pair, pair + 1]
//                a[2]: A[row][pair + 8, pair + 9]   a[3]: A[row + 8][pair + 8, pair + 9]
//   B  16 x 8    b0: B[pair, pair + 1][row]         b1: B[pair + 8, pair + 9][row]
//   C  16 x 8    c[0], c[1]: C[row][pair, pair + 1]   c[2], c[3]: C[row + 8][pair, pair + 1]
#pragma once

#include "vectors.cuh"

namespace evit::cuda {

#ifdef EVIT_CUDA_ON_HOST
template <typename T>
float widen_bits(uint16_t bits) {
  return widen(T{bits});
}
#endif

// C += A B, summed in float32.
template <typename T>
__device__ inline void warp_multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
#ifdef EVIT_CUDA_ON_HOST
  cuda_on_host::mma_m16n8k16<widen_bits<T>>(c, a, b0, b1);
#else
  if constexpr (std::is_same_v<T, BFloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8 x 8 matrices from shared memory. Lane 8 i + j names row j of matrix i, which are 16 bytes, aligned
// to as many. The lane gets of each matrix i, in m[i], M[row][pair, pair + 1]; transposed, M[pair, pair +
// 1][row].
template <bool kTransposed>
__device__ inline void warp_load_matrices(uint32_t (&m)[4], SharedAddress row) {
#ifdef EVIT_CUDA_ON_HOST
  cuda_on_host::ldmatrix_x4(m, reinterpret_cast<const void*>(row), kTransposed);
#else
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
#endif
}

// The value, of which the compiler no longer knows where it is from. What a loop computes from it is computed
// there every time, and not before the loop, from where it would be kept in registers.
__device__ inline unsigned computed_here(unsigned value) {
#ifndef EVIT_CUDA_ON_HOST
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// Two neighbouring elements from device memory that the kernel does not write.
template <typename T>
__device__ inline uint32_t load_pair(const T* from) {
#ifdef EVIT_CUDA_ON_HOST
  cuda_on_host::interleave();
#endif
  return __ldg(reinterpret_cast<const unsigned*>(from));
}

// Such a pair to shared memory, in one piece.
template <typename T>
__device__ inline void store_shared_pair(T* to, uint32_t pair) {
#ifdef EVIT_CUDA_ON_HOST
  cuda_on_host::check_aligned(to, sizeof pair);
  memcpy(static_cast<void*>(to), &pair, sizeof pair);
#else
  *reinterpret_cast<uint32_t*>(to) = pair;
#endif
}

// 2^x to two units in the last place, which is one instruction. Results too small for a normal number are 0.
__device__ inline float fast_exp2(float x) {
#ifdef EVIT_CUDA_ON_HOST
  return exp2f(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

}  // namespace evit::cuda
