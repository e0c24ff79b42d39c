// The scheduler behind host.h: who runs next, and what to say when that is nobody.
#include "host.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>

#include "scheduler.h"

extern const int warpSize = 32;

namespace cuda_on_host {
namespace internal {

Here here;
std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<unsigned> runnable;
int at_barrier = 0;
Thread* current = nullptr;

namespace {

// Errors
bool expecting = false;  // inside of expect_error
std::string error;
unsigned long long launches = 0;

// The launch and its block
const std::function<void()>* body = nullptr;  // null outside of a launch
int alive = 0;                                // threads that have not returned
void* shared = nullptr;

Fiber host;  // the stack that called launch()
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle_fibers;

}  // namespace

// ---- Errors

std::string describe(uint3 v) {
  char text[48];
  std::snprintf(text, sizeof text, "(%u,%u,%u)", v.x, v.y, v.z);
  return text;
}

std::string describe(Where at) {
  return std::string(at.file_name()) + ":" + std::to_string(at.line()) + ", in " + at.function_name();
}

std::string launch_and_block() {
  return "launch " + std::to_string(launches) + ", block " + describe(here.block);
}

namespace {

// The first error is the one to tell: those after it are its consequences.
void report(const std::string& what) {
  const std::string message = "cuda_on_host: " + what;
  if (!expecting) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s\n", message.c_str());
    std::abort();
  }
  if (!error.empty()) return;
  error = message;
  set_error(cudaErrorLaunchFailure);
  for (Thread& thread : threads)
    if (thread.state == State::kWaiting) make_runnable(thread);  // only to leave: see go_on()
}

// ---- Scheduling

// Null when all have returned.
Thread* next_thread() {
  if (alive == 0) return nullptr;
  int next = choose(runnable);
  if (next < 0) {
    report(describe_stuck_block());
    next = choose(runnable);
  }
  return &threads[next];
}

void set_current(Thread& thread) {
  current = &thread;
  here.thread = thread.index;
  here.lane = number(thread) % 32;
}

void run_current() {
  try {
    if (error.empty()) (*body)();
    if (error.empty() && !current->copies.empty())
      report("a thread returned while its copies were under way, in " + launch_and_block());
  } catch (const Cancelled&) {
  } catch (const std::exception& exception) {
    report(std::string("the kernel threw ") + exception.what() + " in " + launch_and_block());
  } catch (...) {
    report("the kernel threw in " + launch_and_block());
  }
  stop(*current, State::kReturned);
  --alive;
}

// What every fiber does, forever: run one thread after the other. If none waits, one fiber does for a block.
void run_threads() {
  for (;;) {
    run_current();
    Fiber* fiber = std::exchange(current->fiber, nullptr);
    Thread* next = next_thread();
    if (next != nullptr) set_current(*next);
    if (next != nullptr && next->fiber == nullptr) {
      next->fiber = fiber;
      continue;
    }
    idle_fibers.push_back(fiber);
    fiber->switch_to(next == nullptr ? host : *next->fiber);  // comes back with a thread to start
  }
}

void switch_to(Fiber& from, Thread& thread) {
  set_current(thread);
  if (thread.fiber == nullptr) {
    if (idle_fibers.empty()) {
      fibers.push_back(std::make_unique<Fiber>(&run_threads));
      idle_fibers.push_back(fibers.back().get());
    }
    thread.fiber = idle_fibers.back();
    idle_fibers.pop_back();
  }
  from.switch_to(*thread.fiber);
}

// ---- Launching

void run_block(void* shared_memory, size_t shared_bytes) {
  shared = shared_memory;
  std::memset(shared, 0xFF, shared_bytes);
  for (Thread& thread : threads) make_runnable(thread);
  alive = static_cast<int>(threads.size());
  switch_to(host, *next_thread());
  if (!guards_intact(shared_memory, shared_bytes))
    report("shared memory was written outside of its bounds in " + launch_and_block());
}

void make_threads(dim3 block) {
  const unsigned count = (block.x * block.y * block.z + 31) / 32;
  threads.clear();
  warps.assign(count, {});
  runnable.assign(count, 0);
  at_barrier = 0;
  for (unsigned z = 0; z < block.z; ++z)
    for (unsigned y = 0; y < block.y; ++y)
      for (unsigned x = 0; x < block.x; ++x) {
        warps[threads.size() / 32].exists |= 1u << threads.size() % 32;
        threads.emplace_back().index = {x, y, z};
      }
}

}  // namespace

void go_on() {
  Thread& self = *current;
  Thread* next = next_thread();
  if (next != &self) switch_to(*self.fiber, *next);
  if (!error.empty()) throw Cancelled();
}

void fail(const std::string& what, Where at) {
  std::string text = what + " at " + describe(at);
  if (current != nullptr) text += "\n  in " + launch_and_block() + ", thread " + describe(here.thread);
  report(text);
  throw Cancelled();
}

void interrupt() {
  if (current != nullptr && draw(4) == 0) go_on();
}

}  // namespace internal

using namespace internal;

void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& run) {
  if (body != nullptr) fail("a launch from within a kernel", Where::current());
  if (!error.empty()) set_error(cudaErrorLaunchFailure);  // as on a device, nothing runs after a failure
  if (!error.empty() || !may_launch(kernel, grid, block, shared_bytes)) return;
  ++launches;
  body = &run;
  here.grid_dim = grid;
  here.block_dim = block;
  here.interrupts = order().kind == Order::kShuffled;
  make_threads(block);

  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  const BlockOrder order(blocks);
  const SharedMemory memory(shared_bytes);
  for (size_t i = 0; i < blocks && error.empty(); ++i) {
    const size_t b = order[i];
    here.block = make_uint3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    run_block(memory.get(), shared_bytes);
  }
  shared = nullptr;
  current = nullptr;
  body = nullptr;
  here.interrupts = false;
}

void* shared_memory() {
  if (current == nullptr) fail("shared_memory() outside of a kernel", Where::current());
  return shared;
}

std::string expect_error(const std::function<void()>& body) {
  expecting = true;
  try {
    body();
  } catch (const Cancelled&) {  // the mistake was outside of a kernel
  }
  expecting = false;
  if (!error.empty()) set_error(cudaSuccess);  // a device would stay broken
  return std::exchange(error, {});
}

void misaligned(const void* address, size_t alignment, Where at) {
  char text[80];
  std::snprintf(text, sizeof text, "misaligned access: %p is not a multiple of %zu", address, alignment);
  fail(text, at);
}

}  // namespace cuda_on_host
