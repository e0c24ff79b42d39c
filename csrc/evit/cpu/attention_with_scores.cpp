#include "../attention_with_scores.h"

#include <algorithm>
#include <memory>

#include "class_scores.h"
#include "scratch.h"
#include "simd/attention_kernels.h"

namespace evit::cpu {
namespace {

// Prefetches rows of one head: they lie apart, so the processor's own prefetching misses them.
template <typename T>
void prefetch(const T* rows, int64_t stride, int64_t count, int64_t channels) {
  for (int64_t n = 0; n < count; ++n)
    for (int64_t c = 0; c < channels; c += 64 / sizeof(T)) __builtin_prefetch(rows + n * stride + c, 0, 2);
}

// The biases of one sequence, in a row as the kernels take it: padded with zeros, or null if there are none.
template <typename A>
class BiasRow {
 public:
  BiasRow(const Tokens<A>& biases, int64_t tokens) : biases_(biases), tokens_(tokens) {
    if (biases.data != nullptr) row_.reset(new A[padded(tokens)]());
  }
  const A* of(int64_t b) {
    if (row_ != nullptr && b != b_)
      for (int64_t n = 0; n < tokens_; ++n) row_[n] = *biases_.row(b, n);
    b_ = b;
    return row_.get();
  }

 private:
  Tokens<A> biases_;
  int64_t tokens_, b_ = -1;
  std::unique_ptr<A[]> row_;
};

}  // namespace

template <typename T>
void attention_with_scores(const AttentionWithScoresSizes& sizes, const Tokens<T>& qkv,
                           const Tokens<accumulate_t<T>>& key_bias, T* out, accumulate_t<T>* scores,
                           const Executor& executor) {
  using A = accumulate_t<T>;
  // Copies, as clang before 16 captures no structured bindings.
  const int64_t batch = sizes.batch, tokens = sizes.tokens, heads = sizes.heads, channels = sizes.channels;
  const double scale = sizes.scale;
  if (batch == 0 || tokens == 0) return;
  const auto& rows = row_kernels<T>();
  const auto& kernels = attention_kernels<T>();
  const int64_t width = heads * channels, row = padded(tokens);
  const bool mean = sizes.mean;
  const ClassAttentionSizes class_sizes = {batch, heads, tokens, channels, scale};
  const ClassAttentionInput<T> class_input = {qkv.data,     qkv.stride_b, channels,    qkv.data + width,
                                              qkv.stride_b, channels,     qkv.stride_n};
  // An item is a block of queries of one head, so that even a batch of one keeps several threads busy; or a
  // part of them, of which few have a sum of probabilities each. A thread gets neighbouring items, and packs
  // a head's keys and values once for all its items of that head.
  const int64_t block = kernels.queries, blocks = blocks_of_head(tokens, block);
  const int64_t parts = mean ? parts_of_head(tokens, block) : blocks, rows_of_head = mean ? parts : 1;
  const std::unique_ptr<A[]> probabilities(new A[buffer_size(batch, heads, rows_of_head, row)]);
  executor.for_range(
      batch * heads * parts, std::min(tokens, block) * (blocks / parts) * tokens * channels,
      [&](int64_t begin, int64_t end) {
        const auto scratch = aligned_scratch(kernels.scratch_bytes(tokens, channels));
        const std::unique_ptr<A[]> query(new A[padded(channels)]);
        BiasRow<A> biases(key_bias, tokens);
        int64_t packed = -1;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t head = i / parts, b = head / heads, h = head % heads;
          const T* q = qkv.row(b, 0) + h * channels;
          const A* bias = biases.of(b);
          if (head != packed) {
            kernels.pack(q + width, q + 2 * width, qkv.stride_n, tokens, channels, scratch.get());
            packed = head;
          }
          A* p = &probabilities[(mean ? i : head) * row];
          if (mean) {
            std::fill_n(p, row, A{0});
          } else if (i % parts == 0) {
            head_products(rows, class_sizes, class_input, b, h, query.get(), p);
            if (bias != nullptr)
              for (int64_t n = 0; n < tokens; ++n) p[n] = p[n] * static_cast<A>(scale) + bias[n];
            rows.softmax(p, tokens, bias != nullptr ? A{1} : static_cast<A>(scale));
          }
          const int64_t last = end_of_part(i % parts, parts, tokens, block);
          for (int64_t first = end_of_part(i % parts - 1, parts, tokens, block); first < last;
               first += block) {
            const int64_t count = std::min(block, last - first);
            // Brings the next head's data into the second-level cache while this head is computed.
            if (head + 1 < batch * heads)
              for (int64_t part = 0; part < 3; ++part)
                prefetch(qkv.row((head + 1) / heads, first) + part * width + (head + 1) % heads * channels,
                         qkv.stride_n, count, channels);
            kernels.attend(q + first * qkv.stride_n, qkv.stride_n, count, tokens, channels,
                           static_cast<A>(scale), bias, scratch.get(),
                           out + (b * tokens + first) * width + h * channels, width, mean ? p : nullptr);
          }
        }
      });
  executor.for_range(batch, heads * tokens, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      mean_of_rows(&probabilities[b * heads * rows_of_head * row], row, heads * rows_of_head, tokens,
                   mean ? heads * tokens : heads, scores + b * tokens);
  });
}

