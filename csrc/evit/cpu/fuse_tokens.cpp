#include "../fuse_tokens.h"

#include <algorithm>
#include <memory>

#include "simd/row_kernels.h"

namespace evit::cpu {

template <typename T>
void fuse_tokens(const GatherSizes& sizes, const Tokens<T>& x, const Tokens<accumulate_t<T>>& weights,
                 const TokenIndex& index, T* out, const Executor& executor) {
  using A = accumulate_t<T>;
  const auto& kernels = row_kernels<T>();
  const int64_t count = sizes.indices, channels = sizes.channels;
  executor.for_range(sizes.batch, count * channels, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> buffer(new A[padded(channels) + count]);
    const std::unique_ptr<int64_t[]> rows(new int64_t[count]);
    A* sum = buffer.get();
    A* factors = sum + padded(channels);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = index.at(b, i);
        factors[i] = *weights.row(b, rows[i]);
      }
      std::fill_n(sum, padded(channels), A{0});
      kernels.add_rows(factors, x.row(b, 0), x.stride_n, rows.get(), count, channels, sum);
      kernels.store_row(sum, channels, out + b * channels);
    }
  });
}

template <typename T>
void fuse_tokens_backward(const GatherSizes& sizes, const T* grad, int64_t grad_stride_b, const Tokens<T>& x,
                          const Tokens<accumulate_t<T>>& weights, const TokenIndex& index, T* grad_x,
                          accumulate_t<T>* grad_weights, const Executor& executor) {
  using A = accumulate_t<T>;
  const auto& kernels = row_kernels<T>();
  const int64_t tokens = sizes.tokens, channels = sizes.channels;
  executor.for_range(sizes.batch, 3 * tokens * channels, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> buffer(new A[padded(channels) + tokens]);
    const std::unique_ptr<int64_t[]> times(new int64_t[tokens]);  // how often the token is in the index
    A* g = buffer.get();
    A* factors = g + padded(channels);
    for (int64_t b = begin; b < end; ++b) {
      std::fill_n(times.get(), tokens, int64_t{0});
      for (int64_t i = 0; i < sizes.indices; ++i) ++times[index.at(b, i)];
      // A token that is not in the index gets exact zeros, even if its weight is not finite.
      for (int64_t n = 0; n < tokens; ++n)
        factors[n] = times[n] > 0 ? static_cast<A>(times[n]) * *weights.row(b, n) : A{0};
      kernels.load_row(grad + b * grad_stride_b, channels, g);
      A* dots = grad_weights + b * tokens;
      T* rows = grad_x + b * tokens * channels;
      kernels.dot_rows(g, x.row(b, 0), x.stride_n, nullptr, tokens, channels, dots);
      kernels.outer_rows(factors, g, rows, channels, nullptr, tokens, channels);
      for (int64_t n = 0; n < tokens; ++n) {
        if (times[n] > 0) {
          dots[n] *= static_cast<A>(times[n]);
        } else {
          dots[n] = 0;
          std::fill_n(rows + n * channels, channels, T{});  // 0 * Inf would not be zero
        }
      }
    }
  });
}

#define EVIT_INSTANTIATE(T)                                                                          \
  template void fuse_tokens<T>(const GatherSizes&, const Tokens<T>&, const Tokens<accumulate_t<T>>&, \
                               const TokenIndex&, T*, const Executor&);                              \
  template void fuse_tokens_backward<T>(const GatherSizes&, const T*, int64_t, const Tokens<T>&,     \
                                        const Tokens<accumulate_t<T>>&, const TokenIndex&, T*,       \
                                        accumulate_t<T>*, const Executor&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cpu
