#include "../merge_tokens.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "share.h"
#include "simd/row_kernels.h"

namespace evit::cpu {
namespace {

// The patches of each owner, ascending: those of m are patch[begin[m]] ... patch[begin[m + 1] - 1].
class Owned {
 public:
  explicit Owned(const MergeSizes& sizes)
      : owners_(sizes.owners),
        patches_(sizes.patches()),
        memory_(new int64_t[owners_ + 2 + patches_]),
        begin_(memory_.get()),
        patch_(begin_ + owners_ + 2) {}

  void sort(const TokenIndex& owner, int64_t b) {
    // Counted two places further on, so that placing them moves each beginning to where it belongs.
    std::fill_n(begin_, owners_ + 2, int64_t{0});
    for (int64_t i = 0; i < patches_; ++i) ++begin_[owner.at(b, i) + 2];
    for (int64_t m = 2; m < owners_ + 2; ++m) begin_[m] += begin_[m - 1];
    for (int64_t i = 0; i < patches_; ++i) patch_[begin_[owner.at(b, i) + 1]++] = i;
  }
  int64_t count(int64_t m) const { return begin_[m + 1] - begin_[m]; }
  const int64_t* patches(int64_t m) const { return patch_ + begin_[m]; }

 private:
  int64_t owners_, patches_;
  std::unique_ptr<int64_t[]> memory_;
  int64_t* begin_;
  int64_t* patch_;
};

// The shares of the `count` patches in their average, to shares; returns the sum of their weights.
template <typename A>
A share_out(const Tokens<A>& weights, int64_t b, const int64_t* patches, int64_t count, A* shares) {
  A total = 0;
  for (int64_t j = 0; j < count; ++j) total += shares[j] = *weights.row(b, patches[j]);
  if (count == 1) shares[0] = 1;
  for (int64_t j = 0; j < count && count > 1; ++j) shares[j] /= total;
  return total;
}

}  // namespace

template <typename T>
void merge_tokens(const MergeSizes& sizes, const Tokens<T>& x, const TokenIndex& owner,
                  const Tokens<accumulate_t<T>>& weights, T* out, accumulate_t<T>* totals,
                  const Executor& executor) {
  using A = accumulate_t<T>;
  if (sizes.batch == 0) return;
  const auto& kernels = row_kernels<T>();
  const int64_t channels = sizes.channels, prefix = sizes.prefix, owners = sizes.owners;
  // The tasks of a batch entry share its columns; the first of them writes the totals.
  const int64_t tasks = tasks_per_entry(sizes.batch, executor), columns = columns_per_task(channels, tasks);
  const int64_t work = (sizes.tokens + sizes.out_tokens()) * std::max<int64_t>(columns, 1);
  executor.for_range(sizes.batch * tasks, work, [&](int64_t begin, int64_t end) {
    Owned owned(sizes);
    const std::unique_ptr<A[]> buffer(new A[padded(columns) + sizes.patches()]);
    A* sum = buffer.get();
    A* shares = sum + padded(columns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tasks, first = task % tasks * columns;
      const int64_t width = std::min(columns, channels - first);
      T* rows = out + b * sizes.out_tokens() * channels + first;
      const auto copy = [&](int64_t to, int64_t from) {
        std::memcpy(rows + to * channels, x.row(b, from) + first, width * sizeof(T));
      };
      owned.sort(owner, b);
      for (int64_t n = 0; n < prefix && width > 0; ++n) copy(n, n);
      for (int64_t m = 0; m < owners; ++m) {
        const int64_t count = owned.count(m);
        const A total = share_out(weights, b, owned.patches(m), count, shares);
        if (task % tasks == 0) totals[b * owners + m] = total;
        if (width <= 0) continue;
        T* row = rows + (prefix + m) * channels;
        if (count == 0) {
          std::memset(static_cast<void*>(row), 0, width * sizeof(T));
        } else if (count == 1) {
          copy(prefix + m, prefix + *owned.patches(m));
        } else {
          std::fill_n(sum, padded(width), A{0});
          kernels.add_rows(shares, x.row(b, prefix) + first, x.stride_n, owned.patches(m), count, width, sum);
          kernels.store_row(sum, width, row);
        }
      }
    }
  });
}

template <typename T>
void merge_tokens_backward(const MergeSizes& sizes, const Tokens<T>& grad_out,
                           const Tokens<accumulate_t<T>>& grad_totals, const Tokens<T>& x,
                           const TokenIndex& owner, const Tokens<accumulate_t<T>>& weights, T* grad_x,
                           accumulate_t<T>* grad_weights, const Executor& executor) {
  using A = accumulate_t<T>;
  const auto& kernels = row_kernels<T>();
  const int64_t channels = sizes.channels, prefix = sizes.prefix, patches = sizes.patches();
  executor.for_range(sizes.batch, 3 * sizes.tokens * channels, [&](int64_t begin, int64_t end) {
    Owned owned(sizes);
    const std::unique_ptr<A[]> buffer(new A[padded(channels) + 2 * patches]);
    A* g = buffer.get();
    A* shares = g + padded(channels);
    A* dots = shares + patches;
    for (int64_t b = begin; b < end; ++b) {
      T* rows = grad_x + b * sizes.tokens * channels;
      const auto copy = [&](int64_t to, int64_t from) {
        if (channels > 0) std::memcpy(rows + to * channels, grad_out.row(b, from), channels * sizeof(T));
      };
      owned.sort(owner, b);
      for (int64_t n = 0; n < prefix; ++n) copy(n, n);
      for (int64_t m = 0; m < sizes.owners; ++m) {
        const int64_t count = owned.count(m);
        const int64_t* which = owned.patches(m);
        const A grad_total = *grad_totals.row(b, m);
        if (count == 1) {
          copy(prefix + *which, prefix + m);
          grad_weights[b * patches + *which] = grad_total;
        }
        if (count < 2) continue;
        const A total = share_out(weights, b, which, count, shares);
        kernels.load_row(grad_out.row(b, prefix + m), channels, g);
        kernels.outer_rows(shares, g, rows + prefix * channels, channels, which, count, channels);
        kernels.dot_rows(g, x.row(b, prefix), x.stride_n, which, count, channels, dots);
        A mean = 0;  // the product of the gradient with the average
        for (int64_t j = 0; j < count; ++j) mean += shares[j] * dots[j];
        for (int64_t j = 0; j < count; ++j)
          grad_weights[b * patches + which[j]] = (dots[j] - mean) / total + grad_total;
      }
    }
  });
}

#define EVIT_INSTANTIATE(T)                                                                             \
  template void merge_tokens<T>(const MergeSizes&, const Tokens<T>&, const TokenIndex&,                 \
                                const Tokens<accumulate_t<T>>&, T*, accumulate_t<T>*, const Executor&); \
  template void merge_tokens_backward<T>(                                                               \
      const MergeSizes&, const Tokens<T>&, const Tokens<accumulate_t<T>>&, const Tokens<T>&,            \
      const TokenIndex&, const Tokens<accumulate_t<T>>&, T*, accumulate_t<T>*, const Executor&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cpu
