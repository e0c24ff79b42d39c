// CUDA kernels run on the host: the subset of the CUDA language that the project's .cu files use, as ordinary
// C++20, so that tests can execute them where there is no device.
//
//   g++ -std=c++20 -DEVIT_CUDA_ON_HOST -x c++ kernel.cu -x none cuda_on_host/*.cpp ...
//
//   cuda_on_host::launch(reinterpret_cast<const void*>(&kernel), grid, block, shared_bytes,
//                        [=] { kernel(arguments...); });
//
// It is made to find mistakes, not to be fast or to resemble one device:
//
//   - Every thread of a block is a fiber, which runs until it waits or returns. The order in force decides
//     who goes on (set_order). What differs between orders is a race; for_each_order tries several.
//   - The rules that a device leaves to the programmer are errors here: all threads of a block meet at one
//     __syncthreads(), all lanes of a mask at one collective, nobody reads a lane outside of the mask.
//     Stricter than CUDA, a thread that has returned, or that a block lacks, counts as missing.
//   - Memory is exactly as large as asked for, and full of garbage: build with -fsanitize=address,undefined.
//
// What it does not see: data races that no order tried brings to light (threads change places only where they
// wait, at atomics and at interleave()), and the memory model (every store is visible at once). A kernel that
// spins until another thread or block has done something hangs. It serves one thread of the host.
#pragma once

#ifdef __CUDACC__
#error "cuda_on_host stands in for the CUDA compiler: do not use both"
#endif

#include <math.h>  // not <cmath>: kernels call expf and the like without std::

#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>

#include "api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// Static shared memory would need a storage class that is per block. Only dynamic shared memory is offered.
#define __shared__ call_cuda_on_host_shared_memory_instead_of_declaring_shared_variables

namespace cuda_on_host {

using Where = std::source_location;

// ---- Launching

// Runs body() once for every thread. A launch that a device would refuse runs nothing, and leaves its error
// to cudaGetLastError(). The kernel's address is what cudaFuncSetAttribute knows it by; it may be null.
void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body);

// The block's dynamic shared memory, of just the size launched with, and all 0xFF (NaN, or -1) at its start.
void* shared_memory();

// An asynchronous copy of the calling thread, or zeros instead of what lies at `from`. On a device it may
// happen at any time until the thread waits for its copies: here as late as that, or, in an order that draws
// lots, at once. A thread may not return while copies are under way.
void copy_async(void* to, const void* from, size_t bytes, bool there, Where at = Where::current());
void wait_for_copies(Where at = Where::current());

// ---- The order in which threads and blocks run

struct Order {
  enum Kind { kForward, kReverse, kShuffled };
  Kind kind = kForward;
  unsigned seed = 0;

  std::string name() const;
};

// The runnable thread with the lowest index goes first, so warp 0 runs as far ahead of the others as it can.
inline constexpr Order forward = {Order::kForward, 0};
inline constexpr Order reverse = {Order::kReverse, 0};
// Draws lots whenever there is a choice; also interrupts threads at atomics and interleave().
constexpr Order shuffled(unsigned seed) { return {Order::kShuffled, seed}; }

Order order();
void set_order(Order order);

// body() or body(order), under both fixed orders and some shuffled ones.
template <class Body>
void for_each_order(Body&& body, unsigned shuffles = 3) {
  struct Restore {
    Order before = cuda_on_host::order();
    ~Restore() { set_order(before); }
  } restore;
  for (unsigned i = 0; i < 2 + shuffles; ++i) {
    const Order order = i == 0 ? forward : i == 1 ? reverse : shuffled(i - 1);
    set_order(order);
    if constexpr (std::is_invocable_v<Body, Order>)
      body(order);
    else
      body();
  }
}

// ---- Errors

// A mistake in a kernel is printed and aborts the process. Inside of expect_error it ends the launch instead,
// and is returned; further launches of body fail with cudaErrorLaunchFailure. The threads of the failed block
// are unwound by an exception, which a noexcept function in a kernel would turn into an end of the process.
std::string expect_error(const std::function<void()>& body);

// For the loads and stores of a kernel, in builds without -fsanitize=alignment too.
void misaligned(const void* address, size_t alignment, Where at);
inline void check_aligned(const void* address, size_t alignment, Where at = Where::current()) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) misaligned(address, alignment, at);
}

