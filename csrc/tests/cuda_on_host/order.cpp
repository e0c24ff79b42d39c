// Whose turn it is, under the order in force.
#include <numeric>
#include <random>
#include <utility>

#include "internal.h"

namespace cuda_on_host {
namespace {

Order current;
std::mt19937 lots;  // the same numbers everywhere, so a seed that failed once fails again

}  // namespace

std::string Order::name() const {
  return kind == kForward   ? "forward"
         : kind == kReverse ? "reverse"
                            : "shuffled(" + std::to_string(seed) + ")";
}

Order order() { return current; }

void set_order(Order order) {
  current = order;
  lots.seed(order.seed);
}

namespace internal {

unsigned draw(size_t below) { return static_cast<unsigned>(uint64_t{lots()} * below >> 32); }

int choose(const std::vector<unsigned>& runnable) {
  const int warps = static_cast<int>(runnable.size());
  if (current.kind == Order::kForward) {
    for (int w = 0; w < warps; ++w)
      if (runnable[w] != 0) return w * 32 + std::countr_zero(runnable[w]);
    return -1;
  }
  if (current.kind == Order::kReverse) {
    for (int w = warps - 1; w >= 0; --w)
      if (runnable[w] != 0) return w * 32 + 31 - std::countl_zero(runnable[w]);
    return -1;
  }
  int candidates[32], count = 0;
  for (int w = 0; w < warps; ++w)
    if (runnable[w] != 0) candidates[count++] = w;
  if (count == 0) return -1;
  const int w = candidates[draw(count)];
  unsigned lanes = runnable[w];
  for (unsigned skip = draw(std::popcount(lanes)); skip > 0; --skip) lanes &= lanes - 1;
  return w * 32 + std::countr_zero(lanes);
}

BlockOrder::BlockOrder(size_t blocks) : blocks_(blocks) {
  if (order_.kind != Order::kShuffled) return;
  shuffled_.resize(blocks);
  std::iota(shuffled_.begin(), shuffled_.end(), size_t{0});
  for (size_t i = blocks; i > 1; --i) std::swap(shuffled_[i - 1], shuffled_[draw(i)]);
}

size_t BlockOrder::operator[](size_t i) const {
  if (order_.kind == Order::kForward) return i;
  return order_.kind == Order::kReverse ? blocks_ - 1 - i : shuffled_[i];
}

}  // namespace internal
}  // namespace cuda_on_host
