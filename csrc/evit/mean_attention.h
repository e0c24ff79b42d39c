// mean_attention: scores[b, n] = mean_h mean_m softmax_n(q[b, h, m] . k[b, h, n] * scale).
//
// q [B, H, M, D], k [B, H, N, D], both with a dense last dimension and any other strides (they are usually
// slices of a packed qkv projection). scores [B, N], dense, in the accumulation type. B may be 0; H, M, N, D
// at least 1. Differentiable in q and k. A row of probabilities becomes NaN if it has a NaN logit, if its
// maximum is +Inf, or if all of it is -Inf, and with it the scores of its entry of the batch. Deterministic:
// every sum has one fixed order for any number of threads. Memory besides the results is linear in N.
//
// In bfloat16, if the processor has bfloat16 products (SimdLevel::avx512_bf16), and in 16 bits on CUDA, the
// gradients of the logits are rounded to the element type before they are multiplied. Otherwise all
// intermediate results are in the accumulation type.
#pragma once

#include "executor.h"
#include "stream.h"
#include "types.h"

namespace evit {

struct MeanAttentionSizes {
  int64_t batch;     // B
  int64_t heads;     // H
  int64_t queries;   // M
  int64_t tokens;    // N
  int64_t channels;  // D
  double scale;
};

template <typename T>
struct MeanAttentionInput {
  const T* q;
  int64_t q_stride_b, q_stride_h, q_stride_m;
  const T* k;
  int64_t k_stride_b, k_stride_h, k_stride_n;

  const T* queries(int64_t b, int64_t h) const { return q + b * q_stride_b + h * q_stride_h; }
  const T* keys(int64_t b, int64_t h) const { return k + b * k_stride_b + h * k_stride_h; }
};

namespace cpu {

template <typename T>
void mean_attention(const MeanAttentionSizes& sizes, const MeanAttentionInput<T>& input,
                    accumulate_t<T>* scores, const Executor& executor);

// grad_q [B, H, M, D] and grad_k [B, H, N, D], dense, from grad_scores [B, N]. The probabilities are computed
// again from q and k. A thread computes whole heads.
template <typename T>
void mean_attention_backward(const MeanAttentionSizes& sizes, const MeanAttentionInput<T>& input,
                             const Tokens<accumulate_t<T>>& grad_scores, T* grad_q, T* grad_k,
                             const Executor& executor);

}  // namespace cpu

namespace cuda {

// The bytes of device memory that the kernels need as `workspace`, aligned to 16.
template <typename T>
int64_t mean_attention_workspace(const MeanAttentionSizes& sizes);
template <typename T>
int64_t mean_attention_backward_workspace(const MeanAttentionSizes& sizes);

// Like the CPU version. Three launches: of every query, the logarithm of its sum of exponentials; of every
// key and head, the sum of its probabilities; their means. In 16 bits tensor cores multiply, which may round
// differently in another generation of devices.
template <typename T>
void mean_attention(const MeanAttentionSizes& sizes, const MeanAttentionInput<T>& input,
                    accumulate_t<T>* scores, void* workspace, const Stream& stream);

// Like the CPU version. Three launches: of every query, what the gradients of its logits need; the gradients
// of queries; those of keys.
template <typename T>
void mean_attention_backward(const MeanAttentionSizes& sizes, const MeanAttentionInput<T>& input,
                             const Tokens<accumulate_t<T>>& grad_scores, T* grad_q, T* grad_k,
                             void* workspace, const Stream& stream);

}  // namespace cuda
}  // namespace evit
