// The scheduler behind cuda_on_host.h: who runs next, who waits for whom, what to say when all are stuck.
#include "cuda_on_host.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "cuda_on_host_fiber.h"
#include "cuda_on_host_internal.h"

extern const int warpSize = 32;

namespace cuda_on_host {

internal::Here internal::here;

namespace {

using internal::Combine;
using internal::here;

// Ends a thread of a launch that has failed: thrown where the thread waits, it unwinds its stack.
struct Cancelled {};

// A meeting that a thread waits for.
struct Wait {
  const char* name;
  Where at;
  unsigned mask;  // 0: all of the block

  bool operator==(const Wait& other) const {
    return mask == other.mask && at.line() == other.at.line() && at.column() == other.at.column() &&
           std::strcmp(name, other.name) == 0 && std::strcmp(at.file_name(), other.at.file_name()) == 0;
  }
};

enum class State { kRunnable, kWaiting, kReturned };

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;

  void run() const {
    if (from != nullptr)
      std::memcpy(to, from, bytes);
    else
      std::memset(to, 0, bytes);
  }
};

struct Thread {
  uint3 index = {};
  State state = State::kReturned;
  Fiber* fiber = nullptr;  // from its first step to its last
  Wait wait = {};
  uint64_t value = 0;  // what it brings to the meeting, and
  int source = 0;
  uint64_t result = 0;            // what it takes away
  std::vector<Copy> copies = {};  // under way
};

struct Warp {
  unsigned exists = 0;
  unsigned waiting = 0;  // for others of the warp, not of the block
};

// Errors
bool expecting = false;  // inside of expect_error
std::string error;
unsigned long long launches = 0;

// The launch and its block
const std::function<void()>* body = nullptr;  // null outside of a launch
std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<unsigned> runnable;  // the lanes of each warp
int alive = 0;                   // threads that have not returned
int at_barrier = 0;              // threads that wait for the block
void* shared = nullptr;
Thread* current = nullptr;

Fiber host;  // the stack that called launch()
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle_fibers;

int number(const Thread& thread) { return static_cast<int>(&thread - threads.data()); }

void make_runnable(Thread& thread) {
  thread.state = State::kRunnable;
  runnable[number(thread) / 32] |= 1u << number(thread) % 32;
}

void stop(Thread& thread, State state) {
  thread.state = state;
  runnable[number(thread) / 32] &= ~(1u << number(thread) % 32);
}

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
  internal::set_error(cudaErrorLaunchFailure);
  for (Thread& thread : threads)
    if (thread.state == State::kWaiting) make_runnable(thread);  // only to leave: see go_on()
}

// "threads 0-3, 7" of numbers that ascend.
std::string describe(const std::vector<int>& numbers) {
  std::string text = numbers.size() == 1 ? "thread " : "threads ";
  for (size_t i = 0; i < numbers.size(); ++i) {
    const size_t first = i;
    while (i + 1 < numbers.size() && numbers[i + 1] == numbers[i] + 1) ++i;
    text += (first == 0 ? "" : ", ") + std::to_string(numbers[first]);
    if (i > first) text.append("-").append(std::to_string(numbers[i]));
  }
  return text;
}

std::string describe_stuck_block() {
  const bool of_block = at_barrier > 0;
  std::vector<std::pair<std::string, std::vector<int>>> groups;
  for (const Thread& thread : threads) {
    const Wait& wait = thread.wait;
    std::string what = "returned";
    if (thread.state == State::kWaiting) {
      char mask[32] = "";
      if (wait.mask != 0) std::snprintf(mask, sizeof mask, " with mask 0x%08x", wait.mask);
      what = std::string("waiting in ") + wait.name + mask + " at " + describe(wait.at);
    } else if (!of_block && warps[number(thread) / 32].waiting == 0) {
      continue;  // nobody misses it
    }
    auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == what; });
    if (group == groups.end()) group = groups.insert(group, {what, {}});
    group->second.push_back(number(thread));
  }
  std::string text = of_block ? "barrier divergence" : "warp divergence";
  text += " in " + launch_and_block() + " of " + describe(here.block_dim) + " threads: nobody can go on";
  for (const auto& [what, numbers] : groups) text += "\n  " + describe(numbers) + ": " + what;
  return text;
}

// ---- Scheduling

