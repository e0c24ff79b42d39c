// The host's side: the runtime API of api.h, and which launches a device refuses.
#include "api.h"

#include <cstdlib>
#include <map>
#include <new>
#include <utility>

#include "fiber.h"
#include "internal.h"

namespace cuda_on_host {
namespace {

cudaError_t last_error = cudaSuccess;
int current_device = 0;
std::map<const void*, int> shared_memory_limits;  // of the kernels that asked for more

constexpr size_t kGuard = CUDA_ON_HOST_ASAN ? 0 : 64;
constexpr char kGuardByte = '\xA5';

struct ErrorText {
  const char *name, *text;
};

ErrorText error_text(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return {"cudaSuccess", "no error"};
    case cudaErrorInvalidValue:
      return {"cudaErrorInvalidValue", "invalid argument"};
    case cudaErrorMemoryAllocation:
      return {"cudaErrorMemoryAllocation", "out of memory"};
    case cudaErrorInvalidConfiguration:
      return {"cudaErrorInvalidConfiguration", "invalid configuration argument"};
    case cudaErrorInvalidDevice:
      return {"cudaErrorInvalidDevice", "invalid device ordinal"};
    case cudaErrorLaunchFailure:
      return {"cudaErrorLaunchFailure", "unspecified launch failure"};
  }
  return {"unrecognized error code", "unrecognized error code"};
}

// What the attribute is, or null.
const int* attribute_of(cudaDeviceAttr attribute) {
  static constexpr int max_threads = 1024, warp = 32;
  const Device& device = cuda_on_host::device();
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return &max_threads;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return &device.shared_memory_per_block;
    case cudaDevAttrWarpSize:
      return &warp;
    case cudaDevAttrMultiProcessorCount:
      return &device.multiprocessors;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return &device.threads_per_multiprocessor;
    case cudaDevAttrComputeCapabilityMajor:
      return &device.compute_capability_major;
    case cudaDevAttrComputeCapabilityMinor:
      return &device.compute_capability_minor;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return &device.shared_memory_per_multiprocessor;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return &device.shared_memory_per_block_optin;
  }
  return nullptr;
}

bool has_device(int device) { return device >= 0 && device < cuda_on_host::device().count; }

}  // namespace

Device& device() {
  static Device device;
  return device;
}

namespace internal {

cudaError_t set_error(cudaError_t error) { return last_error = error; }

bool may_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  if (last_error == cudaErrorLaunchFailure)
    return false;  // as on a device, nothing runs after a kernel failed
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  // Each side on its own first: the product of three can wrap around.
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || threads == 0 || threads > 1024 || grid.x == 0 ||
      grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    set_error(cudaErrorInvalidConfiguration);
    return false;
  }
  const auto raised = shared_memory_limits.find(kernel);
  const int limit = raised == shared_memory_limits.end() ? device().shared_memory_per_block : raised->second;
  if (shared_bytes > static_cast<size_t>(limit)) {
    set_error(cudaErrorInvalidValue);
    return false;
  }
  return true;
}

SharedMemory::SharedMemory(size_t bytes) {
  char* allocation = static_cast<char*>(std::malloc(bytes + 2 * kGuard));
  if (allocation == nullptr) throw std::bad_alloc();
  std::memset(allocation, kGuardByte, bytes + 2 * kGuard);
  memory_ = allocation + kGuard;
}

SharedMemory::~SharedMemory() { std::free(memory_ - kGuard); }

bool guards_intact(const void* shared_memory, size_t bytes) {
  const char* memory = static_cast<const char*>(shared_memory);
  for (size_t i = 0; i < kGuard; ++i)
    if (memory[bytes + i] != kGuardByte || *(memory - 1 - i) != kGuardByte) return false;
  return true;
}

}  // namespace internal
}  // namespace cuda_on_host

using cuda_on_host::internal::set_error;

const char* cudaGetErrorName(cudaError_t error) { return cuda_on_host::error_text(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return cuda_on_host::error_text(error).text; }
cudaError_t cudaPeekAtLastError() { return cuda_on_host::last_error; }
cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::last_error, cudaSuccess); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = cuda_on_host::device().count;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_host::current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (!cuda_on_host::has_device(device)) return set_error(cudaErrorInvalidDevice);
  cuda_on_host::current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!cuda_on_host::has_device(device)) return set_error(cudaErrorInvalidDevice);
  const int* known = cuda_on_host::attribute_of(attribute);
  if (known == nullptr) return set_error(cudaErrorInvalidValue);
  *value = *known;
  return cudaSuccess;
}

// Only a kernel's failure surfaces here: everything else was reported by the call at fault.
cudaError_t cudaDeviceSynchronize() {
  return cuda_on_host::last_error == cudaErrorLaunchFailure ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }

cudaError_t cudaMalloc(void** address, size_t bytes) {
  *address = std::malloc(bytes);
  if (*address == nullptr && bytes > 0) return set_error(cudaErrorMemoryAllocation);
  if (bytes > 0) std::memset(*address, 0xFF, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemset(void* address, int value, size_t bytes) {
  if (bytes > 0) std::memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(address, value, bytes);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;  // a hint
  if (value < 0 || value > cuda_on_host::device().shared_memory_per_block_optin)
    return set_error(cudaErrorInvalidValue);
  cuda_on_host::shared_memory_limits[kernel] = value;
  return cudaSuccess;
}
