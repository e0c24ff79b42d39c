// The inner loops of attention_with_scores: attention of a block of queries of one head to all its keys, and
// the gradients of one head.
//
// As with row_kernels.h, the same source (attention_kernels.inc and what it includes) is
// compiled once per instruction level.
// Every product is summed over its depth in order, in one accumulator; the levels differ only where one has a
// fused multiply-add or rounds probabilities to bfloat16 (avx512_bf16) and another does not.
#pragma once

#include "../../types.h"
#include "row_kernels.h"

namespace evit::cpu {

// The largest number of queries that `attend` takes.
constexpr int64_t attention_queries = 24;

// One head of the packed projection, the gradients of its results, and the outputs for its own gradients.
template <typename T>
struct AttentionHead {
  const T *q, *k, *v;
  int64_t stride;  // between tokens
  const T* grad_out;
  int64_t grad_out_stride;
  const accumulate_t<T>* grad_scores;  // of the first query's probabilities, [N]
  T *grad_q, *grad_k, *grad_v;
  int64_t grad_stride;
  const accumulate_t<T>* key_bias = nullptr;  // as for `attend`
  accumulate_t<T>* grad_key_bias = nullptr;   // [N], padded; written if there is a bias
};

template <typename T>
struct AttentionKernels {
  using A = accumulate_t<T>;

  // Bytes of scratch memory, aligned to 64, for a head of `tokens` keys of `channels`: linear in both.
  int64_t (*scratch_bytes)(int64_t tokens, int64_t channels);
  // Copies keys and values, whose rows are `stride` apart, into scratch in the order in which `attend` reads
  // them.
  void (*pack)(const T* k, const T* v, int64_t stride, int64_t tokens, int64_t channels, void* scratch);
  // out_i = softmax_n(q_i . k_n * scale + key_bias_n) . v_n for `count` queries; n has `tokens` values, at
  // least one. key_bias is padded with zeros, or null: no bias.
  void (*attend)(const T* q, int64_t stride, int64_t count, int64_t tokens, int64_t channels, A scale,
                 const A* key_bias, void* scratch, T* out, int64_t out_stride);

  // The same for `head_gradients`, also linear in both.
  int64_t (*backward_scratch_bytes)(int64_t tokens, int64_t channels);
  // The gradients of q, k, v and key_bias of one head. Needs neither results of the forward pass nor packed
  // data.
  void (*head_gradients)(const AttentionHead<T>& head, int64_t tokens, int64_t channels, A scale,
                         void* scratch);
};

template <typename T>
const AttentionKernels<T>& attention_kernels(SimdLevel level);

template <typename T>
const AttentionKernels<T>& attention_kernels() {
  return attention_kernels<T>(simd_level());
}

}  // namespace evit::cpu
