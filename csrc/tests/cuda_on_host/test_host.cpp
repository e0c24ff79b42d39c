// What host.h gives a correct kernel, each piece against its definition and under every order.
// Its complaints about incorrect ones are in test_errors.cpp.
#include "host.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "../check.h"

namespace evit::tests {
namespace {

using cuda_on_host::for_each_order;
using cuda_on_host::shared_memory;

constexpr unsigned kAll = 0xffffffff;

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  cuda_on_host::launch(nullptr, grid, block, shared_bytes, body);
  CHECK(cudaGetLastError() == cudaSuccess);
}

// What each thread of a single block returns.
template <class T, class Kernel>
std::vector<T> values(int threads, Kernel kernel) {
  std::vector<T> result(threads);
  run(1, threads, 0, [&] { result[threadIdx.x] = kernel(static_cast<int>(threadIdx.x)); });
  return result;
}

}  // namespace

TEST(cuda_indices) {
  for_each_order([] {
    const dim3 grid(3, 2, 4), block(5, 3, 2);
    std::vector<int> visits(3 * 2 * 4 * 5 * 3 * 2);
    bool dimensions = true, lanes = true;
    run(grid, block, 0, [&] {
      const int thread = (threadIdx.z * 3 + threadIdx.y) * 5 + threadIdx.x;
      ++visits[((blockIdx.z * 2 + blockIdx.y) * 3 + blockIdx.x) * 30 + thread];
      dimensions &= gridDim.x == 3 && gridDim.y == 2 && gridDim.z == 4;
      dimensions &= blockDim.x == 5 && blockDim.y == 3 && blockDim.z == 2;
      // Lanes are counted along x first, then y and z.
      lanes &= __ballot_sync((1u << 30) - 1, thread == 17) == 1u << 17;
      lanes &= threadIdx.x < 5 && threadIdx.y < 3 && threadIdx.z < 2;  // still those of this thread
    });
    CHECK(std::count(visits.begin(), visits.end(), 1) == static_cast<long>(visits.size()));
    CHECK(dimensions && lanes);
  });
  CHECK(warpSize == 32);
}

TEST(cuda_orders) {
  using cuda_on_host::shuffled;
  const auto trace = [](cuda_on_host::Order order) {
    cuda_on_host::set_order(order);
    std::vector<unsigned> seen;
    run(3, 40, 0, [&] { seen.push_back(blockIdx.x * 40 + threadIdx.x); });
    cuda_on_host::set_order(cuda_on_host::forward);
    return seen;
  };
  std::vector<unsigned> ascending(120);
  std::iota(ascending.begin(), ascending.end(), 0);
  const std::vector<unsigned> descending(ascending.rbegin(), ascending.rend());
  std::vector<unsigned> one = trace(shuffled(1)), two = trace(shuffled(2));
  CHECK(trace(cuda_on_host::forward) == ascending);
  CHECK(trace(cuda_on_host::reverse) == descending);
  CHECK(one != ascending && one != descending && one != two);
  CHECK(one == trace(shuffled(1)));
  std::sort(one.begin(), one.end());
  CHECK(one == ascending);

  std::vector<std::string> names;
  cuda_on_host::set_order(cuda_on_host::reverse);
  for_each_order([&](cuda_on_host::Order order) { names.push_back(order.name()); }, 2);
  CHECK((names == std::vector<std::string>{"forward", "reverse", "shuffled(1)", "shuffled(2)"}));
  CHECK(cuda_on_host::order().kind == cuda_on_host::Order::kReverse);
  cuda_on_host::set_order(cuda_on_host::forward);
}

TEST(cuda_syncthreads) {
  for_each_order([] {
    for (const int threads : {1, 31, 64, 200, 1024}) {
      int wrong = 0;
      run(3, threads, threads * sizeof(int), [&] {
        int* shared = static_cast<int*>(shared_memory());
        const int t = threadIdx.x;
        for (int round = 0; round < 5; ++round) {
          shared[t] = round * 10000 + t;
          __syncthreads();
          const int other = (t + 37 * round) % threads;
          wrong += shared[other] != round * 10000 + other;
          __syncthreads();
        }
      });
      CHECK(wrong == 0);
    }
  });
}

