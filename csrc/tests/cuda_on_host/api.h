// The part of CUDA's runtime API and of its vector types that the project's sources use, on the host: device
// memory is the heap, a stream runs everything at once, and the device is whatever device() says it is.
// Included by host.h.
#pragma once

#include <cstddef>

// ---- Vector types, aligned as CUDA's are: a reinterpret_cast to them promises that much.

#define CUDA_ON_HOST_VECTORS(T, name, align2, align4)           \
  struct alignas(align2) name##2 { T x, y; };                   \
  struct alignas(align4) name##4 { T x, y, z, w; };             \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_ON_HOST_VECTORS(int, int, 8, 16)
CUDA_ON_HOST_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_HOST_VECTORS(float, float, 8, 16)
CUDA_ON_HOST_VECTORS(double, double, 16, 16)
CUDA_ON_HOST_VECTORS(long long, longlong, 16, 16)
CUDA_ON_HOST_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef CUDA_ON_HOST_VECTORS

struct uint3 {
  unsigned x, y, z;
};
constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

// ---- Enumerations, with CUDA's numbers.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};

using cudaStream_t = void*;

// ---- What the device claims to be. Tests set it; the defaults are those of a large device.

namespace cuda_on_host {

struct Device {
  int count = 1;
  int multiprocessors = 132;
  int threads_per_multiprocessor = 2048;
  int shared_memory_per_block = 48 << 10;         // what a kernel gets unasked
  int shared_memory_per_block_optin = 227 << 10;  // what cudaFuncSetAttribute can raise it to
  int shared_memory_per_multiprocessor = 228 << 10;
  int compute_capability_major = 9, compute_capability_minor = 0;
};

Device& device();

}  // namespace cuda_on_host

// ---- Functions. As in CUDA, a function that fails also leaves its error for cudaGetLastError().

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();  // and forgets it
cudaError_t cudaPeekAtLastError();

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamSynchronize(cudaStream_t stream);

// Exactly as many bytes as asked for, so that the address sanitizer sees the first one beyond, and all 0xFF.
cudaError_t cudaMalloc(void** address, size_t bytes);
cudaError_t cudaFree(void* address);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = {});
cudaError_t cudaMemset(void* address, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream = {});
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

template <class T>
cudaError_t cudaMalloc(T** address, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(address), bytes);
}

template <class R, class... Arguments>
cudaError_t cudaFuncSetAttribute(R (*kernel)(Arguments...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
