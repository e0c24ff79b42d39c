// What the CUDA kernels need of the device and of CUDA's host interface, and the one place that knows whether
// nvcc or a plain C++ compiler reads them: the tests also execute the kernels on the CPU (EVIT_CUDA_ON_HOST,
// csrc/tests/cuda_on_host/), so whatever a CPU cannot do has its equivalent here.
#pragma once

#ifndef EVIT_CUDA_ON_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cassert>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../stream.h"
#include "../types.h"

namespace evit::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffff;

// Throws unless the call was successful; `what` names the operator.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgotten, or the next launch would report it again
  throw std::runtime_error(std::string(what) + ": CUDA error " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

// Makes a device current for the lifetime of the guard. The adapter has done so before with torch's guard,
// and then there is nothing to do here: to set back a device that the process does not use would create a
// context on it, for which torch looks out.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) {
    check(cudaGetDevice(&before_), what);
    if (before_ == device) return;
    check(cudaSetDevice(device), what);
    changed_ = true;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int multiprocessors(const Stream& stream) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, stream.device), "device attribute");
  return count;
}

// The blocks that share the work of a head, which is for `warps` warps, and the warps of each: as evenly as
// possible, at most `most`. Where that leaves multiprocessors idle, though there are `heads` heads, blocks
// are smaller. So no result may depend on which warps are in a block.
struct Shares {
  int blocks, warps;
};
inline Shares share_out_warps(int64_t warps, int64_t most, int64_t heads, const Stream& stream) {
  const int64_t enough = multiprocessors(stream);
  const auto blocks = [&] { return (warps + most - 1) / most; };
  while (most > 1 && heads * blocks() < enough) most /= 2;
  return {static_cast<int>(blocks()), static_cast<int>((warps + blocks() - 1) / blocks())};
}

// Bytes of shared memory that a block may have without asking, on every device.
constexpr int64_t kSharedMemory = 48 * 1024;

// The number of blocks of a launch, as the device counts them.
inline unsigned grid_size(int64_t blocks, const char* what) {
  if (blocks > std::numeric_limits<int>::max())
    throw std::length_error(std::string(what) + ": a launch of " + std::to_string(blocks) +
                            " blocks is more than a device takes");
  return static_cast<unsigned>(blocks);
}

// Within one sequence the kernels count in 32 bits. Throws where that is not enough for `count` of `things`.
inline void check_count(int64_t count, const char* things, const char* what) {
  if (count > std::numeric_limits<int>::max() / 2)
    throw std::length_error(std::string(what) + ": " + std::to_string(count) + " " + things +
                            " are more than is supported");
}

// Runs kernel(arguments...) on the stream; an empty grid is no launch.
template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, int threads,
            int64_t shared_bytes, const Stream& stream, Arguments... arguments) {
  if (blocks == 0) return;
  const dim3 grid(grid_size(blocks, what)), block(static_cast<unsigned>(threads));
#ifdef EVIT_CUDA_ON_HOST
  (void)stream;
  cuda_on_host::launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                       [&] { kernel(arguments...); });
#else
  const auto queue = static_cast<cudaStream_t>(stream.handle);
  // clang-format off
  kernel<<<grid, block, shared_bytes, queue>>>(arguments...);
  // clang-format on
#endif
  check(cudaGetLastError(), what);
}

// The block's shared memory, as many bytes as the launch asked for.
__device__ inline void* shared_memory() {
#ifdef EVIT_CUDA_ON_HOST
  return cuda_on_host::shared_memory();
#else
  extern __shared__ __align__(16) unsigned char evit_shared_memory[];
  return evit_shared_memory;
#endif
}

// Hands out parts of shared memory, in the order in which host code has added up their sizes with `bytes`.
class SharedParts {
 public:
  __device__ SharedParts() : next_(static_cast<unsigned char*>(shared_memory())) {}
  template <typename T>
  __device__ T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return part;
  }
  // What `take` needs, rounded up so that every part is aligned to 16 bytes.
  template <typename T>
  static EVIT_HOST_DEVICE constexpr int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  }

 private:
  unsigned char* next_;
};