TEST(cuda_syncthreads_votes) {
  for_each_order([] {
    for (const int limit : {0, 1, 50, 99, 100}) {
      int wrong = 0;
      run(1, 100, 0, [&] {
        const int predicate = static_cast<int>(threadIdx.x) < limit ? -4 : 0;  // any value but 0 is true
        wrong += __syncthreads_count(predicate) != limit;
        wrong += (__syncthreads_or(predicate) != 0) != (limit > 0);
        wrong += (__syncthreads_and(predicate) != 0) != (limit == 100);
      });
      CHECK(wrong == 0);
    }
  });
}

template <class T>
void check_shuffles(T scale) {
  // Not every value fits into half of its bits.
  const auto value = [&](int lane) { return static_cast<T>(scale * static_cast<T>(lane + 1)); };
  for (int width = 1; width <= 32; width *= 2)
    for (int delta = 0; delta < 32; ++delta) {
      const auto indexed =
          values<T>(64, [&](int t) { return __shfl_sync(kAll, value(t), delta + 3, width); });
      const auto up = values<T>(64, [&](int t) { return __shfl_up_sync(kAll, value(t), delta, width); });
      const auto down = values<T>(64, [&](int t) { return __shfl_down_sync(kAll, value(t), delta, width); });
      const auto crossed =
          values<T>(64, [&](int t) { return __shfl_xor_sync(kAll, value(t), delta, width); });
      for (int t = 0; t < 64; ++t) {
        const int begin = t / width * width, end = begin + width;
        CHECK(indexed[t] == value(begin + (delta + 3) % width));
        CHECK(up[t] == value(t - delta >= begin ? t - delta : t));
        CHECK(down[t] == value(t + delta < end ? t + delta : t));
        CHECK(crossed[t] == value((t ^ delta) < end ? t ^ delta : t));
      }
    }
}

TEST(cuda_shuffles) {
  check_shuffles<int>(-0x1234567);
  check_shuffles<unsigned>(0x1234567);
  check_shuffles<long long>(-0x123456789abcdef);
  check_shuffles<unsigned long long>(0x123456789abcdef);
  check_shuffles<float>(0.1f);
  check_shuffles<double>(0.1);
  for_each_order([] { check_shuffles<int>(7); });
}

TEST(cuda_shuffles_are_in_step) {
  for_each_order([] {
    int wrong = 0;
    run(2, 96, 0, [&] {
      const int lane = threadIdx.x % 32;
      for (int i = 0; i < 20; ++i)
        wrong += __shfl_sync(kAll, 1000 * i + lane, i + lane) != 1000 * i + (i + lane) % 32;
      int total = lane;
      for (int offset = 16; offset > 0; offset /= 2) total += __shfl_down_sync(kAll, total, offset);
      wrong += lane == 0 && total != 31 * 32 / 2;
    });
    CHECK(wrong == 0);
  });
}

TEST(cuda_partial_masks) {
  for_each_order([] {
    int wrong = 0;
    run(1, 48, 0, [&] {
      const int t = threadIdx.x, lane = t % 32;
      if (t >= 32) {  // the last warp has 16 lanes
        wrong += __shfl_xor_sync(0xffff, t, 1) != (t ^ 1);
        wrong += !__all_sync(0xffff, 1) + (__ballot_sync(0xffff, lane & 1) != 0xaaaa);
        return;  // all of it: nobody waits for them
      }
      const unsigned even = 0x55555555;
      if (lane % 2 == 0) {
        wrong += __shfl_sync(even, lane, lane + 2) != (lane + 2) % 32;
        wrong += __ballot_sync(even, lane < 6) != 0x15;
        __syncwarp(even);
      } else {
        // A part of the others meets more often.
        if (lane < 8) wrong += __shfl_up_sync(0xaau, lane, 2) != (lane >= 3 ? lane - 2 : lane);
        wrong += !__any_sync(~even, lane == 31);
      }
      __syncwarp();
      wrong += __ballot_sync(kAll, 1) != kAll;
    });
    CHECK(wrong == 0);
  });
}