// Null when all have returned.
Thread* next_thread() {
  if (alive == 0) return nullptr;
  int next = internal::choose(runnable);
  if (next < 0) {
    report(describe_stuck_block());
    next = internal::choose(runnable);
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

// Gives way to whoever is next; comes back when it is this thread's turn.
void go_on() {
  Thread& self = *current;
  Thread* next = next_thread();
  if (next != &self) switch_to(*self.fiber, *next);
  if (!error.empty()) throw Cancelled();
}

// ---- Launching

void run_block(void* shared_memory, size_t shared_bytes) {
  shared = shared_memory;
  std::memset(shared, 0xFF, shared_bytes);
  for (Thread& thread : threads) make_runnable(thread);
  alive = static_cast<int>(threads.size());
  switch_to(host, *next_thread());
  if (!internal::guards_intact(shared_memory, shared_bytes))
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

Thread& enter_meeting(const char* name, Where at) {
  if (current == nullptr) internal::fail(std::string(name) + " outside of a kernel", at);
  return *current;
}

}  // namespace

void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& run) {
  if (body != nullptr) internal::fail("a launch from within a kernel", Where::current());
  if (!error.empty())
    internal::set_error(cudaErrorLaunchFailure);  // as on a device, nothing runs after a failure
  if (!error.empty() || !internal::may_launch(kernel, grid, block, shared_bytes)) return;
  ++launches;
  body = &run;
  here.grid_dim = grid;
  here.block_dim = block;
  here.interrupts = order().kind == Order::kShuffled;
  make_threads(block);

  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  const internal::BlockOrder order(blocks);
  const internal::SharedMemory memory(shared_bytes);
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
  if (current == nullptr) internal::fail("shared_memory() outside of a kernel", Where::current());
  return shared;
}

void copy_async(void* to, const void* from, size_t bytes, bool there, Where at) {
  Thread& self = enter_meeting("copy_async", at);
  if (bytes != 4 && bytes != 8 && bytes != 16)
    internal::fail("an asynchronous copy of " + std::to_string(bytes) + " bytes, which a device has not", at);
  check_aligned(to, bytes, at);
  check_aligned(from, bytes, at);
  interleave();
  const Copy copy = {to, there ? from : nullptr, bytes};
  if (here.interrupts && internal::draw(2) == 0)
    copy.run();
  else
    self.copies.push_back(copy);
}

void wait_for_copies(Where at) {
  Thread& self = enter_meeting("wait_for_copies", at);
  interleave();
  for (const Copy& copy : self.copies) copy.run();
  self.copies.clear();
}

std::string expect_error(const std::function<void()>& body) {
  expecting = true;
  try {
    body();
  } catch (const Cancelled&) {  // the mistake was outside of a kernel
  }
  expecting = false;
  if (!error.empty()) internal::set_error(cudaSuccess);  // a device would stay broken
  return std::exchange(error, {});
}

void misaligned(const void* address, size_t alignment, Where at) {
  char text[80];
  std::snprintf(text, sizeof text, "misaligned access: %p is not a multiple of %zu", address, alignment);
  internal::fail(text, at);
}

namespace internal {

void fail(const std::string& what, Where at) {
  std::string text = what + " at " + describe(at);
  if (current != nullptr) text += "\n  in " + launch_and_block() + ", thread " + describe(here.thread);
  report(text);
  throw Cancelled();
}

void interrupt() {
  if (current != nullptr && draw(4) == 0) go_on();
}

Votes meet_block(const char* name, bool vote, Where at) {
  Thread& self = enter_meeting(name, at);
  self.wait = {name, at, 0};
  self.value = vote;
  stop(self, State::kWaiting);
  const int all = static_cast<int>(threads.size());
  const auto meets = [&](const Thread& thread) { return thread.wait == self.wait; };
  if (++at_barrier == all && std::all_of(threads.begin(), threads.end(), meets)) {
    at_barrier = 0;
    uint64_t yes = 0;
    for (const Thread& thread : threads) yes += thread.value;
    for (Thread& thread : threads) {
      thread.result = yes;
      make_runnable(thread);
    }
  }
  go_on();
  return {static_cast<int>(self.result), all};
}

uint64_t meet_warp(const char* name, unsigned mask, uint64_t value, int source, Combine combine, Where at) {
  Thread& self = enter_meeting(name, at);
  Warp& warp = warps[number(self) / 32];
  Thread* const lane = &threads[number(self) / 32 * 32];
  if ((mask >> here.lane & 1) == 0) fail(std::string(name) + ": the mask lacks the calling lane", at);
  if ((mask & ~warp.exists) != 0) fail(std::string(name) + ": the mask names lanes that the block lacks", at);
  if ((mask >> source & 1) == 0)
    fail(std::string(name) + " reads lane " + std::to_string(source) + ", which the mask lacks", at);

  self.wait = {name, at, mask};
  self.value = value;
  self.source = source;
  stop(self, State::kWaiting);
  warp.waiting |= 1u << here.lane;
  bool complete = (warp.waiting & mask) == mask;
  Lanes lanes;
  lanes.mask = mask;
  if (complete)
    lanes.for_each([&](int i) {
      complete = complete && lane[i].wait == self.wait;
      lanes.value[i] = lane[i].value;
      lanes.source[i] = lane[i].source;
    });
  if (complete) {
    warp.waiting &= ~mask;
    lanes.for_each([&](int i) {
      lane[i].result = combine(lanes, i);
      make_runnable(lane[i]);
    });
  }
  go_on();
  return self.result;
}

int segment(int width, Where at) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail("a shuffle of width " + std::to_string(width) + ", which is not a power of two up to 32", at);
  return here.lane & ~(width - 1);
}

}  // namespace internal
}  // namespace cuda_on_host
