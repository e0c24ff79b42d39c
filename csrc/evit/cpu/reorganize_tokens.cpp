#include "../reorganize_tokens.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "share.h"
#include "simd/row_kernels.h"

namespace evit::cpu {

template <typename T, typename S>
void reorganize_tokens(const ReorganizeSizes& sizes, const Tokens<T>& x, const Tokens<S>& scores, T* tokens,
                       int64_t* kept, const Executor& executor) {
  using A = accumulate_t<T>;
  if (sizes.batch == 0) return;
  const auto& kernels = row_kernels<T>();
  const int64_t keep = sizes.keep, num_others = sizes.patches() - keep;
  const int64_t channels = sizes.channels, prefix = sizes.prefix;

  const std::unique_ptr<int64_t[]> others = select_patches(sizes, scores, kept, executor);
  if (channels == 0) return;

  const int64_t columns = columns_per_task(channels, tasks_per_entry(sizes.batch, executor));
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

template <typename T>
void reorganize_tokens_backward(const ReorganizeSizes& sizes, const Tokens<T>& grad_tokens,
                                const Tokens<T>& x, const Tokens<accumulate_t<T>>& scores,
                                const int64_t* kept, T* grad_x, accumulate_t<T>* grad_scores, int64_t skip,
                                const Executor& executor) {
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
      A* out_scores = grad_scores + b * (skip + patches);
      out_scores = std::fill_n(out_scores, skip, A{0});
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
          weights[count] = *scores.row(b, j);
          others[count++] = j;
        }
      }
      kernels.load_row(grad_tokens.row(b, prefix + keep), channels, g);
      kernels.dot_rows(g, x.row(b, prefix), x.stride_n, others.get(), count, channels, dots);
      kernels.outer_rows(weights, g, rows + prefix * channels, channels, others.get(), count, channels);
      for (int64_t o = 0; o < count; ++o) out_scores[others[o]] = dots[o];
    }
  });
}

#define EVIT_INSTANTIATE_PAIR(T, S)                                                                     \
  template void reorganize_tokens<T, S>(const ReorganizeSizes&, const Tokens<T>&, const Tokens<S>&, T*, \
                                        int64_t*, const Executor&);
#define EVIT_INSTANTIATE(T)                                                                               \
  EVIT_INSTANTIATE_PAIR(T, float)                                                                         \
  EVIT_INSTANTIATE_PAIR(T, double)                                                                        \
  template void reorganize_tokens_backward<T>(const ReorganizeSizes&, const Tokens<T>&, const Tokens<T>&, \
                                              const Tokens<accumulate_t<T>>&, const int64_t*, T*,         \
                                              accumulate_t<T>*, int64_t, const Executor&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE
#undef EVIT_INSTANTIATE_PAIR

}  // namespace evit::cpu
