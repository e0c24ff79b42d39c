#include "../restore_tokens.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "share.h"
#include "simd/row_kernels.h"

namespace evit::cpu {

template <typename T>
void restore_tokens(const RestoreSizes& sizes, const Tokens<T>& tokens, const int64_t* kept,
                    const Tokens<T>& fill, T* out, const Executor& executor) {
  const int64_t keep = sizes.keep, channels = sizes.channels, prefix = sizes.prefix;
  if (channels == 0) return;  // a tensor without elements may have no memory to copy from
  executor.for_range(sizes.batch * sizes.tokens, channels, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      // The rows of one sequence, and its kept tokens from the first one that can be among these rows.
      const int64_t b = row / sizes.tokens, last = std::min(end, (b + 1) * sizes.tokens);
      const int64_t* of_sequence = kept + b * keep;
      int64_t n = row - b * sizes.tokens;
      int64_t i = std::lower_bound(of_sequence, of_sequence + keep, n - prefix) - of_sequence;
      for (; row < last; ++row, ++n) {
        T* to = out + row * channels;
        const T* from;
        if (n < prefix)
          from = tokens.row(b, n);
        else if (i < keep && of_sequence[i] == n - prefix)
          from = tokens.row(b, prefix + i++);
        else
          from = fill.data == nullptr ? nullptr : fill.row(b, n);
        if (from == nullptr)
          std::memset(static_cast<void*>(to), 0, channels * sizeof(T));
        else
          std::memcpy(to, from, channels * sizeof(T));
      }
    }
  });
}

template <typename T>
void restore_tokens_backward(const RestoreSizes& sizes, bool fill_fused, const Tokens<T>& grad,
                             const int64_t* kept, T* grad_tokens, const Executor& executor) {
  using A = accumulate_t<T>;
  const auto& kernels = row_kernels<T>();
  const int64_t keep = sizes.keep, channels = sizes.channels, prefix = sizes.prefix;
  const int64_t num_others = fill_fused ? sizes.patches() - keep : 0;  // whose rows are summed
  if (sizes.batch == 0 || channels == 0) return;

  const int64_t columns = columns_per_task(channels, tasks_per_entry(sizes.batch, executor));
  const int64_t parts = (channels + columns - 1) / columns;
  executor.for_range(sizes.batch * parts, sizes.tokens * columns, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<int64_t[]> others(new int64_t[num_others]);
    const std::unique_ptr<A[]> buffer(new A[padded(columns) + num_others]);
    A* sum = buffer.get();
    A* ones = sum + padded(columns);
    std::fill_n(ones, num_others, A{1});
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts, first = task % parts * columns;
      const int64_t width = std::min(columns, channels - first);
      const int64_t* of_sequence = kept + b * keep;
      T* out = grad_tokens + b * sizes.in_tokens() * channels + first;
      const auto copy_row = [&](int64_t n) {
        std::memcpy(out, grad.row(b, n) + first, width * sizeof(T));
        out += channels;
      };
      for (int64_t n = 0; n < prefix; ++n) copy_row(n);
      for (int64_t i = 0; i < keep; ++i) copy_row(prefix + of_sequence[i]);
      if (!sizes.fused) continue;
      if (!fill_fused) {
        std::memset(static_cast<void*>(out), 0, width * sizeof(T));
        continue;
      }
      for (int64_t j = 0, i = 0, count = 0; j < sizes.patches(); ++j) {
        if (i < keep && of_sequence[i] == j)
          ++i;
        else if (count < num_others)
          others[count++] = j;
      }
      std::fill_n(sum, padded(columns), A{0});
      kernels.add_rows(ones, grad.row(b, prefix) + first, grad.stride_n, others.get(), num_others, width,
                       sum);
      kernels.store_row(sum, width, out);
    }
  });
}

#define EVIT_INSTANTIATE(T)                                                                                 \
  template void restore_tokens<T>(const RestoreSizes&, const Tokens<T>&, const int64_t*, const Tokens<T>&,  \
                                  T*, const Executor&);                                                     \
  template void restore_tokens_backward<T>(const RestoreSizes&, bool, const Tokens<T>&, const int64_t*, T*, \
                                           const Executor&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cpu
