#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if CUDA_ON_HOST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if CUDA_ON_HOST_ASSEMBLY
// Pushes what a function has to preserve, stores the stack pointer at %rdi, takes on the one in %rsi and
// pops. The floating-point control words are left out: nothing here changes them.
asm(R"(
.text
.type cuda_on_host_switch_stacks, @function
cuda_on_host_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch_stacks, . - cuda_on_host_switch_stacks
)");
extern "C" void cuda_on_host_switch_stacks(void** store, void* load);
#endif

namespace cuda_on_host {
namespace {

// Only what is touched takes memory, so the size is for the worst case: a sanitizer's report, which is
// written on the stack of the thread at fault.
constexpr size_t kStackBytes = 256 << 10;

// The last switch: enter() and arrive() know by it who left and who goes on.
Fiber* left = nullptr;
Fiber* running = nullptr;

size_t page() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

Fiber::Fiber(void (*entry)()) : entry_(entry), size_(kStackBytes) {
  mapping_ = mmap(nullptr, page() + size_, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapping_, page(), PROT_NONE);  // an overflow ends here
  char* bottom = static_cast<char*>(mapping_) + page();
  bottom_ = bottom;
#if CUDA_ON_HOST_ASSEMBLY
  // Stacks that all begin at a multiple of a large power of two would share a few lines of the cache.
  static size_t count = 0;
  char* top = bottom + size_ - (count++ % 64) * 64;
  // As if enter() had been called from nowhere: six registers, where to return to, and where from there.
  void** frame = reinterpret_cast<void**>(top) - 8;
  frame[6] = reinterpret_cast<void*>(&Fiber::enter);
  stack_pointer_ = frame;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = bottom;
  context_.uc_stack.ss_size = size_;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::enter, 0);
#endif
}

Fiber::~Fiber() {
  if (mapping_ == nullptr) return;
#if CUDA_ON_HOST_ASAN
  __asan_unpoison_memory_region(bottom_, size_);  // the addresses may be given to somebody else
#endif
  munmap(mapping_, page() + size_);
}

void Fiber::enter() {
  Fiber* self = running;
  self->arrive();
  self->entry_();
}

void Fiber::arrive() {
#if CUDA_ON_HOST_ASAN
  // Also tells the bounds of the stack left, which for the host's own are not known otherwise.
  __sanitizer_finish_switch_fiber(fake_stack_, &left->bottom_, &left->size_);
#endif
}

void Fiber::switch_to(Fiber& next) {
  left = this;
  running = &next;
#if CUDA_ON_HOST_ASAN
  __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.size_);
#endif
#if CUDA_ON_HOST_ASSEMBLY
  cuda_on_host_switch_stacks(&stack_pointer_, next.stack_pointer_);
#else
  swapcontext(&context_, &next.context_);
#endif
  arrive();
}

}  // namespace cuda_on_host
