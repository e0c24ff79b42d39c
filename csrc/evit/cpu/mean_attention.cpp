#include "../mean_attention.h"

#include <algorithm>
#include <memory>

#include "class_scores.h"
#include "scratch.h"
#include "simd/attention_kernels.h"

namespace evit::cpu {

template <typename T>
void mean_attention(const MeanAttentionSizes& sizes, const MeanAttentionInput<T>& input,
                    accumulate_t<T>* scores, const Executor& executor) {
  using A = accumulate_t<T>;
  const auto& kernels = attention_kernels<T>();
  const int64_t heads = sizes.heads, tokens = sizes.tokens, channels = sizes.channels, row = padded(tokens);
  const int64_t block = kernels.queries, parts = parts_of_head(sizes.queries, block);
  const std::unique_ptr<A[]> sums(new A[buffer_size(sizes.batch, heads, parts, row)]);
  // An item is a part of a head's queries; a thread packs a head's keys once for all its items of that head.
  executor.for_range(
      sizes.batch * heads * parts, (sizes.queries + parts - 1) / parts * tokens * channels,
      [&](int64_t begin, int64_t end) {
        const auto scratch = aligned_scratch(kernels.scratch_bytes(tokens, channels));
        int64_t packed = -1;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t head = i / parts, b = head / heads, h = head % heads;
          if (head != packed)
            kernels.pack(input.keys(b, h), nullptr, input.k_stride_n, tokens, channels, scratch.get());
          packed = head;
          const int64_t last = end_of_part(i % parts, parts, sizes.queries, block);
          std::fill_n(&sums[i * row], row, A{0});
          for (int64_t m = end_of_part(i % parts - 1, parts, sizes.queries, block); m < last; m += block)
            kernels.add_probabilities(input.queries(b, h) + m * input.q_stride_m, input.q_stride_m,
                                      std::min(block, last - m), tokens, channels,
                                      static_cast<A>(sizes.scale), scratch.get(), &sums[i * row]);
        }
      });
  executor.for_range(sizes.batch, heads * parts * tokens, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      mean_of_rows(&sums[b * heads * parts * row], row, heads * parts, tokens, heads * sizes.queries,
                   scores + b * tokens);
  });
}

template <typename T>
void mean_attention_backward(const MeanAttentionSizes& sizes, const MeanAttentionInput<T>& input,
                             const Tokens<accumulate_t<T>>& grad_scores, T* grad_q, T* grad_k,
                             const Executor& executor) {
  using A = accumulate_t<T>;
  const auto& kernels = attention_kernels<T>();
  const int64_t heads = sizes.heads, tokens = sizes.tokens, channels = sizes.channels;
  executor.for_range(
      sizes.batch * heads, 3 * sizes.queries * tokens * channels, [&](int64_t begin, int64_t end) {
        const auto scratch = aligned_scratch(kernels.backward_scratch_bytes(tokens, channels));
        const std::unique_ptr<A[]> grad_probabilities(new A[tokens]);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / heads, h = i % heads;
          for (int64_t n = 0; n < tokens; ++n)
            grad_probabilities[n] = *grad_scores.row(b, n) / static_cast<A>(heads * sizes.queries);
          AttentionHead<T> head = {};
          head.q = input.queries(b, h);
          head.q_stride = input.q_stride_m;
          head.queries = sizes.queries;
          head.k = input.keys(b, h);
          head.stride = input.k_stride_n;
          head.grad_scores = grad_probabilities.get();
          head.of_every_query = true;
          head.grad_q = grad_q + i * sizes.queries * channels;
          head.grad_k = grad_k + i * tokens * channels;
          head.grad_stride = channels;
          kernels.head_gradients(head, tokens, channels, static_cast<A>(sizes.scale), scratch.get());
        }
      });
}

#define EVIT_INSTANTIATE(T)                                                                                  \
  template void mean_attention<T>(const MeanAttentionSizes&, const MeanAttentionInput<T>&, accumulate_t<T>*, \
                                  const Executor&);                                                          \
  template void mean_attention_backward<T>(const MeanAttentionSizes&, const MeanAttentionInput<T>&,          \
                                           const Tokens<accumulate_t<T>>&, T*, T*, const Executor&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cpu
