// The inner loops of attention_with_scores and mean_attention: attention of a block of queries of one head to
// all its keys, and the gradients of one head.
//
// As with row_kernels.h, the same source (attention_kernels.inc and what it includes) is
// compiled once per instruction level.
// Every product is summed over its depth in order, in one accumulator; the levels differ only where one has a
// fused multiply-add or rounds probabilities to bfloat16 (avx512_bf16) and another does not.
#pragma once

#include <algorithm>

#include "../../types.h"
#include "row_kernels.h"

namespace evit::cpu {

// One head, the gradients of its results, and the outputs for its own gradients. Without grad_out only the
// probabilities have a gradient: v and grad_v are not used then.
template <typename T>
struct AttentionHead {
  const T* q;
  int64_t q_stride;  // between queries
  int64_t queries;   // M
  const T *k, *v;
  int64_t stride;  // between tokens
  const T* grad_out;
  int64_t grad_out_stride;
  const accumulate_t<T>* grad_scores;  // of the first query's probabilities, [N], or of every query's
  bool of_every_query;
  T *grad_q, *grad_k, *grad_v;
  int64_t grad_stride;
  const accumulate_t<T>* key_bias = nullptr;  // as for `attend`
  accumulate_t<T>* grad_key_bias = nullptr;   // [N], padded; written if there is a bias
};

template <typename T>
struct AttentionKernels {
  using A = accumulate_t<T>;

  // The largest number of queries that `attend` and `add_probabilities` take.
  int64_t queries;
  // Bytes of scratch memory, aligned to 64, for a head of `tokens` keys of `channels`: linear in both.
  int64_t (*scratch_bytes)(int64_t tokens, int64_t channels);
  // Copies keys and values, whose rows are `stride` apart, into scratch in the order in which `attend` reads
  // them; only keys if `v` is null.
  void (*pack)(const T* k, const T* v, int64_t stride, int64_t tokens, int64_t channels, void* scratch);
  // out_i = softmax_n(q_i . k_n * scale + key_bias_n) . v_n for `count` queries; n has `tokens` values, at
  // least one. key_bias is padded with zeros, or null: no bias. If `sums` is not null, the probabilities, as
  // they weigh the values, are added up over the queries: sums_n, padded, grows by those of n.
  void (*attend)(const T* q, int64_t stride, int64_t count, int64_t tokens, int64_t channels, A scale,
                 const A* key_bias, void* scratch, T* out, int64_t out_stride, A* sums);
  // Only that, from packed keys: sums_n += sum_i softmax_n(q_i . k_n * scale), nothing of it rounded.
  void (*add_probabilities)(const T* q, int64_t stride, int64_t count, int64_t tokens, int64_t channels,
                            A scale, void* scratch, A* sums);

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

// Sums over queries are formed in parts of a head, which may run at once: as many as there are blocks, but
// never more than this, so that memory is linear in N. Part i ends at a multiple of `block`, the kernels'
// number.
constexpr int64_t most_parts = 4;
constexpr int64_t blocks_of_head(int64_t queries, int64_t block) { return (queries + block - 1) / block; }
constexpr int64_t parts_of_head(int64_t queries, int64_t block) {
  return std::min(most_parts, blocks_of_head(queries, block));
}
constexpr int64_t end_of_part(int64_t i, int64_t parts, int64_t queries, int64_t block) {
  return std::min(queries, (i + 1) * blocks_of_head(queries, block) / parts * block);
}

}  // namespace evit::cpu
