// For tests of the CUDA kernels: memory of the device, be it a real one or the host that stands in for it
// (cuda_on_host.h), and kernels run several times.
#pragma once

#ifndef EVIT_CUDA_ON_HOST
#include <cuda_runtime.h>
#endif

#include <cstring>
#include <tuple>
#include <vector>

#include "../evit/stream.h"
#include "check.h"
#include "data.h"

namespace evit::tests {

inline void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA error: %s\n", cudaGetErrorString(error));
  std::abort();
}

// The default stream of the first device.
inline Stream test_stream() { return {0, nullptr}; }

// Exactly `size` elements on the device, every byte 0xFF until something is written: NaN, or -1.
template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t count) : size_(count) {
    if (count == 0) return;
    require(cudaMalloc(&memory_, bytes()));
    require(cudaMemset(memory_, 0xff, bytes()));
  }
  explicit DeviceBuffer(const Buffer<T>& host) : DeviceBuffer(host.size) {
    if (size_ > 0) require(cudaMemcpy(memory_, host.data.get(), bytes(), cudaMemcpyHostToDevice));
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() {
    if (memory_ != nullptr) cudaFree(memory_);
  }

  T* data() const { return static_cast<T*>(memory_); }
  // Waits for the kernels that write it.
  Buffer<T> read() const {
    Buffer<T> host(size_);
    if (size_ > 0) require(cudaMemcpy(host.data.get(), memory_, bytes(), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(T); }
  int64_t size_;
  void* memory_ = nullptr;
};

template <typename T>
bool same_bits(const Buffer<T>& a, const Buffer<T>& b) {
  return a.size == b.size && (a.size == 0 || std::memcmp(a.data.get(), b.data.get(),
                                                         static_cast<size_t>(a.size) * sizeof(T)) == 0);
}

// Calls run() several times, which launches kernels and returns a tuple of Buffers: on the host under several
// orders of the threads. Every time the results must be the same to the last bit. Returns them.
template <typename Run>
auto same_every_time(const Run& run) {
#ifdef EVIT_CUDA_ON_HOST
  std::vector<decltype(run())> results;
  cuda_on_host::for_each_order([&] { results.push_back(run()); });
#else
  std::vector<decltype(run())> results;
  for (int i = 0; i < 2; ++i) results.push_back(run());
#endif
  for (const auto& result : results)
    std::apply(
        [&](const auto&... first) {
          std::apply([&](const auto&... again) { CHECK((same_bits(first, again) && ...)); }, result);
        },
        results.front());
  return std::move(results.front());
}

// Against what the CPU's kernels computed: the error relative to the largest value expected, and to `scale`,
// the size of the terms of sums that may cancel.
template <typename T>
void check_close(const Buffer<T>& actual, const Buffer<T>& expected, double tolerance, double scale = 0) {
  CHECK(actual.size == expected.size);
  for (int64_t i = 0; i < expected.size; ++i) {
    const double value = std::abs(to_double(expected[i]));
    if (std::isfinite(value)) scale = std::max(scale, value);
  }
  for (int64_t i = 0; i < expected.size; ++i) {
    const double a = to_double(actual[i]), e = to_double(expected[i]);
    const bool close =
        std::isfinite(e) ? std::abs(a - e) <= tolerance * (scale + std::abs(e)) : near(a, e, 0);
    if (!close) {
      fail(__FILE__, __LINE__,
           "element " + std::to_string(i) + " is " + std::to_string(a) + ", expected " + std::to_string(e) +
               " (of at most " + std::to_string(scale) + ")");
      return;
    }
  }
}

}  // namespace evit::tests