namespace internal {

struct Here {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  int lane;
  bool interrupts;  // in a kernel, under an order that interrupts threads
};
extern Here here;  // switched together with the threads

void interrupt();
[[noreturn]] void fail(const std::string& what, Where at);

}  // namespace internal

// A place where another thread may come in between. Atomics have one on either side.
inline void interleave() {
  if (internal::here.interrupts) internal::interrupt();
}

}  // namespace cuda_on_host

// ---- Where a thread is. References, because a kernel must not assign to them.

inline const uint3& threadIdx = cuda_on_host::internal::here.thread;
inline const uint3& blockIdx = cuda_on_host::internal::here.block;
inline const dim3& blockDim = cuda_on_host::internal::here.block_dim;
inline const dim3& gridDim = cuda_on_host::internal::here.grid_dim;
extern const int warpSize;  // as in CUDA, not a constant expression

// ---- Barriers of a block. Here and below, threads meet by call site, which a default argument finds out.

#define CUDA_ON_HOST_CALL_SITE cuda_on_host::Where at = cuda_on_host::Where::current()

namespace cuda_on_host::internal {

struct Votes {
  int yes, all;
};
Votes meet_block(const char* name, bool vote, Where at);

}  // namespace cuda_on_host::internal

inline void __syncthreads(CUDA_ON_HOST_CALL_SITE) {
  cuda_on_host::internal::meet_block("__syncthreads", false, at);
}

inline int __syncthreads_count(int predicate, CUDA_ON_HOST_CALL_SITE) {
  return cuda_on_host::internal::meet_block("__syncthreads_count", predicate != 0, at).yes;
}

inline int __syncthreads_or(int predicate, CUDA_ON_HOST_CALL_SITE) {
  return cuda_on_host::internal::meet_block("__syncthreads_or", predicate != 0, at).yes > 0;
}

inline int __syncthreads_and(int predicate, CUDA_ON_HOST_CALL_SITE) {
  const auto votes = cuda_on_host::internal::meet_block("__syncthreads_and", predicate != 0, at);
  return votes.yes == votes.all;
}

inline void __threadfence_block() { cuda_on_host::interleave(); }
inline void __threadfence() { cuda_on_host::interleave(); }

[[noreturn]] inline void __trap(CUDA_ON_HOST_CALL_SITE) { cuda_on_host::internal::fail("__trap()", at); }

// ---- Collectives of a warp. There is no __activemask(): a device may give any value it likes.

namespace cuda_on_host::internal {

// What the lanes of a mask brought to a collective.
struct Lanes {
  unsigned mask;
  uint64_t value[32];
  int source[32];  // the lane that a shuffle reads

  template <class Visit>
  void for_each(Visit visit) const {
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) visit(std::countr_zero(rest));
  }
};

// The result for one lane. Computed for all of them when the last one arrives, before any of them goes on.
using Combine = uint64_t (*)(const Lanes&, int lane);

uint64_t meet_warp(const char* name, unsigned mask, uint64_t value, int source, Combine combine, Where at);

template <class T>
concept Register = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Register T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <Register T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <Register T>
T shuffle(const char* name, unsigned mask, T value, int source, Where at) {
  const Combine read = [](const Lanes& lanes, int lane) { return lanes.value[lanes.source[lane]]; };
  return from_bits<T>(meet_warp(name, mask, to_bits(value), source, read, at));
}

// The first lane of this lane's segment, for a width that is allowed.
int segment(int width, Where at);

inline unsigned ballot(const char* name, unsigned mask, bool vote, Where at) {
  const Combine collect = [](const Lanes& lanes, int) {
    uint64_t bits = 0;
    lanes.for_each([&](int lane) { bits |= lanes.value[lane] << lane; });
    return bits;
  };
  return static_cast<unsigned>(meet_warp(name, mask, vote, here.lane, collect, at));
}

template <class Operation>
unsigned reduce(const char* name, unsigned mask, unsigned value, Where at) {
  const Combine fold = [](const Lanes& lanes, int) {
    uint64_t total = lanes.value[std::countr_zero(lanes.mask)];
    for (unsigned rest = lanes.mask & (lanes.mask - 1); rest != 0; rest &= rest - 1)
      total = Operation()(static_cast<unsigned>(total),
                          static_cast<unsigned>(lanes.value[std::countr_zero(rest)]));
    return total;
  };
  return static_cast<unsigned>(meet_warp(name, mask, value, here.lane, fold, at));
}

