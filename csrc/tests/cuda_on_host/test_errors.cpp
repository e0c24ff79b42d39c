// What host.h says to an incorrect kernel. Each mistake is made here on purpose.
#include <sys/wait.h>
#include <unistd.h>

#include <set>
#include <stdexcept>
#include <vector>

#include "../check.h"
#include "fiber.h"
#include "host.h"

namespace evit::tests {
namespace {

using cuda_on_host::expect_error;
using cuda_on_host::for_each_order;
using cuda_on_host::shared_memory;

constexpr unsigned kAll = 0xffffffff;

volatile int sink = 0;  // so that a read is not optimised away

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  cuda_on_host::launch(nullptr, grid, block, shared_bytes, body);
}

std::string error_of(dim3 grid, dim3 block, const std::function<void()>& body) {
  const std::string message = expect_error([&] { run(grid, block, 64, body); });
  int runs = 0;
  run(2, 64, 0, [&] {
    __syncthreads();
    runs += __ballot_sync(kAll, 1) == kAll;
  });
  CHECK(runs == 128 && cudaGetLastError() == cudaSuccess);  // nothing of the failure is left over
  return message;
}

void check_says(const std::string& message, const std::vector<std::string>& parts) {
  for (const std::string& part : parts)
    if (message.find(part) == std::string::npos) {
      std::printf("missing: %s\nin: %s\n", part.c_str(), message.c_str());
      CHECK(!"the message says what it should");
    }
}

// What a child process that does this writes to stderr before it dies; empty if it survives.
std::string last_words(const std::function<void()>& body) {
  int ends[2];
  if (pipe(ends) != 0) return "";
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    body();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, n);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return status == 0 ? "" : "died: " + text;
}

// The results of a kernel on one block under all orders.
std::set<std::vector<int>> results(const std::function<void(int* shared, int* out)>& kernel) {
  std::set<std::vector<int>> all;
  for_each_order([&] {
    std::vector<int> out(64, 0);
    run(1, 64, 64 * sizeof(int), [&] { kernel(static_cast<int*>(shared_memory()), out.data()); });
    all.insert(out);
  });
  return all;
}

}  // namespace

TEST(cuda_error_thread_misses_barrier) {
  for_each_order([] {
    const std::string returned = error_of(dim3(1, 2), 128, [] {
      if (threadIdx.x == 100 && blockIdx.y == 1) return;
      __syncthreads();
    });
    check_says(returned,
               {"barrier divergence in launch ", "block (0,1,0) of (128,1,1) threads", "thread 100: returned",
                "threads 0-99, 101-127: waiting in __syncthreads at ", "test_errors.cpp:"});
    const std::string branch = error_of(1, 64, [] {
      if (threadIdx.x < 10)
        __syncthreads();
      else
        __syncthreads();
    });
    check_says(branch,
               {"barrier divergence", "threads 0-9: waiting in __syncthreads", "threads 10-63: waiting in"});
    const std::string collective = error_of(1, 32, [] {
      if (threadIdx.x == 3)
        __shfl_sync(kAll, 1, 0);
      else
        __syncthreads();
    });
    check_says(collective, {"thread 3: waiting in __shfl_sync with mask 0xffffffff",
                            "threads 0-2, 4-31: waiting in __sync"});
    const std::string kinds =
        error_of(1, 32, [] { threadIdx.x == 0 ? __syncthreads_or(1) : __syncthreads_and(1); });
    check_says(kinds,
               {"thread 0: waiting in __syncthreads_or", "threads 1-31: waiting in __syncthreads_and"});
  });
}

