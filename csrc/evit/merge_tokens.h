// merge_tokens: patch tokens with one owner become their weighted average.
//
// x [B, N, C] with a dense last dimension; owner [B, N - P], any strides, every value in [0, M) (checked by
// the caller); weights [B, N - P] in the accumulation type of x, any strides. out [B, P + M, C], dense: the P
// prefix tokens, then for each owner m the sum of weights[i] / totals[m] * x[P + i] over the i with owner m,
// in ascending order in the accumulation type, rounded once; totals [B, M], dense, in that type: the sums of
// their weights. A token that is the only one of its owner is copied, whatever its weight; an owner that has
// none gets zeros. Any size may be 0. Deterministic. Differentiable in x and weights.
#pragma once

#include "gather_tokens.h"

namespace evit {

struct MergeSizes {
  int64_t batch;     // B
  int64_t tokens;    // N
  int64_t prefix;    // P
  int64_t owners;    // M
  int64_t channels;  // C

  EVIT_HOST_DEVICE int64_t patches() const { return tokens - prefix; }
  EVIT_HOST_DEVICE int64_t out_tokens() const { return prefix + owners; }
};

namespace cpu {

template <typename T>
void merge_tokens(const MergeSizes& sizes, const Tokens<T>& x, const TokenIndex& owner,
                  const Tokens<accumulate_t<T>>& weights, T* out, accumulate_t<T>* totals,
                  const Executor& executor);

// grad_x [B, N, C] and grad_weights [B, N - P], dense and written completely, from grad_out [B, P + M, C]
// with a dense last dimension and grad_totals [B, M], any strides.
template <typename T>
void merge_tokens_backward(const MergeSizes& sizes, const Tokens<T>& grad_out,
                           const Tokens<accumulate_t<T>>& grad_totals, const Tokens<T>& x,
                           const TokenIndex& owner, const Tokens<accumulate_t<T>>& weights, T* grad_x,
                           accumulate_t<T>* grad_weights, const Executor& executor);

}  // namespace cpu

namespace cuda {

// Like the CPU version, but an owner out of range is a device-side assertion.
template <typename T>
void merge_tokens(const MergeSizes& sizes, const Tokens<T>& x, const TokenIndex& owner,
                  const Tokens<accumulate_t<T>>& weights, T* out, accumulate_t<T>* totals,
                  const Stream& stream);

// Like the CPU version, but the products of rows are summed in another order.
template <typename T>
void merge_tokens_backward(const MergeSizes& sizes, const Tokens<T>& grad_out,
                           const Tokens<accumulate_t<T>>& grad_totals, const Tokens<T>& x,
                           const TokenIndex& owner, const Tokens<accumulate_t<T>>& weights, T* grad_x,
                           accumulate_t<T>* grad_weights, const Stream& stream);

}  // namespace cuda
}  // namespace evit
