// mean_attention, and attention_with_scores with the mean over queries, against plain loops in double.
#include "../evit/mean_attention.h"

#include <algorithm>

#include "../evit/attention_with_scores.h"
#include "../evit/cpu/simd/attention_kernels.h"
#include "check.h"
#include "data.h"
#include "projection.h"

namespace evit::tests {
namespace {

using cpu::AttentionKernels;
using cpu::SimdLevel;

template <typename T>
void probabilities_agree(SimdLevel level) {
  using A = accumulate_t<T>;
  const AttentionKernels<T>& kernels = cpu::attention_kernels<T>(level);
  for (const int64_t tokens : {1, 2, 15, 16, 17, 31, 33, 63, 65, 129})
    for (const int64_t channels : {1, 8, 31, 33, 64}) {
      const Projection<T> qkv(1, tokens, 1, channels, 3, 51);
      const double scale = 0.7 / std::sqrt(channels);
      ScratchMemory scratch(kernels.scratch_bytes(tokens, channels));
      const T* q = qkv.data.data.get();
      kernels.pack(q + channels, nullptr, qkv.stride_n, tokens, channels, scratch.get());
      const int64_t count = std::min(kernels.queries, tokens);
      Buffer<A> sums(cpu::padded(tokens));
      std::fill_n(sums.data.get(), sums.size, A{1});
      kernels.add_probabilities(q, qkv.stride_n, count, tokens, channels, static_cast<A>(scale),
                                scratch.get(), sums.data.get());
      CHECK(scratch.kept_to());
      if (level == SimdLevel::amx_bf16) CHECK(tiles_released());
      std::vector<double> expected(tokens, 1);
      for (int64_t m = 0; m < count; ++m) {
        const std::vector<double> p = probabilities(qkv, 0, m, 0, tokens, channels, scale);
        for (int64_t n = 0; n < tokens; ++n) expected[n] += p[n];
      }
      for (int64_t n = 0; n < tokens; ++n) CHECK_NEAR(to_double(sums[n]), expected[n], 2 * tolerance<A>());
    }
}

TEST(sums_of_probabilities_agree_at_every_level) {
  for_each_level([](SimdLevel level) {
    probabilities_agree<float>(level);
    probabilities_agree<double>(level);
    probabilities_agree<Half>(level);
    probabilities_agree<BFloat16>(level);
  });
}

// Queries and keys are slices of one projection; the queries are the first of all tokens.
template <typename T>
void agrees(int64_t batch, int64_t queries, int64_t tokens, int64_t heads, int64_t channels, double scale) {
  using A = accumulate_t<T>;
  const Projection<T> qkv(batch, tokens, heads, channels, 5, 52);
  const MeanAttentionSizes sizes = {batch, heads, queries, tokens, channels, scale};
  const T* data = qkv.data.data.get();
  const MeanAttentionInput<T> input = {
      data,         qkv.stride_b, channels,    qkv.stride_n, data + heads * channels,
      qkv.stride_b, channels,     qkv.stride_n};
  // The batch innermost.
  const Buffer<A> grad_scores = random_values<A>(batch * tokens, 53);
  const Tokens<A> grad_view = {grad_scores.data.get(), 1, batch};
  const int64_t head = queries * channels, keys = tokens * channels;
  Buffer<A> scores(batch * tokens), scores_again(batch * tokens);
  Buffer<T> grad_q(batch * heads * head), grad_k(batch * heads * keys), q_again(grad_q.size),
      k_again(grad_k.size);
  cpu::mean_attention<T>(sizes, input, scores.data.get(), serial_executor());
  cpu::mean_attention<T>(sizes, input, scores_again.data.get(), thread_executor());
  cpu::mean_attention_backward<T>(sizes, input, grad_view, grad_q.data.get(), grad_k.data.get(),
                                  serial_executor());
  cpu::mean_attention_backward<T>(sizes, input, grad_view, q_again.data.get(), k_again.data.get(),
                                  thread_executor());
  CHECK(std::memcmp(scores.data.get(), scores_again.data.get(), scores.size * sizeof(A)) == 0);
  CHECK(std::memcmp(grad_q.data.get(), q_again.data.get(), grad_q.size * sizeof(T)) == 0);
  CHECK(std::memcmp(grad_k.data.get(), k_again.data.get(), grad_k.size * sizeof(T)) == 0);
  const double rows = static_cast<double>(heads * queries);
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> mean(tokens, 0);
    for (int64_t h = 0; h < heads; ++h) {
      std::vector<double> of_q(head, 0), of_k(keys, 0);
      for (int64_t m = 0; m < queries; ++m) {
        const std::vector<double> p = probabilities(qkv, b, m, h * channels, tokens, channels, scale);
        double weighted = 0;
        for (int64_t n = 0; n < tokens; ++n) {
          mean[n] += p[n] / rows;
          weighted += p[n] * to_double(grad_scores[n * batch + b]) / rows;
        }
        for (int64_t n = 0; n < tokens; ++n) {
          const double grad = p[n] * (to_double(grad_scores[n * batch + b]) / rows - weighted) * scale;
          for (int64_t c = 0; c < channels; ++c) {
            of_q[m * channels + c] += grad * qkv.at(b, n, 1, h * channels + c);
            of_k[n * channels + c] += grad * qkv.at(b, m, 0, h * channels + c);
          }
        }
      }
      // Gradients are small, and sums of terms that may cancel: relative to the largest.
      double largest = 0;
      for (const auto* of : {&of_q, &of_k})
        for (const double value : *of) largest = std::max(largest, std::abs(value));
      const double near = 4 * tolerance<T>() * largest;
      for (int64_t i = 0; i < head; ++i)
        CHECK(std::abs(to_double(grad_q[(b * heads + h) * head + i]) - of_q[i]) <= near + 1e-7);
      for (int64_t i = 0; i < keys; ++i)
        CHECK(std::abs(to_double(grad_k[(b * heads + h) * keys + i]) - of_k[i]) <= near + 1e-7);
    }
    for (int64_t n = 0; n < tokens; ++n)
      CHECK_NEAR(to_double(scores[b * tokens + n]), mean[n], tolerance<A>());
  }
}

template <typename T>
void agrees_on_all_sizes() {
  agrees<T>(0, 5, 5, 2, 4, 1.0);
  agrees<T>(1, 1, 1, 1, 1, 1.0);
  agrees<T>(3, 17, 17, 3, 5, -0.37);
  agrees<T>(2, 3, 50, 2, 33, 0.2);
  agrees<T>(2, 129, 129, 2, 64, 0.125);
}

TEST(mean_attention_agrees) {
  agrees_on_all_sizes<float>();
  agrees_on_all_sizes<double>();
  agrees_on_all_sizes<Half>();
  agrees_on_all_sizes<BFloat16>();
}

// attention_with_scores has the mean over queries from the probabilities with which it weighs the values.
template <typename T>
void is_also_attentions(int64_t batch, int64_t tokens, int64_t heads, int64_t channels) {
  using A = accumulate_t<T>;
  const Projection<T> qkv(batch, tokens, heads, channels, 5, 54);
  const int64_t width = heads * channels;
  const double scale = 1 / std::sqrt(channels);
  AttentionWithScoresSizes sizes = {batch, tokens, heads, channels, scale};
  Buffer<T> without(batch * tokens * width), out(without.size), again(without.size);
  Buffer<A> first(batch * tokens), scores(first.size), scores_again(first.size), wanted(first.size);
  cpu::attention_with_scores<T>(sizes, qkv.view(), {}, without.data.get(), first.data.get(),
                                serial_executor());
  sizes.mean = true;
  cpu::attention_with_scores<T>(sizes, qkv.view(), {}, out.data.get(), scores.data.get(), serial_executor());
  cpu::attention_with_scores<T>(sizes, qkv.view(), {}, again.data.get(), scores_again.data.get(),
                                thread_executor());
  CHECK(std::memcmp(out.data.get(), without.data.get(), out.size * sizeof(T)) == 0);
  CHECK(std::memcmp(out.data.get(), again.data.get(), out.size * sizeof(T)) == 0);
  CHECK(std::memcmp(scores.data.get(), scores_again.data.get(), scores.size * sizeof(A)) == 0);
  const T* data = qkv.data.data.get();
  cpu::mean_attention<T>(
      {batch, heads, tokens, tokens, channels, scale},
      {data, qkv.stride_b, channels, qkv.stride_n, data + width, qkv.stride_b, channels, qkv.stride_n},
      wanted.data.get(), serial_executor());
  // Probabilities may be rounded to bfloat16.
  const double near = std::is_same_v<T, BFloat16> ? tolerance<T>() : tolerance<A>();
  for (int64_t i = 0; i < scores.size; ++i)
    CHECK(std::abs(to_double(scores[i]) - to_double(wanted[i])) <= near * to_double(wanted[i]));
}

TEST(attention_with_scores_gives_the_mean_of_all_queries) {
  const auto of_all_types = [](int64_t batch, int64_t tokens, int64_t heads, int64_t channels) {
    is_also_attentions<float>(batch, tokens, heads, channels);
    is_also_attentions<double>(batch, tokens, heads, channels);
    is_also_attentions<Half>(batch, tokens, heads, channels);
    is_also_attentions<BFloat16>(batch, tokens, heads, channels);
  };
  of_all_types(0, 5, 2, 4);
  of_all_types(1, 1, 1, 1);
  for (const int64_t tokens : {2, 15, 24, 25, 33, 50, 97, 130}) of_all_types(2, tokens, 3, 20);
}

}  // namespace
}  // namespace evit::tests