TEST(cuda_votes_matches_reductions) {
  for_each_order([] {
    int wrong = 0;
    run(1, 64, 0, [&] {
      const int lane = threadIdx.x % 32;
      const unsigned value = lane * 2654435761u;
      wrong += __ballot_sync(kAll, lane % 3 == 0 ? 256 : 0) != 0x49249249;
      wrong += (__any_sync(kAll, lane == 9) == 0) + (__any_sync(kAll, 0) != 0);
      wrong += (__all_sync(kAll, lane != 9) != 0) + (__all_sync(kAll, 2) == 0);
      wrong += __match_any_sync(kAll, lane / 8) != 0xffu << lane / 8 * 8;
      wrong += __match_any_sync(kAll, (lane % 2) * (1ull << 40)) != (lane % 2 == 0 ? 0x55555555 : 0xaaaaaaaa);
      wrong += __match_any_sync(kAll, lane == 4 ? 0.5f : 1.5f) != (lane == 4 ? 1u << 4 : ~(1u << 4));
      unsigned sum = 0, least = kAll, most = 0;
      for (unsigned other = 0; other < 32; ++other) {
        sum += other * 2654435761u;
        least = std::min(least, other * 2654435761u);
        most = std::max(most, other * 2654435761u);
      }
      wrong += (__reduce_add_sync(kAll, value) != sum) + (__reduce_min_sync(kAll, value + 1) != least + 1) +
               (__reduce_max_sync(kAll, value) != most);
    });
    CHECK(wrong == 0);
  });
}

template <class T>
void check_integer_atomics() {
  T sum = 0, least = 900, most = 0, bits = 0, kept = static_cast<T>(~T{0}), last = 0, largest = 0;
  std::vector<T> before(1000);
  run(4, 250, 0, [&] {
    const T i = blockIdx.x * 250 + threadIdx.x;
    before[i] = atomicAdd(&sum, 1);
    atomicMin(&least, i + 5);
    atomicMax(&most, i);
    atomicOr(&bits, T{1} << (i % 30));
    atomicAnd(&kept, ~(T{1} << (i % 30)));
    atomicExch(&last, i + 1);
    for (T seen = largest, expected; seen < i;) {  // a maximum by compare and swap
      expected = seen;
      seen = atomicCAS(&largest, expected, i);
      if (seen == expected) break;
    }
  });
  std::sort(before.begin(), before.end());
  for (T i = 0; i < 1000; ++i) CHECK(before[i] == i);
  CHECK(sum == 1000 && least == 5 && most == 999 && largest == 999);
  CHECK(bits == (T{1} << 30) - 1 && kept == static_cast<T>(~bits));
  CHECK(last >= 1 && last <= 1000);
}

TEST(cuda_atomics) {
  for_each_order([] {
    check_integer_atomics<int>();
    check_integer_atomics<unsigned>();
    check_integer_atomics<unsigned long long>();
    float f = 0;
    double d = 0;
    long long least = 0, most = 0;
    run(2, 100, 0, [&] {
      atomicAdd(&f, 0.5f);
      atomicAdd(&d, 0.25);
      atomicMin(&least, -static_cast<long long>(threadIdx.x));
      atomicMax(&most, threadIdx.x);
    });
    CHECK(f == 100 && d == 50 && least == -99 && most == 99);
  });
  int wraps = std::numeric_limits<int>::max();
  run(1, 1, 0, [&] { CHECK(atomicAdd(&wraps, 1) == std::numeric_limits<int>::max()); });
  CHECK(wraps == std::numeric_limits<int>::min());
}

