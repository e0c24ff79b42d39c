// Scratch memory of the attention kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace evit::cpu {

constexpr std::align_val_t kCacheLine{64};

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, kCacheLine); }
};

inline std::unique_ptr<void, Free> aligned_scratch(int64_t bytes) {
  return std::unique_ptr<void, Free>(::operator new(static_cast<size_t>(bytes), kCacheLine));
}

}  // namespace evit::cpu
