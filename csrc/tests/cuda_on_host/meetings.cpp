// Where threads wait for each other, and for their copies.
#include <algorithm>
#include <cstdio>
#include <utility>

#include "scheduler.h"

namespace cuda_on_host {
namespace internal {
namespace {

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

Thread& enter_meeting(const char* name, Where at) {
  if (current == nullptr) internal::fail(std::string(name) + " outside of a kernel", at);
  return *current;
}

}  // namespace

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

void copy_async(void* to, const void* from, size_t bytes, bool there, Where at) {
  internal::Thread& self = internal::enter_meeting("copy_async", at);
  if (bytes != 4 && bytes != 8 && bytes != 16)
    internal::fail("an asynchronous copy of " + std::to_string(bytes) + " bytes, which a device has not", at);
  check_aligned(to, bytes, at);
  check_aligned(from, bytes, at);
  interleave();
  const internal::Copy copy = {to, there ? from : nullptr, bytes};
  if (internal::here.interrupts && internal::draw(2) == 0)
    copy.run();
  else
    self.copies.push_back(copy);
}

void wait_for_copies(Where at) {
  internal::Thread& self = internal::enter_meeting("wait_for_copies", at);
  interleave();
  for (const internal::Copy& copy : self.copies) copy.run();
  self.copies.clear();
}

}  // namespace cuda_on_host
