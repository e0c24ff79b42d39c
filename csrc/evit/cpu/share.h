// Shared by the operators on tokens: the selection of patches, and how a batch smaller than the number
// of threads still keeps them all busy.
#pragma once

#include <memory>

#include "../reorganize_tokens.h"
#include "select.h"

namespace evit::cpu {

// Writes the kept patches of every batch entry to kept [B, K] and returns the rest, [B, N - P - K].
template <typename S>
std::unique_ptr<int64_t[]> select_patches(const ReorganizeSizes& sizes, const Tokens<S>& scores,
                                          int64_t* kept, const Executor& executor) {
  using Key = decltype(order_key(S{}));
  const int64_t patches = sizes.patches(), keep = sizes.keep, num_others = patches - keep;
  std::unique_ptr<int64_t[]> others(new int64_t[buffer_size(sizes.batch, num_others)]);
  executor.for_range(sizes.batch, 8 * patches, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Key[]> keys(new Key[patches]);
    for (int64_t b = begin; b < end; ++b)
      select(scores.row(b, 0), scores.stride_n, patches, keep, keys.get(), kept + b * keep,
             others.get() + b * num_others);
  });
  return others;
}

// Tasks that share the work of one batch entry.
inline int64_t tasks_per_entry(int64_t batch, const Executor& executor) {
  return batch >= executor.threads ? 1 : (executor.threads + batch - 1) / batch;
}

// Columns per task: whole cache lines. A column's sum does not depend on how the columns are split.
inline int64_t columns_per_task(int64_t channels, int64_t tasks) {
  constexpr int64_t line = 64;
  const int64_t columns = (channels + tasks - 1) / tasks;
  return (columns + line - 1) / line * line;
}

}  // namespace evit::cpu
