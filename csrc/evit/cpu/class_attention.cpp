#include "../class_attention.h"

#include <memory>

#include "class_scores.h"

namespace evit::cpu {
template <typename T>
void class_attention(const ClassAttentionSizes& sizes, const ClassAttentionInput<T>& input,
                     accumulate_t<T>* scores, const Executor& executor) {
  using A = accumulate_t<T>;
  const auto& kernels = row_kernels<T>();
  const int64_t heads = sizes.heads, tokens = sizes.tokens, row = padded(tokens);
  const A scale = static_cast<A>(sizes.scale);
  // Heads run in parallel, so that even a batch of one keeps several threads busy; their mean is computed
  // afterwards, in the order of heads.
  const std::unique_ptr<A[]> probabilities(new A[buffer_size(sizes.batch, heads, row)]);
  executor.for_range(sizes.batch * heads, tokens * sizes.channels, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> query(new A[padded(sizes.channels)]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, h = i % heads;
      A* p = &probabilities[i * row];
      head_products(kernels, sizes, input, b, h, query.get(), p);
      if (input.logsumexp != nullptr)
        kernels.exp_row(p, tokens, scale, input.log_of_sum(b, h));
      else
        kernels.softmax(p, tokens, scale);
    }
  });
  executor.for_range(sizes.batch, heads * tokens, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      mean_of_heads(&probabilities[b * heads * row], row, heads, tokens, scores + b * tokens);
  });
}

template <typename T>
void class_attention_backward(const ClassAttentionSizes& sizes, const ClassAttentionInput<T>& input,
                              const accumulate_t<T>* grad_scores, int64_t grad_stride_b,
                              int64_t grad_stride_n, T* grad_q, T* grad_k, const Executor& executor) {
  using A = accumulate_t<T>;
  const auto& kernels = row_kernels<T>();
  const int64_t heads = sizes.heads, tokens = sizes.tokens, channels = sizes.channels;
  executor.for_range(sizes.batch * heads, 3 * tokens * channels, [&](int64_t begin, int64_t end) {
    const int64_t width = padded(channels);
    const std::unique_ptr<A[]> buffer(new A[2 * width + padded(tokens)]);
    A* query = buffer.get();
    A* sum = query + width;
    A* p = sum + width;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, h = i % heads;
      head_products(kernels, sizes, input, b, h, query, p);
      kernels.softmax(p, tokens, static_cast<A>(sizes.scale));
      // d logits_n = scale * p_n * (g_n - sum_m p_m g_m) with g = grad_scores / H, in p's place.
      const A* g = grad_scores + b * grad_stride_b;
      A mean = 0;
      for (int64_t n = 0; n < tokens; ++n) mean += p[n] * g[n * grad_stride_n];
      const A factor = static_cast<A>(sizes.scale) / static_cast<A>(heads);
      for (int64_t n = 0; n < tokens; ++n) p[n] *= (g[n * grad_stride_n] - mean) * factor;
      for (int64_t c = 0; c < width; ++c) sum[c] = 0;
      kernels.add_rows(p, input.keys(b, h), input.k_stride_n, nullptr, tokens, channels, sum);
      kernels.store_row(sum, channels, grad_q + i * channels);
      kernels.outer_rows(p, query, grad_k + i * tokens * channels, channels, nullptr, tokens, channels);
    }
  });
}

#define EVIT_INSTANTIATE(T)                                                                            \
  template void class_attention<T>(const ClassAttentionSizes&, const ClassAttentionInput<T>&,          \
                                   accumulate_t<T>*, const Executor&);                                 \
  template void class_attention_backward<T>(const ClassAttentionSizes&, const ClassAttentionInput<T>&, \
                                            const accumulate_t<T>*, int64_t, int64_t, T*, T*,          \
                                            const Executor&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cpu
