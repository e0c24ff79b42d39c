#include "../add_reorganize_norm.h"

#include <algorithm>
#include <memory>

#include "share.h"
#include "simd/row_kernels.h"

namespace evit::cpu {
namespace {

// The parameter in the accumulation type; all elements are `missing` if it is null.
template <typename T>
std::unique_ptr<accumulate_t<T>[]> widened(const RowKernels<T>& kernels, const T* parameter, int64_t channels,
                                           accumulate_t<T> missing) {
  std::unique_ptr<accumulate_t<T>[]> out(new accumulate_t<T>[padded(channels)]);
  if (parameter != nullptr)
    kernels.load_row(parameter, channels, out.get());
  else
    std::fill_n(out.get(), padded(channels), missing);
  return out;
}

}  // namespace

template <typename T, typename S>
void add_reorganize_norm(const ReorganizeSizes& sizes, const Tokens<T>& x, const Tokens<T>& branch,
                         const Tokens<S>& scores, const LayerNorm<T>& norm, T* tokens, T* normed,
                         int64_t* kept, const Executor& executor) {
  using A = accumulate_t<T>;
  if (sizes.batch == 0) return;
  const auto& kernels = row_kernels<T>();
  const int64_t keep = sizes.keep, num_others = sizes.patches() - keep;
  const int64_t channels = sizes.channels, prefix = sizes.prefix, out_tokens = sizes.out_tokens();
  const auto weight = widened<T>(kernels, norm.weight, channels, A{1});
  const auto bias = widened<T>(kernels, norm.bias, channels, A{0});
  const auto norm_row = [&](int64_t b, int64_t n) {
    const int64_t offset = (b * out_tokens + n) * channels;
    kernels.norm_row(tokens + offset, channels, weight.get(), bias.get(), static_cast<A>(norm.eps),
                     normed + offset);
  };

  const std::unique_ptr<int64_t[]> others = select_patches(sizes, scores, kept, executor);

  // The tasks of a batch entry share its remaining rows and the columns of the fused token evenly: rows,
  // because a row is normalised as a whole; columns, because the order of their sums is fixed.
  const int64_t tasks = tasks_per_entry(sizes.batch, executor);
  const int64_t rows = (prefix + keep + tasks - 1) / tasks, columns = columns_per_task(channels, tasks);
  const int64_t work = 2 * (sizes.tokens * channels + tasks - 1) / tasks;
  executor.for_range(sizes.batch * tasks, work, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> buffer(new A[padded(columns) + num_others]);
    A* sum = buffer.get();
    A* weights = sum + padded(columns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tasks, part = task % tasks;
      const int64_t last_row = std::min(prefix + keep, (part + 1) * rows);
      for (int64_t n = part * rows; n < last_row; ++n) {
        const int64_t from = n < prefix ? n : prefix + kept[b * keep + n - prefix];
        kernels.add_row(x.row(b, from), branch.row(b, from), channels,
                        tokens + (b * out_tokens + n) * channels);
        norm_row(b, n);
      }
      const int64_t first = part * columns, width = std::min(columns, channels - first);
      if (!sizes.fuse || width <= 0) continue;
      const int64_t* fused = &others[b * num_others];
      for (int64_t i = 0; i < num_others; ++i) weights[i] = static_cast<A>(*scores.row(b, fused[i]));
      std::fill_n(sum, padded(columns), A{0});
      kernels.add_row_sums(weights, x.row(b, prefix) + first, x.stride_n, branch.row(b, prefix) + first,
                           branch.stride_n, fused, num_others, width, sum);
      kernels.store_row(sum, width, tokens + (b * out_tokens + prefix + keep) * channels + first);
    }
  });
  if (!sizes.fuse) return;
  executor.for_range(sizes.batch, 4 * channels, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) norm_row(b, prefix + keep);
  });
}

#define EVIT_INSTANTIATE_PAIR(T, S)                                                                   \
  template void add_reorganize_norm<T, S>(const ReorganizeSizes&, const Tokens<T>&, const Tokens<T>&, \
                                          const Tokens<S>&, const LayerNorm<T>&, T*, T*, int64_t*,    \
                                          const Executor&);
#define EVIT_INSTANTIATE(T)       \
  EVIT_INSTANTIATE_PAIR(T, float) \
  EVIT_INSTANTIATE_PAIR(T, double)
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE
#undef EVIT_INSTANTIATE_PAIR

}  // namespace evit::cpu
