// Stacks that can be left and come back to: what the threads of host.h run on.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_HOST_ASAN 1
#endif
#endif
#ifndef CUDA_ON_HOST_ASAN
#define CUDA_ON_HOST_ASAN 0
#endif

// An assembly switch where there is one, else ucontext's, which makes a system call each time.
#if defined(__x86_64__) && defined(__linux__) && !defined(CUDA_ON_HOST_UCONTEXT)
#define CUDA_ON_HOST_ASSEMBLY 1
#else
#define CUDA_ON_HOST_ASSEMBLY 0
#include <ucontext.h>
#endif

namespace cuda_on_host {

class Fiber {
 public:
  Fiber() = default;  // stands for the stack that is running now, to come back to it
  explicit Fiber(
      void (*entry)());  // calls entry on a stack of its own when first switched to; it must not return
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves this fiber, which must be the one running, until somebody switches back to it.
  void switch_to(Fiber& next);

 private:
  static void enter();
  void arrive();

  void (*entry_)() = nullptr;
  void* mapping_ = nullptr;  // the guard page, then the stack
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;  // the address sanitizer's, while this fiber is away
#if CUDA_ON_HOST_ASSEMBLY
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace cuda_on_host