TEST(cuda_intrinsics) {
  CHECK(__popc(0xf00f0001) == 9 && __popcll(~0ull) == 64);
  CHECK(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0 && __clzll(0) == 64 && __clzll(1ll << 40) == 23);
  CHECK(__ffs(0) == 0 && __ffs(1) == 1 && __ffs(-0x80000000ll) == 32 && __ffsll(1ll << 40) == 41 &&
        __ffsll(0) == 0);
  CHECK(__brev(1) == 0x80000000 && __brev(0x12345678) == 0x1e6a2c48);
  CHECK(__float_as_uint(-2.f) == 0xc0000000 && __uint_as_float(0x3f800000) == 1);
  CHECK(__float_as_int(-0.f) == std::numeric_limits<int>::min() && __int_as_float(0x40400000) == 3);
  CHECK(__double_as_longlong(1) == 0x3ff0000000000000 && __longlong_as_double(0x4000000000000000) == 2);
  CHECK(__fdividef(3, 4) == 0.75f && rsqrtf(16) == 0.25f && rsqrt(0.25) == 2 && fmaf(2, 3, 4) == 10);
  CHECK_NEAR(__expf(1), 2.718281828, 1e-6);
  CHECK_NEAR(__logf(2), 0.693147181, 1e-6);
  const float4 v = {1, 2, 3, 4};
  CHECK(__ldg(&v).w == 4);

  const int64_t big = int64_t{1} << 40;
  CHECK(min(3, big) == 3 && max(3, big) == big && min(-1, 2) == -1 && max(-1, 2u) == 0xffffffff);
  CHECK(min(2.f, 1.5f) == 1.5f && max(2.0, 1.5f) == 2);
  CHECK(min(NAN, 1.f) == 1 && min(1.f, NAN) == 1 && max(NAN, 1.f) == 1 && max(1.f, NAN) == 1);
  static_assert(std::is_same_v<decltype(min(1, 2ll)), long long> &&
                std::is_same_v<decltype(max(1.f, 2.f)), float>);
}

TEST(cuda_vector_types) {
  static_assert(sizeof(uint2) == 8 && alignof(uint2) == 8 && sizeof(uint4) == 16 && alignof(uint4) == 16);
  static_assert(sizeof(int2) == 8 && alignof(int2) == 8 && sizeof(int4) == 16 && alignof(int4) == 16);
  static_assert(sizeof(float2) == 8 && alignof(float2) == 8 && sizeof(float4) == 16 && alignof(float4) == 16);
  static_assert(sizeof(double2) == 16 && alignof(double2) == 16 && alignof(longlong2) == 16);
  static_assert(sizeof(ulonglong2) == 16 && alignof(ulonglong2) == 16);
  static_assert(sizeof(uint3) == 12 && sizeof(dim3) == 12);
  static_assert(make_uint4(1, 2, 3, 4).w == 4 && make_float2(1, 2).y == 2 && make_longlong2(1, -2).y == -2);
  static_assert(dim3(7).x == 7 && dim3(7).y == 1 && dim3().z == 1);
}

TEST(cuda_shared_memory) {
  for_each_order([] {
    for (const size_t bytes : {size_t{0}, size_t{4}, size_t{100}, size_t{48 << 10}}) {
      bool garbage = true, aligned = true, same = true;
      int blocks = 0;
      void* address = nullptr;
      run(3, 33, bytes, [&] {
        unsigned char* memory = static_cast<unsigned char*>(shared_memory());
        blocks += threadIdx.x == 0;
        aligned &= reinterpret_cast<uintptr_t>(memory) % 16 == 0;
        if (threadIdx.x == 0) address = memory;
        for (size_t i = threadIdx.x; i < bytes; i += blockDim.x) garbage &= memory[i] == 0xFF;
        __syncthreads();
        same &= memory == address;
        for (size_t i = threadIdx.x; i < bytes; i += blockDim.x) memory[i] = 0;  // gone before the next block
      });
      CHECK(garbage && aligned && same && blocks == 3);
    }
  });
  float unset = 0;
  run(1, 1, 4, [&] { unset = *static_cast<float*>(shared_memory()); });
  CHECK(std::isnan(unset));
}

__global__ void takes_much_shared_memory() {}