template <typename T>
void attention_with_scores_backward(const AttentionWithScoresSizes& sizes, const Tokens<T>& qkv,
                                    const Tokens<accumulate_t<T>>& key_bias, const Tokens<T>& grad_out,
                                    const Tokens<accumulate_t<T>>& grad_scores, T* grad_qkv,
                                    accumulate_t<T>* grad_key_bias, const Executor& executor) {
  using A = accumulate_t<T>;
  const int64_t batch = sizes.batch, tokens = sizes.tokens, heads = sizes.heads, channels = sizes.channels;
  const double scale = sizes.scale;
  if (batch == 0 || tokens == 0) return;
  const auto& kernels = attention_kernels<T>();
  const int64_t width = heads * channels, row = padded(tokens);
  const bool biased = key_bias.data != nullptr;
  // Of each head: their sum is formed afterwards, in the order of heads.
  const std::unique_ptr<A[]> grad_biases(biased ? new A[buffer_size(batch, heads, row)] : nullptr);
  executor.for_range(batch * heads, 3 * tokens * tokens * channels, [&](int64_t begin, int64_t end) {
    const auto scratch = aligned_scratch(kernels.backward_scratch_bytes(tokens, channels));
    // Scores are means over heads, so every head gets 1 / H of their gradient; or over all rows of the maps.
    const int64_t averaged = sizes.mean ? heads * tokens : heads;
    const std::unique_ptr<A[]> grad_probabilities(new A[tokens]);
    BiasRow<A> biases(key_bias, tokens);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, h = i % heads;
      for (int64_t n = 0; n < tokens; ++n)
        grad_probabilities[n] = *grad_scores.row(b, n) / static_cast<A>(averaged);
      const T* q = qkv.row(b, 0) + h * channels;
      T* grad_q = grad_qkv + b * tokens * 3 * width + h * channels;
      kernels.head_gradients(
          {q, qkv.stride_n, tokens, q + width, q + 2 * width, qkv.stride_n, grad_out.row(b, 0) + h * channels,
           grad_out.stride_n, grad_probabilities.get(), sizes.mean, grad_q, grad_q + width,
           grad_q + 2 * width, 3 * width, biases.of(b), biased ? &grad_biases[i * row] : nullptr},
          tokens, channels, static_cast<A>(scale), scratch.get());
    }
  });
  if (!biased) return;
  executor.for_range(batch, heads * tokens, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      sum_of_heads(&grad_biases[b * heads * row], row, heads, tokens, grad_key_bias + b * tokens);
  });
}

#define EVIT_INSTANTIATE(T)                                                                                \
  template void attention_with_scores<T>(const AttentionWithScoresSizes&, const Tokens<T>&,                \
                                         const Tokens<accumulate_t<T>>&, T*, accumulate_t<T>*,             \
                                         const Executor&);                                                 \
  template void attention_with_scores_backward<T>(                                                         \
      const AttentionWithScoresSizes&, const Tokens<T>&, const Tokens<accumulate_t<T>>&, const Tokens<T>&, \
      const Tokens<accumulate_t<T>>&, T*, accumulate_t<T>*, const Executor&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cpu