struct Smaller {
  unsigned operator()(unsigned a, unsigned b) const { return a < b ? a : b; }
};
struct Larger {
  unsigned operator()(unsigned a, unsigned b) const { return a < b ? b : a; }
};

}  // namespace cuda_on_host::internal

inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_ON_HOST_CALL_SITE) {
  cuda_on_host::internal::ballot("__syncwarp", mask, false, at);
}

// Of the distance and the lane, a device looks at five bits. Beyond the segment, a lane gets its own value.
template <cuda_on_host::internal::Register T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUDA_ON_HOST_CALL_SITE) {
  const int source = cuda_on_host::internal::segment(width, at) + (lane & (width - 1));
  return cuda_on_host::internal::shuffle("__shfl_sync", mask, value, source, at);
}

template <cuda_on_host::internal::Register T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_HOST_CALL_SITE) {
  const int lane = cuda_on_host::internal::here.lane;
  const int first = cuda_on_host::internal::segment(width, at);
  const int source = lane - static_cast<int>(delta & 31);
  return cuda_on_host::internal::shuffle("__shfl_up_sync", mask, value, source < first ? lane : source, at);
}

template <cuda_on_host::internal::Register T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_HOST_CALL_SITE) {
  const int lane = cuda_on_host::internal::here.lane;
  const int end = cuda_on_host::internal::segment(width, at) + width;
  const int source = lane + static_cast<int>(delta & 31);
  return cuda_on_host::internal::shuffle("__shfl_down_sync", mask, value, source < end ? source : lane, at);
}

// Unlike the others, it does reach into earlier segments.
template <cuda_on_host::internal::Register T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_ON_HOST_CALL_SITE) {
  const int lane = cuda_on_host::internal::here.lane;
  const int end = cuda_on_host::internal::segment(width, at) + width;
  const int source = lane ^ (lane_mask & 31);
  return cuda_on_host::internal::shuffle("__shfl_xor_sync", mask, value, source < end ? source : lane, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_HOST_CALL_SITE) {
  return cuda_on_host::internal::ballot("__ballot_sync", mask, predicate != 0, at);
}

inline int __any_sync(unsigned mask, int predicate, CUDA_ON_HOST_CALL_SITE) {
  return cuda_on_host::internal::ballot("__any_sync", mask, predicate != 0, at) != 0;
}

inline int __all_sync(unsigned mask, int predicate, CUDA_ON_HOST_CALL_SITE) {
  return cuda_on_host::internal::ballot("__all_sync", mask, predicate != 0, at) == mask;
}

template <cuda_on_host::internal::Register T>
unsigned __match_any_sync(unsigned mask, T value, CUDA_ON_HOST_CALL_SITE) {
  using namespace cuda_on_host::internal;
  const Combine equal = [](const Lanes& lanes, int lane) {
    uint64_t bits = 0;
    lanes.for_each([&](int other) { bits |= uint64_t{lanes.value[other] == lanes.value[lane]} << other; });
    return bits;
  };
  return static_cast<unsigned>(meet_warp("__match_any_sync", mask, to_bits(value), here.lane, equal, at));
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, CUDA_ON_HOST_CALL_SITE) {
  return cuda_on_host::internal::reduce<std::plus<unsigned>>("__reduce_add_sync", mask, value, at);
}

inline unsigned __reduce_min_sync(unsigned mask, unsigned value, CUDA_ON_HOST_CALL_SITE) {
  return cuda_on_host::internal::reduce<cuda_on_host::internal::Smaller>("__reduce_min_sync", mask, value,
                                                                         at);
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, CUDA_ON_HOST_CALL_SITE) {
  return cuda_on_host::internal::reduce<cuda_on_host::internal::Larger>("__reduce_max_sync", mask, value, at);
}

#include "device_functions.h"  // what needs no other thread: atomics and arithmetic
#include "tensor_cores.h"      // products of matrices

#undef CUDA_ON_HOST_CALL_SITE
