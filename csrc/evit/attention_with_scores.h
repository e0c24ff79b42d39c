// attention_with_scores: multi-head attention from the packed projection, and the attention of the first
// token.
//
//   out[b, m, h] = sum_n softmax_n(q[b, h, m] . k[b, h, n] * scale + key_bias[b, n]) v[b, h, n]
//   scores[b, n] = mean_h softmax_n(q[b, h, 0] . k[b, h, n] * scale + key_bias[b, n]), on the CPU without a
//                  bias with class_attention's bits; or the mean over all queries m of the same
//
// qkv [B, N, 3 * H * D] with a dense last dimension, ordered (3, H, D), and any other strides. out [B, N, H *
// D] and scores [B, N], dense, scores in the accumulation type. key_bias [B, N] is in the accumulation type,
// with any strides; its data may be null, which is no bias, and any value of it -Inf, which masks the key. B
// and N may be 0; H and D at least 1. A row becomes NaN if it has a NaN logit, if its maximum is +Inf, or if
// all of it is -Inf. Deterministic: every sum has one fixed order for any number of threads. Memory besides
// the results is linear in N.
//
// The backward pass turns the gradients of out and scores into those of qkv and key_bias. It needs no result
// of the forward pass: the probabilities are computed again.
//
// In bfloat16, if the processor has bfloat16 products (SimdLevel::avx512_bf16), and always on CUDA,
// probabilities are rounded to the element type before they are multiplied with the values; so are
// probabilities and gradients of the logits before the backward products. Otherwise all intermediate results
// are in the accumulation type. Scores are not rounded either, except on the CPU those of the mean over all
// queries, which are those of the probabilities that weigh the values.
#pragma once

#include "executor.h"
#include "stream.h"
#include "types.h"

namespace evit {

struct AttentionWithScoresSizes {
  int64_t batch;     // B
  int64_t tokens;    // N
  int64_t heads;     // H
  int64_t channels;  // D
  double scale;
  bool mean = false;  // scores are those of all queries on average, not those of the first
};

namespace cpu {

template <typename T>
void attention_with_scores(const AttentionWithScoresSizes& sizes, const Tokens<T>& qkv,
                           const Tokens<accumulate_t<T>>& key_bias, T* out, accumulate_t<T>* scores,
                           const Executor& executor);

// grad_out [B, N, H * D] with a dense last dimension and any other strides; grad_scores[b * stride_b +
// n * stride_n]; grad_qkv [B, N, 3 * H * D] and grad_key_bias [B, N], dense, the latter not written without a
// bias. A thread computes whole heads.
template <typename T>
void attention_with_scores_backward(const AttentionWithScoresSizes& sizes, const Tokens<T>& qkv,
                                    const Tokens<accumulate_t<T>>& key_bias, const Tokens<T>& grad_out,
                                    const Tokens<accumulate_t<T>>& grad_scores, T* grad_qkv,
                                    accumulate_t<T>* grad_key_bias, const Executor& executor);

}  // namespace cpu

namespace cuda {

// For Half and BFloat16 only, on tensor cores. Not measured yet: it is not known whether this is faster than
// PyTorch's attention plus class_attention.

// Whether the kernel supports this: 32, 64 or 128 channels per head, data and strides aligned to 16 bytes.
template <typename T>
bool attention_with_scores_available(const AttentionWithScoresSizes& sizes, const Tokens<T>& qkv);

// The bytes of device memory that it needs as `workspace`, aligned to 16.
int64_t attention_with_scores_workspace(const AttentionWithScoresSizes& sizes);

// Like the CPU version, except that scores agree with class_attention's only up to float32 rounding, and that
// out must be aligned to 16 bytes. Two launches; three for the mean over all queries, whose products with the
// keys are computed a second time, as each probability needs the sum of its query's.
template <typename T>
void attention_with_scores(const AttentionWithScoresSizes& sizes, const Tokens<T>& qkv,
                           const Tokens<float>& key_bias, T* out, float* scores, void* workspace,
                           const Stream& stream);

}  // namespace cuda
}  // namespace evit
