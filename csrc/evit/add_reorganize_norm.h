// add_reorganize_norm: what an EViT block does between its attention and its MLP, for inference.
//
//   r = x + branch, rounded to the element type
//   tokens, kept = reorganize_tokens(r, scores)
//   normed = (tokens - mean) / sqrt(variance + eps) * weight + bias, over the channels
//
// x, branch [B, N, C] with a dense last dimension; scores [B, N - P], float or double, any strides; weight,
// bias [C], dense; a null weight means 1 and a null bias 0. tokens, normed [B, P + K + (1 if fuse), C],
// dense; kept [B, K]. Selection, order, ties and the fused token are those of reorganize_tokens.h; like every
// other token, the fused one is rounded before it is normalised. Mean and variance (divided by C) are
// computed in the accumulation type from the rounded tokens, in two passes. 1 <= K <= N - P, and K < N - P
// with fuse. B may be 0; C is at least 1. Deterministic. Not differentiable.
#pragma once

#include "reorganize_tokens.h"

namespace evit {

template <typename T>
struct LayerNorm {
  const T* weight;
  const T* bias;
  double eps;
};

namespace cpu {

template <typename T, typename S>
void add_reorganize_norm(const ReorganizeSizes& sizes, const Tokens<T>& x, const Tokens<T>& branch,
                         const Tokens<S>& scores, const LayerNorm<T>& norm, T* tokens, T* normed,
                         int64_t* kept, const Executor& executor);

}  // namespace cpu

namespace cuda {

// Like the CPU version, with the workspace of reorganize_tokens<T, S> and one more launch than that.
template <typename T, typename S>
void add_reorganize_norm(const ReorganizeSizes& sizes, const Tokens<T>& x, const Tokens<T>& branch,
                         const Tokens<S>& scores, const LayerNorm<T>& norm, T* tokens, T* normed,
                         int64_t* kept, void* workspace, const Stream& stream);

}  // namespace cuda
}  // namespace evit
