// fuse_tokens: out[b] = sum_i weights[b, index[b, i]] * x[b, index[b, i]].
//
// x [B, N, C] with a dense last dimension; weights [B, N] in the accumulation type of x, any strides; index
// [B, K], any strides, every value in [0, N) (checked by the caller); out [B, C], dense. Any size may be 0;
// K = 0 gives zeros. A repeated index counts once per repetition. Accumulated in the order of the indices and
// rounded once: deterministic. Differentiable in x and weights.
#pragma once

#include "gather_tokens.h"

namespace evit::cpu {

template <typename T>
void fuse_tokens(const GatherSizes& sizes, const Tokens<T>& x, const Tokens<accumulate_t<T>>& weights,
                 const TokenIndex& index, T* out, const Executor& executor);

// grad_x [B, N, C] and grad_weights [B, N], both dense and written completely (zeros for tokens that are not
// in the index), from grad [B, C] with a dense last dimension.
template <typename T>
void fuse_tokens_backward(const GatherSizes& sizes, const T* grad, int64_t grad_stride_b, const Tokens<T>& x,
                          const Tokens<accumulate_t<T>>& weights, const TokenIndex& index, T* grad_x,
                          accumulate_t<T>* grad_weights, const Executor& executor);

}  // namespace evit::cpu

namespace evit::cuda {

// Like the CPU version, but an index out of range is a device-side assertion, and sums have the order of
// cuda/rows.cuh.
template <typename T>
void fuse_tokens(const GatherSizes& sizes, const Tokens<T>& x, const Tokens<accumulate_t<T>>& weights,
                 const TokenIndex& index, T* out, const Stream& stream);

template <typename T>
void fuse_tokens_backward(const GatherSizes& sizes, const T* grad, int64_t grad_stride_b, const Tokens<T>& x,
                          const Tokens<accumulate_t<T>>& weights, const TokenIndex& index, T* grad_x,
                          accumulate_t<T>* grad_weights, const Stream& stream);

}  // namespace evit::cuda
