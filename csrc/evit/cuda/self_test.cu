#include "../self_test.h"

#include "device.cuh"

namespace evit::cuda {
namespace {

constexpr char kName[] = "self_test";
constexpr int kThreads = 256;

__global__ void write_squares(int* out) { out[threadIdx.x] = static_cast<int>(threadIdx.x * threadIdx.x); }

std::string launch_and_compare(int device) {
  const DeviceGuard guard(device, kName);
  void* squares = nullptr;
  check(cudaMalloc(&squares, kThreads * sizeof(int)), kName);
  int host[kThreads] = {};
  try {
    launch(kName, write_squares, 1, kThreads, 0, Stream{device, nullptr}, static_cast<int*>(squares));
    check(cudaMemcpy(host, squares, sizeof host, cudaMemcpyDeviceToHost), kName);
  } catch (...) {
    cudaFree(squares);
    throw;
  }
  check(cudaFree(squares), kName);
  for (int i = 0; i < kThreads; ++i)
    if (host[i] != i * i) return "thread " + std::to_string(i) + " wrote " + std::to_string(host[i]);
  return "";
}

}  // namespace

std::string self_test(int device) {
  try {
    return launch_and_compare(device);
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace evit::cuda
