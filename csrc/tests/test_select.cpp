// Radix selection against a stable sort.
#include "../evit/cpu/select.h"

#include <algorithm>
#include <numeric>

#include "check.h"
#include "data.h"

namespace evit::tests {
namespace {

template <typename S>
void check_selection(const std::vector<S>& scores, int64_t keep, int64_t stride = 1) {
  const int64_t count = static_cast<int64_t>(scores.size());
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto better = [&](int64_t a, int64_t b) {
    const bool a_nan = std::isnan(scores[a]), b_nan = std::isnan(scores[b]);
    return a_nan || b_nan ? a_nan && !b_nan : scores[a] > scores[b];
  };
  std::stable_sort(order.begin(), order.end(), better);
  std::sort(order.begin(), order.begin() + keep);
  std::sort(order.begin() + keep, order.end());

  Buffer<S> strided(count * stride);
  for (int64_t i = 0; i < count; ++i) strided[i * stride] = scores[i];
  Buffer<decltype(order_key(S{}))> keys(count);
  Buffer<int64_t> kept(keep), others(count - keep), kept_alone(keep);
  cpu::select(strided.data.get(), stride, count, keep, keys.data.get(), kept.data.get(), others.data.get());
  cpu::select(strided.data.get(), stride, count, keep, keys.data.get(), kept_alone.data.get(), nullptr);
  for (int64_t i = 0; i < keep; ++i) CHECK(kept[i] == order[i] && kept_alone[i] == order[i]);
  for (int64_t i = keep; i < count; ++i) CHECK(others[i - keep] == order[i]);
}

template <typename S>
void select_all_kinds() {
  std::mt19937 generator(3);
  const std::vector<S> special = {S(NAN),
                                  -S(NAN),
                                  S(INFINITY),
                                  -S(INFINITY),
                                  S(0),
                                  -S(0),
                                  S(1),
                                  S(-1),
                                  std::numeric_limits<S>::denorm_min(),
                                  -std::numeric_limits<S>::denorm_min(),
                                  std::numeric_limits<S>::max(),
                                  std::numeric_limits<S>::lowest()};
  for (const int64_t count : {1, 2, 7, 196, 257, 4097})
    for (int kind = 0; kind < 4; ++kind) {
      std::vector<S> scores(count);
      for (auto& score : scores) {
        const uint32_t bits = generator();
        if (kind == 0) score = static_cast<S>(bits) / 7;        // distinct
        if (kind == 1) score = static_cast<S>(bits % 3) - 1;    // ties everywhere
        if (kind == 2) score = special[bits % special.size()];  // every special value
        if (kind == 3) score = S(0.005) + static_cast<S>(bits % 64) * std::numeric_limits<S>::epsilon() / 200;
      }
      for (const int64_t keep : {int64_t{1}, count / 3, count / 2, count - 1, count})
        if (keep >= 1 && keep <= count) check_selection(scores, keep, 1 + kind);
    }
}

TEST(selection_is_a_stable_sorts) {
  select_all_kinds<float>();
  select_all_kinds<double>();
}

}  // namespace
}  // namespace evit::tests