// A condition that bad input can break and that the host cannot check without waiting for the device. As
// torch does, the kernel stops with a message and the CUDA context is lost.
#ifdef EVIT_CUDA_ON_HOST
#define EVIT_DEVICE_ASSERT(condition) \
  do {                                \
    if (!(condition)) __trap();       \
  } while (false)
#elif defined(NDEBUG)
// CUDA's headers and glibc's do not declare it with NDEBUG, which CMake's release build defines: nvcc 13.0
// then refused restore_tokens.cu, where it is used outside of a template.
extern "C" __host__ __device__ void __assert_fail(const char*, const char*, unsigned int,
                                                  const char*) noexcept;
#define EVIT_DEVICE_ASSERT(condition)                                                     \
  do {                                                                                    \
    if (!(condition)) __assert_fail(#condition, __FILE__, __LINE__, __PRETTY_FUNCTION__); \
  } while (false)
#else
#define EVIT_DEVICE_ASSERT(condition) assert(condition)
#endif

// a * b + c, rounded once. Written out wherever a sum must have the same bits in every variant of a kernel:
// the compiler is free to contract an expression in one and not in the other.
template <typename A>
__device__ A multiply_add(A a, A b, A c) {
  return fma(a, b, c);
}

// a * b and a + b, each rounded: for a product that is added, or a sum with a product, where a fused
// multiply-add would be another result. Of a plain product and sum the compiler may make one.
template <typename A>
__device__ A multiply(A a, A b) {
#ifdef EVIT_CUDA_ON_HOST
  return a * b;
#else
  if constexpr (sizeof(A) == 8)
    return __dmul_rn(a, b);
  else
    return __fmul_rn(a, b);
#endif
}
template <typename A>
__device__ A add(A a, A b) {
#ifdef EVIT_CUDA_ON_HOST
  return a + b;
#else
  if constexpr (sizeof(A) == 8)
    return __dadd_rn(a, b);
  else
    return __fadd_rn(a, b);
#endif
}

// The sum over the lanes of a warp, to all of them.
template <typename A>
__device__ A warp_sum(A value) {
  for (int distance = 1; distance < kWarp; distance *= 2)
    value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

// Conversion to the accumulation type and back, to nearest, ties to even.
__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ inline float widen(Half value) {
#ifdef EVIT_CUDA_ON_HOST
  const unsigned magnitude = value.bits & 0x7fff, sign = (value.bits & 0x8000u) << 16;
  if (magnitude < 0x400)
    return __uint_as_float(sign | __float_as_uint(static_cast<float>(magnitude) * 0x1p-24f));
  const unsigned rebias = 0x38000000;  // Inf and NaN have an exponent of all ones: twice
  return __uint_as_float(sign | ((magnitude << 13) + rebias + (magnitude >= 0x7c00 ? rebias : 0)));
#else
  return __half2float(__ushort_as_half(value.bits));
#endif
}

template <typename T>
__device__ T narrow(accumulate_t<T> value) {
  return value;
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float value) {
#ifdef EVIT_CUDA_ON_HOST
  const unsigned bits = __float_as_uint(value);
  // Rounding could carry a NaN's mantissa into the sign: NaN is written as such.
  const unsigned rounded = value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
  return {static_cast<uint16_t>(rounded)};
#else
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#endif
}
template <>
__device__ inline Half narrow<Half>(float value) {
#ifdef EVIT_CUDA_ON_HOST
  const unsigned bits = __float_as_uint(value), magnitude = bits & 0x7fffffff;
  unsigned half;
  if (magnitude > 0x7f800000) {
    half = 0x7fff;
  } else if (magnitude >= 0x47800000) {  // 65536 and above
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // multiples of 2^-24, the spacing in [0.5, 1): adding 0.5 rounds
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000))};
#else
  return {__half_as_ushort(__float2half_rn(value))};
#endif
}

// Where something lies in shared memory, in bytes: half as long as a pointer.
#ifdef EVIT_CUDA_ON_HOST
using SharedAddress = uintptr_t;
#else
using SharedAddress = uint32_t;
#endif
__device__ inline SharedAddress shared_address(const void* in_shared_memory) {
#ifdef EVIT_CUDA_ON_HOST
  return reinterpret_cast<uintptr_t>(in_shared_memory);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(in_shared_memory));
#endif
}

}  // namespace evit::cuda
