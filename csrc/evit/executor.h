// How a CPU kernel gets its threads: from the caller, so that the kernels do not depend on a thread pool.
#pragma once

#include <algorithm>
#include <cstdint>

namespace evit {

struct Executor {
  using Range = void (*)(int64_t begin, int64_t end, void* context);

  // Number of threads that `run` may use at once.
  int64_t threads;
  // Calls range(begin, end, context) so that [0, end) is covered once, in parts of at least `grain`.
  void (*run)(int64_t end, int64_t grain, Range range, void* context);
  // Parts with fewer elements to access are not worth a thread.
  int64_t worthwhile = 32768;

  // Calls body(begin, end) in parallel over [0, count). `work` is the cost of one item in elements accessed.
  template <typename Body>
  void for_range(int64_t count, int64_t work, const Body& body) const {
    if (count <= 0) return;
    const int64_t grain = std::max<int64_t>(1, worthwhile / std::max<int64_t>(1, work));
    if (threads <= 1 || count <= grain) {
      body(int64_t{0}, count);
      return;
    }
    run(
        count, grain,
        [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
        const_cast<Body*>(&body));
  }
};

// Runs everything on the calling thread. (A lambda would be shorter, but nvcc does not get it right.)
inline Executor serial_executor() {
  struct Serial {
    static void run(int64_t end, int64_t, Executor::Range range, void* context) { range(0, end, context); }
  };
  return {1, &Serial::run};
}

}  // namespace evit
