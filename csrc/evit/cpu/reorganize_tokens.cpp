#include "../reorganize_tokens.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "select.h"
#include "simd/row_kernels.h"

namespace evit::cpu {
namespace {

// Columns that one task takes, so that a batch smaller than the number of threads still feeds them all.
// Whole cache lines; the sums of a column are the same however the columns are shared out.
int64_t columns_per_task(int64_t batch, int64_t channels, const Executor& executor) {
  constexpr int64_t line = 64;
  const int64_t tasks = batch >= executor.threads ? 1 : (executor.threads + batch - 1) / batch;
  const int64_t columns = (channels + tasks - 1) / tasks;
  return std::max<int64_t>(1, (columns + line - 1) / line * line);
}

}  // namespace

template <typename T, typename S>
void reorganize_tokens(const ReorganizeSizes& sizes, const Tokens<T>& x, const Tokens<S>& scores, T* tokens,
                       int64_t* kept, const Executor& executor) {
  using A = accumulate_t<T>;
  using Key = decltype(order_key(S{}));
  if (sizes.batch == 0) return;
  const auto& kernels = row_kernels<T>();
  const int64_t patches = sizes.patches(), keep = sizes.keep, num_others = patches - keep;
  const int64_t channels = sizes.channels, prefix = sizes.prefix;

  const std::unique_ptr<int64_t[]> others(new int64_t[buffer_size(sizes.batch, num_others)]);
  executor.for_range(sizes.batch, 8 * patches, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Key[]> keys(new Key[patches]);
    for (int64_t b = begin; b < end; ++b)
      select(scores.row(b, 0), scores.stride_n, patches, keep, keys.get(), kept + b * keep,
             &others[b * num_others]);
  });
  if (channels == 0) return;

  const int64_t columns = columns_per_task(sizes.batch, channels, executor);
  const int64_t parts = (channels + columns - 1) / columns;
  executor.for_range(sizes.batch * parts, sizes.tokens * columns, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> buffer(new A[padded(columns) + num_others]);
    A* sum = buffer.get();
    A* weights = sum + padded(columns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts, first = task % parts * columns;
      const int64_t width = std::min(columns, channels - first);
      T* out = tokens + b * sizes.out_tokens() * channels + first;
      const auto copy_row = [&](int64_t n) {
        std::memcpy(out, x.row(b, n) + first, width * sizeof(T));
        out += channels;
      };
      for (int64_t n = 0; n < prefix; ++n) copy_row(n);
      for (int64_t i = 0; i < keep; ++i) copy_row(prefix + kept[b * keep + i]);
      if (!sizes.fuse) continue;
      const int64_t* rows = &others[b * num_others];
      for (int64_t i = 0; i < num_others; ++i) weights[i] = static_cast<A>(*scores.row(b, rows[i]));
      std::fill_n(sum, padded(columns), A{0});
      kernels.add_rows(weights, x.row(b, prefix) + first, x.stride_n, rows, num_others, width, sum);
      kernels.store_row(sum, width, out);
    }
  });
}

template <typename T, typename S>
void reorganize_tokens_backward(const ReorganizeSizes& sizes, const Tokens<T>& grad_tokens,
                                const Tokens<T>& x, const Tokens<S>& scores, const int64_t* kept, T* grad_x,
                                S* grad_scores, int64_t grad_scores_stride_b, const Executor& executor) {
  using A = accumulate_t<T>;
  const auto& kernels = row_kernels<T>();
  const int64_t patches = sizes.patches(), keep = sizes.keep, prefix = sizes.prefix;
  const int64_t channels = sizes.channels, num_others = patches - keep;
  executor.for_range(sizes.batch, 3 * sizes.tokens * channels, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> buffer(new A[padded(channels) + 2 * num_others]);
    const std::unique_ptr<int64_t[]> others(new int64_t[num_others]);
    A* g = buffer.get();
    A* weights = g + padded(channels);
    A* dots = weights + num_others;
    for (int64_t b = begin; b < end; ++b) {
      T* rows = grad_x + b * sizes.tokens * channels;
      S* out_scores = grad_scores + b * grad_scores_stride_b;
      const auto copy_row = [&](int64_t to, int64_t from) {
        if (channels > 0) std::memcpy(rows + to * channels, grad_tokens.row(b, from), channels * sizeof(T));
      };
      for (int64_t n = 0; n < prefix; ++n) copy_row(n, n);
      int64_t i = 0, count = 0;
      for (int64_t j = 0; j < patches; ++j) {
        if (i < keep && kept[b * keep + i] == j) {
          copy_row(prefix + j, prefix + i++);
          out_scores[j] = 0;
        } else if (count < num_others) {
          weights[count] = static_cast<A>(*scores.row(b, j));
          others[count++] = j;
        }
      }
      kernels.load_row(grad_tokens.row(b, prefix + keep), channels, g);
      kernels.dot_rows(g, x.row(b, prefix), x.stride_n, others.get(), count, channels, dots);
      kernels.outer_rows(weights, g, rows + prefix * channels, channels, others.get(), count, channels);
      for (int64_t o = 0; o < count; ++o) out_scores[others[o]] = static_cast<S>(dots[o]);
    }
  });
}

#define EVIT_INSTANTIATE_PAIR(T, S)                                                                          \
  template void reorganize_tokens<T, S>(const ReorganizeSizes&, const Tokens<T>&, const Tokens<S>&, T*,      \
                                        int64_t*, const Executor&);                                          \
  template void reorganize_tokens_backward<T, S>(const ReorganizeSizes&, const Tokens<T>&, const Tokens<T>&, \
                                                 const Tokens<S>&, const int64_t*, T*, S*, int64_t,          \
                                                 const Executor&);
#define EVIT_INSTANTIATE(T)       \
  EVIT_INSTANTIATE_PAIR(T, float) \
  EVIT_INSTANTIATE_PAIR(T, double)
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE
#undef EVIT_INSTANTIATE_PAIR

}  // namespace evit::cpu