TEST(cuda_error_lane_misses_collective) {
  for_each_order([] {
    const std::string returned = error_of(1, 64, [] {
      if (threadIdx.x == 40) return;
      __ballot_sync(kAll, 1);
    });
    check_says(returned,
               {"warp divergence", "thread 40: returned", "threads 32-39, 41-63: waiting in __ballot_sync"});
    const std::string branch = error_of(1, 32, [] {
      if (threadIdx.x % 2 == 0)
        __syncwarp();
      else
        __syncwarp();
    });
    check_says(branch, {"warp divergence", "waiting in __syncwarp with mask 0xffffffff"});
    const std::string masks = error_of(
        1, 32, [] { __shfl_xor_sync(threadIdx.x < 16 ? 0xffffu : kAll, 1, threadIdx.x < 16 ? 1 : 0); });
    check_says(masks, {"warp divergence", "threads 16-31: waiting in __shfl_xor_sync with mask 0xffffffff"});
    check_says(error_of(1, 3, [] { __syncwarp(threadIdx.x == 0 ? 3 : 7); }),
               {"mask 0x00000003", "mask 0x00000007"});
    // Two calls on one line are two places.
    check_says(error_of(1, 32, [] { threadIdx.x == 0 ? __syncwarp() : __syncwarp(); }), {"warp divergence"});
    // Also where the lanes run in lock step on most devices.
    const std::string late = error_of(1, 32, [] {
      if (threadIdx.x == 0) __syncwarp(1);
      if (threadIdx.x > 0) __all_sync(kAll, 1);
    });
    check_says(late, {"thread 0: returned"});
  });
}

TEST(cuda_error_bad_masks) {
  for_each_order([] {
    check_says(error_of(1, 32, [] { __syncwarp(0x7fffffff); }),
               {"__syncwarp: the mask lacks the calling lane", "thread (31,0,0)"});
    check_says(error_of(1, 16, [] { __syncwarp(); }), {"the mask names lanes that the block lacks"});
    const std::string outside = error_of(dim3(1, 1, 2), dim3(4, 4), [] {
      if (threadIdx.y < 2) __shfl_down_sync(0xff, 1, 1);
    });
    check_says(outside, {"__shfl_down_sync reads lane 8, which the mask lacks", "thread (3,1,0)"});
    check_says(error_of(1, 32, [] { __shfl_sync(kAll, 1, 0, 12); }), {"a shuffle of width 12"});
    check_says(error_of(1, 32, [] { __shfl_sync(kAll, 1, 0, 64); }), {"a shuffle of width 64"});
  });
}

TEST(cuda_error_inside_a_thread) {
  const std::string trap = error_of(3, dim3(2, 2), [] {
    if (blockIdx.x == 2 && threadIdx.y == 1) __trap();
  });
  check_says(trap, {"__trap() at ", "test_errors.cpp:", "launch ", "block (2,0,0)", "thread (0,1,0)"});
  check_says(error_of(1, 1, [] { throw std::runtime_error("oops"); }), {"the kernel threw oops in launch"});
  check_says(error_of(1, 1, [] { run(1, 1, 0, [] {}); }), {"a launch from within a kernel"});
  check_says(expect_error([] { __syncthreads(); }), {"__syncthreads outside of a kernel"});
  check_says(expect_error([] { shared_memory(); }), {"shared_memory() outside of a kernel"});
  CHECK(expect_error([] { run(1, 32, 0, [] { __syncthreads(); }); }).empty());
}

TEST(cuda_error_misaligned) {
  alignas(16) char memory[32] = {};
  const auto at = [&]<class T>(int offset, T) { return reinterpret_cast<T*>(memory + offset); };
  check_says(error_of(1, 1, [&] { cuda_on_host::check_aligned(memory + 8, 16); }),
             {"misaligned access: ", "is not a multiple of 16 at ", "thread (0,0,0)"});
  check_says(error_of(1, 1, [&] { __ldg(at(8, float4())); }), {"not a multiple of 16"});
  check_says(error_of(1, 1, [&] { atomicAdd(at(2, 1u), 1); }), {"not a multiple of 4"});
  CHECK(error_of(1, 1, [&] { __ldg(at(16, float4())); }).empty());
}

TEST(cuda_error_ends_everything) {
  struct Counted {
    int& count;
    explicit Counted(int& count) : count(++count) {}
    ~Counted() { --count; }
  };
  for_each_order([] {
    int open = 0, passed = 0, blocks = 0;
    bool refused = false;
    const std::string message = expect_error([&] {
      run(5, 64, 0, [&] {
        const Counted guard(open);
        blocks += threadIdx.x == 0;
        if (threadIdx.x == 5) __trap();
        __syncthreads();
        ++passed;
      });
      refused = cudaGetLastError() == cudaErrorLaunchFailure;
      run(1, 1, 0, [&] { ++passed; });
      refused &= cudaDeviceSynchronize() == cudaErrorLaunchFailure;
    });
    check_says(message, {"__trap()"});
    CHECK(open == 0 && passed == 0 && blocks <= 1 && refused);
    CHECK(cudaGetLastError() == cudaSuccess);
  });
}

