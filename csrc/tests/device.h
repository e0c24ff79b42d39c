// For tests of the CUDA kernels: memory of the device, be it a real one or the host that stands in for it
// (cuda_on_host/), and kernels run several times.
#pragma once

#ifndef EVIT_CUDA_ON_HOST
#include <cuda_runtime.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "../evit/stream.h"
#include "../evit/types.h"
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

// Exactly `size` elements on the device, every byte 0xFF until something is written: NaN, or -1. They begin
// `offset` elements after an address that is aligned for everything.
// With EVIT_TEST_NO_POISON in the environment it stays as it comes, so that a tool can see what is read
// unwritten.
template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t count, int64_t offset = 0) : size_(count), offset_(offset) {
    if (count == 0) return;
    const size_t all = static_cast<size_t>(count + offset) * sizeof(T);
    require(cudaMalloc(&memory_, all));
    if (std::getenv("EVIT_TEST_NO_POISON") == nullptr) require(cudaMemset(memory_, 0xff, all));
  }
  explicit DeviceBuffer(const Buffer<T>& host, int64_t offset = 0) : DeviceBuffer(host.size, offset) {
    if (size_ > 0) require(cudaMemcpy(data(), host.data.get(), bytes(), cudaMemcpyHostToDevice));
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() {
    if (memory_ != nullptr) cudaFree(memory_);
  }

  T* data() const { return memory_ == nullptr ? nullptr : static_cast<T*>(memory_) + offset_; }
  // Waits for the kernels that write it.
  Buffer<T> read() const {
    Buffer<T> host(size_);
    if (size_ > 0) require(cudaMemcpy(host.data.get(), data(), bytes(), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(T); }
  int64_t size_, offset_;
  void* memory_ = nullptr;
};

template <typename T>
bool same_bits(const Buffer<T>& a, const Buffer<T>& b) {
  return a.size == b.size && (a.size == 0 || std::memcmp(a.data.get(), b.data.get(),
                                                         static_cast<size_t>(a.size) * sizeof(T)) == 0);
}

template <typename Error, typename Run>
bool throws(const Run& run) {
  try {
    run();
  } catch (const Error&) {
    return true;
  }
  return false;
}

// Of two tuples of Buffers.
template <typename Some, typename Others>
bool all_same_bits(const Some& a, const Others& b) {
  const auto compare = [&](const auto&... of_a) {
    return std::apply([&](const auto&... of_b) { return (same_bits(of_a, of_b) && ...); }, b);
  };
  return std::apply(compare, a);
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
  for (const auto& result : results) CHECK(all_same_bits(results.front(), result));
  return std::move(results.front());
}

// How a tensor lies on the device: how many elements after an aligned address it begins, and how many lie
// between its rows and between its sequences.
struct Place {
  int64_t offset = 0, row_padding = 0, batch_padding = 0;
};

// A dense [B, N, C] of the host, so placed.
template <typename T>
struct Placed {
  DeviceBuffer<T> memory;
  Tokens<T> view;

  Placed(const Buffer<T>& dense, int64_t rows, int64_t channels, const Place& place)
      : Placed(dense, rows, channels, place, channels + place.row_padding) {}

 private:
  Placed(const Buffer<T>& dense, int64_t rows, int64_t channels, const Place& place, int64_t stride)
      : memory(spread(dense, rows, channels, stride, rows * stride + place.batch_padding), place.offset),
        view{memory.data(), rows * stride + place.batch_padding, stride} {}
  static Buffer<T> spread(const Buffer<T>& dense, int64_t rows, int64_t channels, int64_t stride_n,
                          int64_t stride_b) {
    Buffer<T> memory(dense.size / (rows * channels) * stride_b);
    std::memset(static_cast<void*>(memory.data.get()), 0xff, static_cast<size_t>(memory.size) * sizeof(T));
    for (int64_t i = 0; i < dense.size; ++i)
      memory[i / channels / rows * stride_b + i / channels % rows * stride_n + i % channels] = dense[i];
    return memory;
  }
};

// Calls run(places) with `count` tensors at aligned places, then with each of them elsewhere, in every way
// that makes reading 16 bytes at a time impossible. The results must be the same to the last bit.
template <typename Run>
void same_wherever_tensors_lie(size_t count, const Run& run) {
  std::vector<Place> places(count);
  const auto expected = run(places);
  for (Place& place : places)
    for (const Place& other : {Place{1, 0, 0}, Place{0, 1, 0}, Place{0, 0, 1}}) {
      place = other;
      CHECK(all_same_bits(expected, run(places)));
      place = {};
    }
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
