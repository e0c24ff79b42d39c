#include <cuda_runtime.h>

#include <string>

#include "../self_test.h"

namespace evit::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void write_squares(int* out) { out[threadIdx.x] = threadIdx.x * threadIdx.x; }

std::string describe(const char* step, cudaError_t error) {
  return std::string(step) + ": " + cudaGetErrorString(error);
}

std::string launch_and_compare() {
  int* squares = nullptr;
  cudaError_t error = cudaMalloc(&squares, kThreads * sizeof(int));
  if (error != cudaSuccess) return describe("cudaMalloc", error);
  write_squares<<<1, kThreads>>>(squares);
  error = cudaGetLastError();
  int host[kThreads] = {};
  if (error == cudaSuccess) error = cudaMemcpy(host, squares, sizeof host, cudaMemcpyDeviceToHost);
  cudaFree(squares);
  if (error != cudaSuccess) return describe("launch", error);
  for (int i = 0; i < kThreads; ++i)
    if (host[i] != i * i) return "thread " + std::to_string(i) + " wrote " + std::to_string(host[i]);
  return "";
}

}  // namespace

std::string self_test(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return describe("cudaSetDevice", error);
  const std::string result = launch_and_compare();
  cudaSetDevice(before);
  return result;
}

}  // namespace evit::cuda
