// The gradient of attention_with_scores against plain loops in double, at every instruction level.
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

// Gradients of q, k and v, one after the other, [3][N][D], and of the bias of the keys, [N].
using Gradients = std::vector<double>;

// Of one head, in double. grad_out(m, c) and grad_scores(n) are those of its output and of its first row.
template <typename T, typename GradOut, typename GradScores>
Gradients expected_gradients(const Projection<T>& qkv, int64_t b, int64_t first_channel, int64_t tokens,
                             int64_t channels, double scale, const GradOut& grad_out,
                             const GradScores& grad_scores, const std::vector<double>& bias = {}) {
  Gradients grads(3 * tokens * channels + tokens, 0.0);
  double* grad_q = grads.data();
  double *grad_k = grad_q + tokens * channels, *grad_v = grad_k + tokens * channels;
  const auto at = [&](int64_t n, int64_t part, int64_t c) { return qkv.at(b, n, part, first_channel + c); };
  std::vector<double> grad_p(tokens);
  for (int64_t m = 0; m < tokens; ++m) {
    const std::vector<double> p = probabilities(qkv, b, m, first_channel, tokens, channels, scale, bias);
    double mean = 0;
    for (int64_t n = 0; n < tokens; ++n) {
      grad_p[n] = m == 0 ? grad_scores(n) : 0.0;
      for (int64_t c = 0; c < channels; ++c) {
        grad_p[n] += grad_out(m, c) * at(n, 2, c);
        grad_v[n * channels + c] += p[n] * grad_out(m, c);
      }
      mean += p[n] * grad_p[n];
    }
    for (int64_t n = 0; n < tokens; ++n) {
      grads[3 * tokens * channels + n] += p[n] * (grad_p[n] - mean);
      const double grad_logit = p[n] * (grad_p[n] - mean) * scale;
      for (int64_t c = 0; c < channels; ++c) {
        grad_q[m * channels + c] += grad_logit * at(n, 1, c);
        grad_k[n * channels + c] += grad_logit * at(m, 0, c);
      }
    }
  }
  return grads;
}

// Gradients are sums of terms that may cancel: their errors are relative to the largest.
double largest_of(const Gradients& grads) {
  double largest = 0;
  for (const double grad : grads) largest = std::max(largest, std::abs(grad));
  return largest;
}

template <typename T>
double allowed(const Gradients& expected) {
  return tolerance<T>() * (std::is_same_v<T, BFloat16> ? 1.5 : 1) * std::max(1.0, largest_of(expected));
}

constexpr int64_t kTokens[] = {1, 2, 3, 15, 16, 17, 25, 33, 47, 129};
constexpr int64_t kChannels[] = {1, 2, 8, 31, 33, 64, 80};

