// Element types of the operators and the types in which they are summed.
//
// Notation of every header in this folder: B batch, H heads, N tokens, P prefix tokens, K kept patches,
// C channels, D channels per head. Sizes, strides and offsets count elements and are int64_t throughout.
#pragma once

#include <cstdint>
#include <new>

// Marks functions that both CPU and CUDA kernels call.
#ifdef __CUDACC__
#define EVIT_HOST_DEVICE __host__ __device__
#else
#define EVIT_HOST_DEVICE
#endif

namespace evit {

// IEEE binary16 and bfloat16 as storage. Layout-compatible with torch's, CUDA's and Arm's types.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// The type in which T values are summed: double for double, float for everything else.
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

// A read-only token tensor [B, N, C] (or [B, N] with channels == 1) whose last dimension is dense.
template <typename T>
struct Tokens {
  const T* data;
  int64_t stride_b;
  int64_t stride_n;

  EVIT_HOST_DEVICE const T* row(int64_t b, int64_t n) const { return data + b * stride_b + n * stride_n; }
};

// The product of the sizes of a buffer to allocate; throws bad_alloc if int64_t cannot hold it.
template <typename... Sizes>
int64_t buffer_size(int64_t first, Sizes... others) {
  int64_t product = first;
  bool overflow = false;
  ((overflow = __builtin_mul_overflow(product, static_cast<int64_t>(others), &product) || overflow), ...);
  if (overflow) throw std::bad_alloc();
  return product;
}

}  // namespace evit

// Calls macro(T) for every element type.
#define EVIT_FOR_EACH_TYPE(macro) macro(float) macro(double) macro(::evit::Half) macro(::evit::BFloat16)