TEST(cuda_error_aborts) {
  const std::string words = last_words([] { run(1, 1, 0, [] { __trap(); }); });
  check_says(words, {"died: ", "cuda_on_host: __trap() at ", "launch ", "thread (0,0,0)"});
  // A stack that overflows hits its guard page.
  check_says(last_words([] {
               run(1, 1, 0, [] {
                 volatile char big[1 << 20];
                 for (int i = (1 << 20) - 1; i >= 0; i -= 512) big[i] = 1;
                 sink = big[0];
               });
             }),
             {"died: "});
  CHECK(last_words([] { run(1, 1, 0, [] {}); }).empty());
}

TEST(cuda_error_out_of_bounds) {
  const auto read_beyond = [] {
    run(1, 32, 128, [] { sink = static_cast<int*>(shared_memory())[threadIdx.x + 1]; });
  };
  const auto write = [](int index) {
    return [index] {
      run(1, 32, 128, [&] {
        volatile int* shared = static_cast<int*>(shared_memory());
        if (threadIdx.x == 0) shared[index] = 1;
      });
    };
  };
#if CUDA_ON_HOST_ASAN
  const auto read_freed = [] {
    int* memory = nullptr;
    cudaMalloc(&memory, 10 * sizeof(int));
    run(1, 1, 0, [&] { sink = memory[10]; });
  };
  check_says(last_words(read_beyond),
             {"AddressSanitizer: heap-buffer-overflow", "READ of size 4", "0 bytes "});
  check_says(last_words(read_freed), {"AddressSanitizer: heap-buffer-overflow", "READ of size 4"});
  check_says(last_words(write(32)), {"AddressSanitizer: heap-buffer-overflow", "WRITE of size 4"});
  check_says(last_words(write(-1)), {"AddressSanitizer: heap-buffer-overflow", "WRITE of size 4"});
#else
  (void)read_beyond;
  std::printf("note   cuda_error_out_of_bounds: reads beyond memory need a build with -fsanitize=address\n");
  for (const int index : {32, 40, -1, -16})
    check_says(expect_error(write(index)), {"shared memory was written outside of its bounds in launch "});
#endif
  CHECK(expect_error(write(31)).empty());
}

// The two other kinds of mistake do not stop a kernel: they make its result depend on the order.

TEST(cuda_race_missing_barrier) {
  const auto rotate = [](bool barrier) {
    return results([barrier](int* shared, int* out) {
      shared[threadIdx.x] = threadIdx.x;
      if (barrier) __syncthreads();
      out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
    });
  };
  CHECK(rotate(true).size() == 1);
  CHECK(rotate(false).size() > 2);
}

TEST(cuda_race_unordered_writes) {
  const auto last_writer = results([](int*, int* out) { out[0] = threadIdx.x; });
  CHECK(last_writer.size() > 3);
  CHECK(results([](int*, int* out) { atomicMax(out, threadIdx.x); }).size() == 1);

  const auto lost_updates = results([](int*, int* out) {
    const int before = out[0];
    cuda_on_host::interleave();
    out[0] = before + 1;
  });
  CHECK(lost_updates.size() > 1);
  CHECK(results([](int*, int* out) { atomicAdd(out, 1); }).size() == 1);

  // Atomics alone do not help who looks at the value again.
  CHECK(results([](int*, int* out) {
          atomicAdd(&out[0], 1);
          out[1 + threadIdx.x % 63] = out[0];
        }).size() > 2);

  // Within a warp as well: lanes are not in step by themselves.
  const auto neighbour = [](bool barrier) {
    return results([barrier](int* shared, int* out) {
      shared[threadIdx.x] = threadIdx.x;
      if (barrier) __syncwarp();
      out[threadIdx.x] = shared[threadIdx.x ^ 1];
    });
  };
  CHECK(neighbour(true).size() == 1 && neighbour(false).size() > 2);
}

#define TEXT_OF(x) #x
#define TEXT_OF_EXPANDED(x) TEXT_OF(x)
static_assert(std::string_view(TEXT_OF_EXPANDED(__shared__)).starts_with("call_cuda_on_host_shared_memory"));

}  // namespace evit::tests
