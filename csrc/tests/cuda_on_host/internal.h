// What the sources behind host.h have to tell each other.
#pragma once

#include <vector>

#include "host.h"

namespace cuda_on_host::internal {

// ---- order.cpp

// A random number below the given one, not 0, of the sequence that set_order() began.
unsigned draw(size_t below);

// The thread whose turn it is, of those whose bits are set, 32 to a warp; -1 if there is none.
int choose(const std::vector<unsigned>& runnable);

class BlockOrder {
 public:
  explicit BlockOrder(size_t blocks);
  size_t operator[](size_t i) const;  // which block is the i-th to run

 private:
  size_t blocks_;
  Order order_ = order();
  std::vector<size_t> shuffled_;
};

// ---- api.cpp

// Makes it the last error, and returns it.
cudaError_t set_error(cudaError_t error);

// Whether a device would run it; leaves the error if not.
bool may_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes);

// Under the address sanitizer just the size asked for, else with guards on both sides.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  void* get() const { return memory_; }

 private:
  char* memory_;
};

bool guards_intact(const void* shared_memory, size_t bytes);

}  // namespace cuda_on_host::internal
