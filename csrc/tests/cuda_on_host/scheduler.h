// What the scheduler (host.cpp) and the places where threads wait (meetings.cpp) know of the block that runs.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "fiber.h"
#include "internal.h"

namespace cuda_on_host::internal {

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

extern std::vector<Thread> threads;
extern std::vector<Warp> warps;
extern std::vector<unsigned> runnable;  // the lanes of each warp
extern int at_barrier;                  // threads that wait for the block
extern Thread* current;                 // null outside of a kernel

inline int number(const Thread& thread) { return static_cast<int>(&thread - threads.data()); }

inline void make_runnable(Thread& thread) {
  thread.state = State::kRunnable;
  runnable[number(thread) / 32] |= 1u << number(thread) % 32;
}

inline void stop(Thread& thread, State state) {
  thread.state = state;
  runnable[number(thread) / 32] &= ~(1u << number(thread) % 32);
}

// ---- host.cpp

// Gives way to whoever is next; comes back when it is this thread's turn.
void go_on();

std::string describe(uint3 v);
std::string describe(Where at);
std::string launch_and_block();

// ---- meetings.cpp

// Who waits for whom, where nobody can go on.
std::string describe_stuck_block();

}  // namespace cuda_on_host::internal
