// Shared by class_attention and attention_with_scores, so that their scores are bit-identical.
#pragma once

#include "../class_attention.h"
#include "simd/row_kernels.h"

namespace evit::cpu {

// q . k_n of one head, into products[padded(N)]. query is padded(D) long.
template <typename T>
void head_products(const RowKernels<T>& kernels, const ClassAttentionSizes& sizes,
                   const ClassAttentionInput<T>& input, int64_t b, int64_t h, accumulate_t<T>* query,
                   accumulate_t<T>* products) {
  kernels.load_row(input.query(b, h), sizes.channels, query);
  kernels.dot_rows(query, input.keys(b, h), input.k_stride_n, nullptr, sizes.tokens, sizes.channels,
                   products);
}

// sums[n] = sum over heads, in their order; each head has a row of `stride` values.
template <typename A>
void sum_of_heads(const A* rows, int64_t stride, int64_t heads, int64_t tokens, A* sums) {
  for (int64_t n = 0; n < tokens; ++n) sums[n] = rows[n];
  for (int64_t h = 1; h < heads; ++h)
    for (int64_t n = 0; n < tokens; ++n) sums[n] += rows[h * stride + n];
}

// scores[n] = sum over rows / count.
template <typename A>
void mean_of_rows(const A* rows, int64_t stride, int64_t num_rows, int64_t tokens, int64_t count, A* scores) {
  sum_of_heads(rows, stride, num_rows, tokens, scores);
  for (int64_t n = 0; n < tokens; ++n) scores[n] /= static_cast<A>(count);
}

// scores[n] = mean over heads, in their order.
template <typename A>
void mean_of_heads(const A* rows, int64_t stride, int64_t heads, int64_t tokens, A* scores) {
  mean_of_rows(rows, stride, heads, tokens, heads, scores);
}

}  // namespace evit::cpu
