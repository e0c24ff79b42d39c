// attention_with_scores: multi-head attention from the packed projection, and the attention of the first
// token.
//
//   out[b, m, h] = sum_n softmax_n(q[b, h, m] . k[b, h, n] * scale) v[b, h, n]
//   scores[b, n] = mean_h softmax_n(q[b, h, 0] . k[b, h, n] * scale), on the CPU to the bit class_attention's
//
// qkv [B, N, 3 * H * D] with a dense last dimension, ordered (3, H, D), and any other strides. out [B, N, H *
// D] and scores [B, N], dense, scores in the accumulation type. B and N may be 0; H and D at least 1. A NaN
// logit makes its row NaN, as does a row whose maximum is +Inf or all of -Inf. Deterministic: every sum has
// one fixed order, whatever the threads. Memory besides the results is linear in N.
//
// Its gradient, given those of out and scores, is that of qkv: no result of the forward pass is needed, the
// probabilities are computed anew.
//
// In bfloat16, where the processor multiplies it (SimdLevel::avx512_bf16), and always on CUDA, probabilities
// are rounded to the element type before they are multiplied with the values, and they and the gradients of
// the logits before the backward products; otherwise everything between is in the accumulation type.
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
};

namespace cpu {

template <typename T>
void attention_with_scores(const AttentionWithScoresSizes& sizes, const Tokens<T>& qkv, T* out,
                           accumulate_t<T>* scores, const Executor& executor);

// grad_out [B, N, H * D] with a dense last dimension and any other strides; grad_scores[b * stride_b +
// n * stride_n]; grad_qkv [B, N, 3 * H * D], dense. A thread computes whole heads.
template <typename T>
void attention_with_scores_backward(const AttentionWithScoresSizes& sizes, const Tokens<T>& qkv,
                                    const Tokens<T>& grad_out, const Tokens<accumulate_t<T>>& grad_scores,
                                    T* grad_qkv, const Executor& executor);

}  // namespace cpu

namespace cuda {

// For Half and BFloat16 only, by tensor cores. Not measured yet: whether it is faster than the attention of
// PyTorch and class_attention is not known.

// Whether the kernel takes this: 32, 64 or 128 channels a head, data and strides aligned to 16 bytes.
template <typename T>
bool attention_with_scores_available(const AttentionWithScoresSizes& sizes, const Tokens<T>& qkv);

// The bytes of device memory that it needs as `workspace`, aligned to 16.
int64_t attention_with_scores_workspace(const AttentionWithScoresSizes& sizes);

// As the CPU's, but that scores agree with class_attention's to rounding in float32, and that out must be
// aligned to 16 bytes. Two launches.
template <typename T>
void attention_with_scores(const AttentionWithScoresSizes& sizes, const Tokens<T>& qkv, T* out, float* scores,
                           void* workspace, const Stream& stream);

}  // namespace cuda
}  // namespace evit