template <typename T>
void kernels_agree(const std::vector<SimdLevel>& levels, bool biased) {
  using A = accumulate_t<T>;
  for (const int64_t tokens : kTokens)
    for (const int64_t channels : kChannels) {
      const Projection<T> qkv(1, tokens, 1, channels, 3, 31);
      const int64_t grad_stride = channels + 2, out_stride = 3 * channels + 5;
      const Buffer<T> grad_out = random_values<T>((tokens - 1) * grad_stride + channels, 32);
      const Buffer<A> grad_scores = random_values<A>(tokens, 33);
      const Biases<A> biases(1, tokens, 40);
      const Buffer<A> bias = biases.padded(0);
      const double scale = 0.7 / std::sqrt(channels);
      const Gradients expected = expected_gradients(
          qkv, 0, 0, tokens, channels, scale,
          [&](int64_t m, int64_t c) { return to_double(grad_out[m * grad_stride + c]); },
          [&](int64_t n) { return to_double(grad_scores[n]); },
          biased ? biases.of(0) : std::vector<double>{});
      const double near = allowed<T>(expected);
      for (const SimdLevel level : levels) {
        const AttentionKernels<T>& kernels = cpu::attention_kernels<T>(level);
        ScratchMemory scratch(kernels.backward_scratch_bytes(tokens, channels));
        Buffer<T> grads((tokens - 1) * out_stride + 3 * channels);
        for (int64_t i = 0; i < grads.size; ++i) grads[i] = from_double<T>(7);
        const T* q = qkv.data.data.get();
        T* grad_q = grads.data.get();
        Buffer<A> grad_bias(cpu::padded(tokens));
        kernels.head_gradients(
            {q, qkv.stride_n, tokens, q + channels, q + 2 * channels, qkv.stride_n, grad_out.data.get(),
             grad_stride, grad_scores.data.get(), false, grad_q, grad_q + channels, grad_q + 2 * channels,
             out_stride, biased ? bias.data.get() : nullptr, biased ? grad_bias.data.get() : nullptr},
            tokens, channels, static_cast<A>(scale), scratch.get());
        CHECK(scratch.kept_to());
        if (level == SimdLevel::amx_bf16) CHECK(tiles_released());
        for (int64_t n = 0; biased && n < tokens; ++n)
          CHECK_NEAR(to_double(grad_bias[n]), expected[3 * tokens * channels + n], near);
        for (int64_t n = 0; n < tokens; ++n)
          for (int64_t c = 0; c < std::min(out_stride, grads.size - n * out_stride); ++c) {
            const double actual = to_double(grads[n * out_stride + c]);
            if (c >= 3 * channels)
              CHECK(actual == 7);
            else
              CHECK_NEAR(actual, expected[(c / channels * tokens + n) * channels + c % channels], near);
          }
      }
    }
}

TEST(attention_gradients_agree_at_every_level) {
  const std::vector<SimdLevel> levels = available_levels();
  for (const bool biased : {false, true}) {
    kernels_agree<float>(levels, biased);
    kernels_agree<double>(levels, biased);
    kernels_agree<Half>(levels, biased);
    kernels_agree<BFloat16>(levels, biased);
  }
}

template <typename T>
void agrees(int64_t batch, int64_t tokens, int64_t heads, int64_t channels, double scale,
            bool biased = false) {
  using A = accumulate_t<T>;
  const Projection<T> qkv(batch, tokens, heads, channels, 5, 34);
  const AttentionWithScoresSizes sizes = {batch, tokens, heads, channels, scale};
  const int64_t width = heads * channels, size = batch * tokens * 3 * width;
  // Of the output, with strides; and of the scores, the batch innermost.
  const Projection<T> grad_out(batch, tokens, heads, channels, 2, 35);
  const Buffer<A> grad_scores = random_values<A>(batch * tokens, 36);
  const Tokens<A> grad_scores_view = {grad_scores.data.get(), 1, batch};
  const Biases<A> biases(batch, tokens, 41);
  const Tokens<A> bias = biased ? biases.view() : Tokens<A>{};
  Buffer<T> grads(size), again(size);
  Buffer<A> grad_bias(biased ? batch * tokens : 0), bias_again(grad_bias.size);
  cpu::attention_with_scores_backward<T>(sizes, qkv.view(), bias, grad_out.view(), grad_scores_view,
                                         grads.data.get(), grad_bias.data.get(), serial_executor());
  cpu::attention_with_scores_backward<T>(sizes, qkv.view(), bias, grad_out.view(), grad_scores_view,
                                         again.data.get(), bias_again.data.get(), thread_executor());
  CHECK(std::memcmp(grad_bias.data.get(), bias_again.data.get(), grad_bias.size * sizeof(A)) == 0);
  CHECK(std::memcmp(grads.data.get(), again.data.get(), size * sizeof(T)) == 0);
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> sums(tokens, 0);
    double near_sums = 0;
    for (int64_t h = 0; h < heads; ++h) {
      const Gradients expected = expected_gradients(
          qkv, b, h * channels, tokens, channels, scale,
          [&](int64_t m, int64_t c) { return grad_out.at(b, m, 0, h * channels + c); },
          [&](int64_t n) { return to_double(grad_scores[n * batch + b]) / static_cast<double>(heads); },
          biased ? biases.of(b) : std::vector<double>{});
      const double near = allowed<T>(expected);
      near_sums += near;
      for (int64_t n = 0; n < tokens; ++n) sums[n] += expected[3 * tokens * channels + n];
      for (int64_t part = 0; part < 3; ++part)
        for (int64_t n = 0; n < tokens; ++n)
          for (int64_t c = 0; c < channels; ++c)
            CHECK_NEAR(to_double(grads[((b * tokens + n) * 3 + part) * width + h * channels + c]),
                       expected[(part * tokens + n) * channels + c], near);
    }
    for (int64_t n = 0; biased && n < tokens; ++n)
      CHECK_NEAR(to_double(grad_bias[b * tokens + n]), sums[n], near_sums);
  }
}