TEST(cuda_refused_launches) {
  int runs = 0;
  const auto launch = [&](dim3 grid, dim3 block, size_t shared_bytes = 0) {
    const auto kernel = reinterpret_cast<const void*>(&takes_much_shared_memory);
    runs = 0;
    cuda_on_host::launch(kernel, grid, block, shared_bytes, [&] { ++runs; });
    const cudaError_t error = cudaPeekAtLastError();
    CHECK(cudaGetLastError() == error && cudaGetLastError() == cudaSuccess);
    CHECK(error == cudaSuccess || runs == 0);
    return error;
  };
  CHECK(launch(2, dim3(8, 8, 16)) == cudaSuccess && runs == 2048);
  CHECK(launch(dim3(1, 65535), 1) == cudaSuccess && launch(dim3(1, 1, 65535), 1) == cudaSuccess);
  for (const dim3 block : {dim3(0), dim3(1, 0), dim3(1, 1, 0), dim3(1025), dim3(32, 33), dim3(1, 1, 65),
                           dim3(65536, 65536), dim3(1u << 31, 2, 1)})
    CHECK(launch(1, block) == cudaErrorInvalidConfiguration);
  for (const dim3 grid :
       {dim3(0), dim3(1, 0), dim3(1, 1, 0), dim3(1u << 31), dim3(1, 65536), dim3(1, 1, 65536)})
    CHECK(launch(grid, 1) == cudaErrorInvalidConfiguration);

  CHECK(launch(1, 1, 48 << 10) == cudaSuccess);
  CHECK(launch(1, 1, (48 << 10) + 1) == cudaErrorInvalidValue);
  const auto raise = [](int bytes) {
    return cudaFuncSetAttribute(takes_much_shared_memory, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  CHECK(raise((227 << 10) + 1) == cudaErrorInvalidValue && raise(-1) == cudaErrorInvalidValue);
  CHECK(cudaGetLastError() == cudaErrorInvalidValue);
  CHECK(raise(100 << 10) == cudaSuccess);
  CHECK(launch(1, 1, 100 << 10) == cudaSuccess && launch(1, 1, (100 << 10) + 1) == cudaErrorInvalidValue);
  cuda_on_host::launch(nullptr, 1, 1, 100 << 10, [] {});  // another kernel's limit is its own
  CHECK(cudaGetLastError() == cudaErrorInvalidValue);
  CHECK(raise(48 << 10) == cudaSuccess);
}

TEST(cuda_runtime_api) {
  int value = 0;
  const auto attribute = [&](cudaDeviceAttr which) {
    CHECK(cudaDeviceGetAttribute(&value, which, 0) == cudaSuccess);
    return value;
  };
  const cuda_on_host::Device before = cuda_on_host::device();
  cuda_on_host::device().multiprocessors = 7;
  cuda_on_host::device().count = 2;
  CHECK(attribute(cudaDevAttrMultiProcessorCount) == 7 && attribute(cudaDevAttrWarpSize) == 32);
  CHECK(attribute(cudaDevAttrMaxSharedMemoryPerBlock) == 48 << 10);
  CHECK(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) == 227 << 10);
  CHECK(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) == 228 << 10);
  CHECK(attribute(cudaDevAttrMaxThreadsPerMultiProcessor) == 2048);
  CHECK(attribute(cudaDevAttrMaxThreadsPerBlock) == 1024);
  CHECK(attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
        attribute(cudaDevAttrComputeCapabilityMinor) == 0);
  CHECK(cudaGetDeviceCount(&value) == cudaSuccess && value == 2);
  CHECK(cudaSetDevice(1) == cudaSuccess && cudaGetDevice(&value) == cudaSuccess && value == 1);
  CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice && cudaGetLastError() == cudaErrorInvalidDevice);
  CHECK(cudaSetDevice(0) == cudaSuccess);
  cuda_on_host::device() = before;

  unsigned* memory = nullptr;
  unsigned host[2] = {1, 2};
  CHECK(cudaMalloc(&memory, sizeof host) == cudaSuccess && memory[0] == 0xffffffff &&
        memory[1] == 0xffffffff);
  CHECK(cudaMemsetAsync(memory, 3, sizeof *memory, nullptr) == cudaSuccess && memory[0] == 0x03030303);
  CHECK(cudaMemcpyAsync(memory + 1, host, sizeof *host, cudaMemcpyHostToDevice, nullptr) == cudaSuccess);
  CHECK(cudaMemcpy(host, memory, sizeof host, cudaMemcpyDeviceToHost) == cudaSuccess);
  CHECK(host[0] == 0x03030303 && host[1] == 1);
  CHECK(cudaStreamSynchronize(nullptr) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess);
  CHECK(cudaFree(memory) == cudaSuccess && cudaFree(nullptr) == cudaSuccess);
  CHECK(std::string(cudaGetErrorName(cudaErrorInvalidValue)) == "cudaErrorInvalidValue");
  CHECK(std::string(cudaGetErrorString(cudaErrorInvalidConfiguration)) == "invalid configuration argument");
}

}  // namespace evit::tests
