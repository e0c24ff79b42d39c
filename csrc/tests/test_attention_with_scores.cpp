// attention_with_scores against plain loops in double, at every instruction level.
#include "../evit/attention_with_scores.h"

#include <algorithm>

#include "../evit/class_attention.h"
#include "../evit/cpu/simd/attention_kernels.h"
#include "check.h"
#include "data.h"
#include "projection.h"

namespace evit::tests {
namespace {

using cpu::AttentionKernels;
using cpu::SimdLevel;

// softmax(q_m . k * scale + bias) v of one head, in double.
template <typename T>
std::vector<double> expected_row(const Projection<T>& qkv, int64_t b, int64_t m, int64_t first_channel,
                                 int64_t tokens, int64_t channels, double scale,
                                 const std::vector<double>& bias = {}) {
  const std::vector<double> p = probabilities(qkv, b, m, first_channel, tokens, channels, scale, bias);
  std::vector<double> out(channels, 0);
  for (int64_t n = 0; n < tokens; ++n)
    for (int64_t c = 0; c < channels; ++c) out[c] += p[n] * qkv.at(b, n, 2, first_channel + c);
  return out;
}

constexpr int64_t kTokens[] = {1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 129, 197};
constexpr int64_t kChannels[] = {1, 2, 8, 24, 31, 32, 33, 64, 65, 80, 128};

template <typename T>
void kernels_agree(SimdLevel level, bool biased) {
  const AttentionKernels<T>& kernels = cpu::attention_kernels<T>(level);
  // Probabilities of 8 bits weigh values of about 1: the errors of many are smaller than that of one.
  const double allowed = tolerance<T>() * (std::is_same_v<T, BFloat16> ? 1.5 : 1);
  for (const int64_t tokens : kTokens)
    for (const int64_t channels : kChannels) {
      const Projection<T> qkv(1, tokens, 1, channels, 3, 21);
      const double scale = 0.7 / std::sqrt(channels);
      const Biases<accumulate_t<T>> biases(1, tokens, 23);
      const Buffer<accumulate_t<T>> bias = biases.padded(0);
      ScratchMemory scratch(kernels.scratch_bytes(tokens, channels));
      const T* q = qkv.data.data.get();
      kernels.pack(q + channels, q + 2 * channels, qkv.stride_n, tokens, channels, scratch.get());
      const int64_t out_stride = channels + 2;
      Buffer<T> out((tokens - 1) * out_stride + channels);
      for (int64_t i = 0; i < out.size; ++i) out[i] = from_double<T>(7);
      for (int64_t first = 0; first < tokens; first += kernels.queries)
        kernels.attend(q + first * qkv.stride_n, qkv.stride_n, std::min(kernels.queries, tokens - first),
                       tokens, channels, static_cast<accumulate_t<T>>(scale),
                       biased ? bias.data.get() : nullptr, scratch.get(), &out[first * out_stride],
                       out_stride, nullptr);
      CHECK(scratch.kept_to());
      if (level == SimdLevel::amx_bf16) CHECK(tiles_released());
      for (int64_t m = 0; m < tokens; ++m) {
        const std::vector<double> expected = expected_row(qkv, 0, m, 0, tokens, channels, scale,
                                                          biased ? biases.of(0) : std::vector<double>{});
        for (int64_t c = 0; c < channels; ++c)
          CHECK_NEAR(to_double(out[m * out_stride + c]), expected[c], allowed);
        for (int64_t c = channels; m + 1 < tokens && c < out_stride; ++c)
          CHECK(to_double(out[m * out_stride + c]) == 7);
      }
    }
}

TEST(attention_kernels_agree_at_every_level) {
  for_each_level([](SimdLevel level) {
    for (const bool biased : {false, true}) {
      kernels_agree<float>(level, biased);
      kernels_agree<double>(level, biased);
      kernels_agree<Half>(level, biased);
      kernels_agree<BFloat16>(level, biased);
    }
  });
}

template <typename T>
void agrees(int64_t batch, int64_t tokens, int64_t heads, int64_t channels, double scale,
            bool biased = false) {
  using A = accumulate_t<T>;
  const Projection<T> qkv(batch, tokens, heads, channels, 5, 22);
  const AttentionWithScoresSizes sizes = {batch, tokens, heads, channels, scale};
  const int64_t width = heads * channels;
  const Biases<A> biases(batch, tokens, 24);
  const Tokens<A> bias = biased ? biases.view() : Tokens<A>{};
  Buffer<T> out(batch * tokens * width), again(batch * tokens * width);
  Buffer<A> scores(batch * tokens), scores_again(batch * tokens), wanted(batch * tokens);
  cpu::attention_with_scores<T>(sizes, qkv.view(), bias, out.data.get(), scores.data.get(),
                                serial_executor());
  cpu::attention_with_scores<T>(sizes, qkv.view(), bias, again.data.get(), scores_again.data.get(),
                                thread_executor());
  CHECK(std::memcmp(out.data.get(), again.data.get(), out.size * sizeof(T)) == 0);
  CHECK(std::memcmp(scores.data.get(), scores_again.data.get(), scores.size * sizeof(A)) == 0);
  if (tokens > 0) {
    const T* data = qkv.data.data.get();
    cpu::class_attention<T>(
        {batch, heads, tokens, channels, scale},
        {data, qkv.stride_b, channels, data + width, qkv.stride_b, channels, qkv.stride_n}, wanted.data.get(),
        serial_executor());
  }
  if (!biased) CHECK(std::memcmp(scores.data.get(), wanted.data.get(), scores.size * sizeof(A)) == 0);
  for (int64_t b = 0; b < batch; ++b) {
    const std::vector<double> of_b = biased ? biases.of(b) : std::vector<double>{};
    std::vector<double> mean(tokens, 0);
    for (int64_t h = 0; h < heads && tokens > 0; ++h) {
      const auto p = probabilities(qkv, b, 0, h * channels, tokens, channels, scale, of_b);
      for (int64_t n = 0; n < tokens; ++n) mean[n] += p[n] / static_cast<double>(heads);
    }
    for (int64_t n = 0; n < tokens; ++n)
      CHECK_NEAR(to_double(scores[b * tokens + n]), mean[n], tolerance<A>());
    for (int64_t m = 0; m < tokens; ++m)
      for (int64_t h = 0; h < heads; ++h) {
        const auto expected = expected_row(qkv, b, m, h * channels, tokens, channels, scale, of_b);
        for (int64_t c = 0; c < channels; ++c)
          CHECK_NEAR(to_double(out[(b * tokens + m) * width + h * channels + c]), expected[c],
                     tolerance<T>() * (std::is_same_v<T, BFloat16> ? 1.5 : 1));
      }
  }
}

template <typename T>
void agrees_on_all_sizes() {
  agrees<T>(0, 5, 2, 4, 1.0);
  agrees<T>(2, 0, 2, 4, 1.0);
  agrees<T>(1, 1, 1, 1, 1.0);
  agrees<T>(3, 17, 3, 5, -0.37);
  agrees<T>(2, 197, 6, 64, 0.125);
  agrees<T>(5, 50, 2, 33, 0.2);
  agrees<T>(1, 577, 2, 80, 0.1);
  agrees<T>(3, 0, 2, 4, 1.0, true);
  agrees<T>(1, 1, 1, 1, 1.0, true);
  agrees<T>(3, 17, 3, 5, -0.37, true);
  agrees<T>(2, 197, 3, 64, 0.125, true);
}

TEST(attention_with_scores_agrees) {
  agrees_on_all_sizes<float>();
  agrees_on_all_sizes<double>();
  agrees_on_all_sizes<Half>();
  agrees_on_all_sizes<BFloat16>();
}

// Two tokens a head; what is not finite in one row of queries stays there.
template <typename T>
void bad_logits(SimdLevel level) {
  const AttentionKernels<T>& kernels = cpu::attention_kernels<T>(level);
  const double inf = INFINITY, nan = NAN;
  const double queries[] = {1, nan, inf, -inf, 1e4};
  for (const double key : {1.0, nan, inf, -inf}) {
    Buffer<T> q(5), k(3), v(3), out(5);
    const auto set = [](T& element, double value) {
      if constexpr (sizeof(T) == 2)
        element.bits = std::isnan(value) ? (std::is_same_v<T, Half> ? 0x7e00 : 0x7fc0)
                       : std::isinf(value)
                           ? (std::is_same_v<T, Half> ? 0x7c00 : 0x7f80) | (value < 0 ? 0x8000 : 0)
                           : from_double<T>(value).bits;
      else
        element = static_cast<T>(value);
    };
    for (int64_t i = 0; i < 5; ++i) set(q[i], queries[i]);
    const double keys[] = {0.5, key, -0.25};
    for (int64_t n = 0; n < 3; ++n) set(k[n], keys[n]), set(v[n], n + 1.0);
    ScratchMemory scratch(kernels.scratch_bytes(3, 1));
    kernels.pack(k.data.get(), v.data.get(), 1, 3, 1, scratch.get());
    kernels.attend(q.data.get(), 1, 5, 3, 1, 1, nullptr, scratch.get(), out.data.get(), 1, nullptr);
    for (int64_t m = 0; m < 5; ++m) {
      double largest = -inf, sum = 0, expected = 0;
      for (const double value : keys) largest = std::max(largest, queries[m] * value);
      for (int64_t n = 0; n < 3; ++n) {
        const double e = std::exp(queries[m] * keys[n] - largest);
        sum += e;
        expected += e * (n + 1);
      }
      CHECK_NEAR(to_double(out[m]), expected / sum, tolerance<T>() * 1.5);
    }
  }
}

TEST(attention_is_nan_where_softmax_is) {
  for_each_level([](SimdLevel level) {
    bad_logits<float>(level);
    bad_logits<double>(level);
    bad_logits<Half>(level);
    bad_logits<BFloat16>(level);
  });
}

}  // namespace
}  // namespace evit::tests
