// class_attention: scores[b, n] = mean_h softmax_n(q[b, h] . k[b, h, n] * scale).
//
// q [B, H, D], k [B, H, N, D], both with a dense last dimension and any other strides (k is usually a slice
// of a packed qkv projection). scores [B, N], dense, in the accumulation type. B may be 0; H, N, D at
// least 1. A head's scores become NaN if it has a NaN logit, if its maximum is +Inf, or if all its logits are
// -Inf. Differentiable in q and k. Deterministic: every sum has one fixed order for any number of threads.
//
// If an attention kernel has computed log(sum_n exp(q . k_n * scale)) for the query, it can be passed as
// logsumexp [B, H], with any strides. The softmax is then exp(q . k_n * scale - logsumexp), without computing
// its maximum or sum. The value is trusted; a NaN in it makes its head's scores NaN.
#pragma once

#include "executor.h"
#include "stream.h"
#include "types.h"

namespace evit {

struct ClassAttentionSizes {
  int64_t batch;     // B
  int64_t heads;     // H
  int64_t tokens;    // N
  int64_t channels;  // D
  double scale;
};

template <typename T>
struct ClassAttentionInput {
  const T* q;
  int64_t q_stride_b, q_stride_h;
  const T* k;
  int64_t k_stride_b, k_stride_h, k_stride_n;
  const accumulate_t<T>* logsumexp = nullptr;  // may be null
  int64_t logsumexp_stride_b = 0, logsumexp_stride_h = 0;

  EVIT_HOST_DEVICE const T* query(int64_t b, int64_t h) const { return q + b * q_stride_b + h * q_stride_h; }
  EVIT_HOST_DEVICE const T* keys(int64_t b, int64_t h) const { return k + b * k_stride_b + h * k_stride_h; }
  EVIT_HOST_DEVICE accumulate_t<T> log_of_sum(int64_t b, int64_t h) const {
    return logsumexp[b * logsumexp_stride_b + h * logsumexp_stride_h];
  }
};

namespace cpu {

template <typename T>
void class_attention(const ClassAttentionSizes& sizes, const ClassAttentionInput<T>& input,
                     accumulate_t<T>* scores, const Executor& executor);

// grad_q [B, H, D] and grad_k [B, H, N, D], dense, from grad_scores [B, N] (strides in elements). The softmax
// is computed again from q and k; logsumexp is not used.
template <typename T>
void class_attention_backward(const ClassAttentionSizes& sizes, const ClassAttentionInput<T>& input,
                              const accumulate_t<T>* grad_scores, int64_t grad_stride_b,
                              int64_t grad_stride_n, T* grad_q, T* grad_k, const Executor& executor);

}  // namespace cpu

namespace cuda {

// The bytes of device memory that the kernels need as `workspace`, aligned to 16: often none.
template <typename T>
int64_t class_attention_workspace(const ClassAttentionSizes& sizes, bool logsumexp);
template <typename T>
int64_t class_attention_backward_workspace(const ClassAttentionSizes& sizes);

// Like the CPU version. One launch if no workspace is needed; two for up to 8 long sequences, whose heads
// have a block each; three where the logits of a sequence do not fit into a multiprocessor. In 16 bits tensor
// cores multiply, which may round differently in another generation of devices.
template <typename T>
void class_attention(const ClassAttentionSizes& sizes, const ClassAttentionInput<T>& input,
                     accumulate_t<T>* scores, void* workspace, const Stream& stream);

// Like the CPU version. One launch.
template <typename T>
void class_attention_backward(const ClassAttentionSizes& sizes, const ClassAttentionInput<T>& input,
                              const accumulate_t<T>* grad_scores, int64_t grad_stride_b,
                              int64_t grad_stride_n, T* grad_q, T* grad_k, void* workspace,
                              const Stream& stream);

}  // namespace cuda
}  // namespace evit