template <typename T>
void agrees_on_all_sizes() {
  agrees<T>(0, 5, 2, 4, 1.0);
  agrees<T>(2, 0, 2, 4, 1.0);
  agrees<T>(1, 1, 1, 1, 1.0);
  agrees<T>(3, 17, 3, 5, -0.37);
  agrees<T>(2, 197, 3, 64, 0.125);
  agrees<T>(5, 50, 2, 33, 0.2);
  agrees<T>(2, 0, 2, 4, 1.0, true);
  agrees<T>(1, 1, 1, 1, 1.0, true);
  agrees<T>(3, 17, 3, 5, -0.37, true);
  agrees<T>(2, 70, 3, 33, 0.2, true);
}

TEST(attention_with_scores_backward_agrees) {
  agrees_on_all_sizes<float>();
  agrees_on_all_sizes<double>();
  agrees_on_all_sizes<Half>();
  agrees_on_all_sizes<BFloat16>();
}

// A query that is not finite makes its own gradient NaN and those of all keys and values; the other queries'
// stay as they are.
template <typename T>
void nan_stays_in_its_row(SimdLevel level) {
  const AttentionKernels<T>& kernels = cpu::attention_kernels<T>(level);
  constexpr int64_t tokens = 5, channels = 3, bad = 2;
  Projection<T> qkv(1, tokens, 1, channels, 0, 37);
  const Buffer<T> grad_out = random_values<T>(tokens * channels, 38);
  const Buffer<accumulate_t<T>> grad_scores = random_values<accumulate_t<T>>(tokens, 39);
  ScratchMemory scratch(kernels.backward_scratch_bytes(tokens, channels));
  const auto gradients = [&] {
    Buffer<T> grads(tokens * 3 * channels);
    const T* q = qkv.data.data.get();
    T* grad_q = grads.data.get();
    kernels.head_gradients(
        {q, qkv.stride_n, tokens, q + channels, q + 2 * channels, qkv.stride_n, grad_out.data.get(), channels,
         grad_scores.data.get(), false, grad_q, grad_q + channels, grad_q + 2 * channels, 3 * channels},
        tokens, channels, accumulate_t<T>{1}, scratch.get());
    return grads;
  };
  const Buffer<T> good = gradients();
  std::memset(&qkv.data[bad * 3 * channels], 0xff, sizeof(T));  // NaN in every type
  const Buffer<T> grads = gradients();
  for (int64_t n = 0; n < tokens; ++n)
    for (int64_t c = 0; c < 3 * channels; ++c) {
      const T &now = grads[n * 3 * channels + c], &before = good[n * 3 * channels + c];
      if (c < channels && n != bad)
        CHECK(std::memcmp(&now, &before, sizeof(T)) == 0);
      else
        CHECK(std::isnan(to_double(now)));
    }
}

TEST(attention_gradients_are_nan_where_they_must_be) {
  for_each_level([](SimdLevel level) {
    nan_stays_in_its_row<float>(level);
    nan_stays_in_its_row<double>(level);
    nan_stays_in_its_row<Half>(level);
    nan_stays_in_its_row<BFloat16>(level);
  });
}

}  // namespace
}  // namespace evit::tests
