// The CUDA kernel of attention_with_scores against plain loops in double.
#include <algorithm>

#include "../evit/attention_with_scores.h"
#include "../evit/class_attention.h"
#include "device.h"

namespace evit::tests {
namespace {

// How a packed projection [B, N, 3, H, D] lies in memory: elements between tokens and between sequences.
struct Gaps {
  int64_t tokens = 0, batch = 0;
};

struct Strides {
  Strides(const AttentionWithScoresSizes& sizes, const Gaps& gaps)
      : n(3 * sizes.heads * sizes.channels + gaps.tokens), b(sizes.tokens * n + gaps.batch) {}
  int64_t n, b;
};

// Random values, NaN in the gaps, and no gap behind the last token: nothing else may be read.
template <typename T>
Buffer<T> make_qkv(const AttentionWithScoresSizes& sizes, const Gaps& gaps, uint32_t seed) {
  const Strides strides(sizes, gaps);
  const int64_t row = 3 * sizes.heads * sizes.channels;
  if (sizes.batch == 0 || sizes.tokens == 0) return Buffer<T>(0);
  const auto values = random_values<T>(sizes.batch * sizes.tokens * row, seed);
  Buffer<T> qkv((sizes.batch - 1) * strides.b + (sizes.tokens - 1) * strides.n + row);
  std::memset(static_cast<void*>(qkv.data.get()), 0xff, static_cast<size_t>(qkv.size) * sizeof(T));
  for (int64_t i = 0; i < values.size; ++i)
    qkv[i / row / sizes.tokens * strides.b + i / row % sizes.tokens * strides.n + i % row] = values[i];
  return qkv;
}

// Biases [B, N] of the keys, twice as far apart as they need be, the batch innermost: of the size of
// logarithms of small numbers, and -Inf for every fifth key. No element: no bias.
Buffer<float> make_bias(const AttentionWithScoresSizes& sizes, uint32_t seed) {
  Buffer<float> bias = random_values<float>(2 * sizes.batch * sizes.tokens, seed);
  for (int64_t n = 1; n < sizes.tokens; n += 5)
    for (int64_t b = 0; b < sizes.batch; ++b) bias[2 * n * sizes.batch + b] = -INFINITY;
  return bias;
}

Tokens<float> bias_view(const float* data, const AttentionWithScoresSizes& sizes) {
  return {data, 1, 2 * sizes.batch};
}

struct Expected {
  std::vector<double> out, scores;
  double largest_logit = 0;  // of those that are finite and make the scores
};

template <typename T>
Expected expect(const AttentionWithScoresSizes& sizes, const Buffer<T>& qkv, const Gaps& gaps,
                const Buffer<float>& bias) {
  const Strides strides(sizes, gaps);
  const int64_t tokens = sizes.tokens, channels = sizes.channels, width = sizes.heads * channels;
  Expected expected = {std::vector<double>(sizes.batch * tokens * width),
                       std::vector<double>(sizes.batch * tokens)};
  std::vector<double> values(qkv.size), p(tokens);
  for (int64_t i = 0; i < qkv.size; ++i) values[i] = to_double(qkv[i]);
  for (int64_t head = 0; head < sizes.batch * sizes.heads; ++head)
    for (int64_t m = 0; m < tokens; ++m) {
      const int64_t b = head / sizes.heads, h = head % sizes.heads;
      const double* q = &values[b * strides.b + m * strides.n + h * channels];
      const double* k = &values[b * strides.b + h * channels + width];
      double largest = -INFINITY, sum = 0;
      for (int64_t n = 0; n < tokens; ++n) {
        p[n] = 0;
        for (int64_t c = 0; c < channels; ++c) p[n] += q[c] * k[n * strides.n + c];
        p[n] *= sizes.scale;
        if (bias.size > 0) p[n] += *bias_view(bias.data.get(), sizes).row(b, n);
        largest = std::max(largest, p[n]);
        if (m == 0 && std::isfinite(p[n]))
          expected.largest_logit = std::max(expected.largest_logit, std::abs(p[n]));
      }
      for (double& value : p) sum += value = std::exp(value - largest);
      double* out = &expected.out[(b * tokens + m) * width + h * channels];
      for (int64_t n = 0; n < tokens; ++n) {
        p[n] /= sum;
        for (int64_t c = 0; c < channels; ++c) out[c] += p[n] * k[n * strides.n + width + c];
        if (m == 0) expected.scores[b * tokens + n] += p[n] / static_cast<double>(sizes.heads);
      }
    }
  return expected;
}

// The kernel's results, the same in every order of the threads.
template <typename T>
std::tuple<Buffer<T>, Buffer<float>> run(const AttentionWithScoresSizes& sizes, const Buffer<T>& qkv,
                                         const Gaps& gaps, const Buffer<float>& bias = Buffer<float>(0)) {
  const Strides strides(sizes, gaps);
  const DeviceBuffer<T> device_qkv(qkv);
  const Tokens<T> view = {device_qkv.data(), strides.b, strides.n};
  CHECK(cuda::attention_with_scores_available<T>(sizes, view));
  const DeviceBuffer<float> device_bias(bias);
  return same_every_time([&] {
    const DeviceBuffer<T> out(sizes.batch * sizes.tokens * sizes.heads * sizes.channels);
    const DeviceBuffer<float> scores(sizes.batch * sizes.tokens);
    const DeviceBuffer<char> workspace(cuda::attention_with_scores_workspace(sizes));
    cuda::attention_with_scores<T>(sizes, view, bias_view(device_bias.data(), sizes), out.data(),
                                   scores.data(), workspace.data(), test_stream());
    return std::tuple(out.read(), scores.read());
  });
}

// Probabilities and results are each rounded to the element type: 0.7 times the tolerance was seen. Scores
// were off by 4.1e-7 * (4 + the largest logit) of their value; a device's powers of two are off by some 2e-7
// more.
template <typename T>
void check(const AttentionWithScoresSizes& sizes, const Buffer<T>& qkv, const Gaps& gaps = {},
           const Buffer<float>& bias = Buffer<float>(0)) {
  const auto [out, scores] = run<T>(sizes, qkv, gaps, bias);
  const Expected expected = expect(sizes, qkv, gaps, bias);
  for (int64_t i = 0; i < out.size; ++i) CHECK_NEAR(to_double(out[i]), expected.out[i], tolerance<T>());
  for (int64_t i = 0; i < scores.size; ++i) {
    // What is no normal number may be 0.
    const double allowed = 6e-7 * (4 + expected.largest_logit) * expected.scores[i] + 1e-37;
    CHECK(std::isnan(expected.scores[i]) ? std::isnan(scores[i])
                                         : std::abs(scores[i] - expected.scores[i]) <= allowed);
  }
}

template <typename T>
void agrees(const AttentionWithScoresSizes& sizes, const Gaps& gaps = {}) {
  check<T>(sizes, make_qkv<T>(sizes, gaps, 31), gaps);
}

constexpr int64_t kChannels[] = {32, 64, 128};

TEST(cuda_attention_with_scores_agrees) {
  for (const int64_t channels : kChannels)
    for (const int64_t tokens : {1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 97, 129})
      for (const double scale : {1 / std::sqrt(channels), -0.3 / std::sqrt(channels)}) {
        agrees<Half>({1, tokens, 1, channels, scale});
        agrees<BFloat16>({1, tokens, 1, channels, scale});
      }
}

TEST(cuda_attention_with_scores_agrees_in_batches) {
  agrees<Half>({0, 5, 2, 64, 1.0});
  agrees<Half>({2, 0, 2, 64, 1.0});
  agrees<BFloat16>({3, 17, 6, 32, 0.2}, {8, 0});
  agrees<BFloat16>({2, 33, 3, 64, 0.1}, {0, 16});
  agrees<Half>({3, 20, 3, 128, 0.1}, {24, 8});
  agrees<BFloat16>({1, 197, 3, 64, 0.125});
  agrees<Half>({1, 577, 1, 64, 0.125});
}

TEST(cuda_attention_with_scores_agrees_with_a_bias) {
  const auto agrees_with_bias = [](auto zero, const AttentionWithScoresSizes& sizes) {
    using T = decltype(zero);
    check<T>(sizes, make_qkv<T>(sizes, {8, 8}, 41), {8, 8}, make_bias(sizes, 42));
  };
  for (const int64_t channels : kChannels)
    for (const int64_t tokens : {1, 2, 16, 31, 33, 64, 65, 97})
      for (const double scale : {1 / std::sqrt(channels), -0.3 / std::sqrt(channels)}) {
        agrees_with_bias(Half{}, {2, tokens, 1, channels, scale});
        agrees_with_bias(BFloat16{}, {1, tokens, 3, channels, scale});
      }
}

// One bias makes all of it NaN, or one token all that is seen; or everything is masked.
TEST(cuda_attention_with_scores_does_with_a_bias_what_softmax_does) {
  const AttentionWithScoresSizes sizes = {1, 70, 2, 32, 0.2};
  const auto qkv = make_qkv<BFloat16>(sizes, {}, 6);
  for (const double value : {double{NAN}, double{INFINITY}, 90.0, -90.0, -double{INFINITY}})
    for (const auto& [first, last] : {std::pair(0, 1), {0, 40}, {0, 69}, {0, 70}, {37, 38}, {66, 70}}) {
      Buffer<float> bias = make_bias(sizes, 43);
      for (int64_t n = 0; n < sizes.tokens; ++n) bias[2 * n] = n >= first && n < last ? value : 0.0;
      check(sizes, qkv, {}, bias);
    }
}

// The scores, of thousands of tokens: an error that every 32 keys multiply by once more would be seen. On a
// device: the host does not fuse products with the sums after them, which python_tests/test_ptx.py looks for.
TEST(cuda_attention_with_scores_agrees_on_thousands_of_tokens) {
  const AttentionWithScoresSizes sizes = {1, 4097, 1, 32, 0.2};
  const auto qkv = make_qkv<BFloat16>(sizes, {}, 8);
  const DeviceBuffer<BFloat16> device_qkv(qkv), out(4097 * 32);
  const DeviceBuffer<float> scores(4097);
  const DeviceBuffer<char> workspace(cuda::attention_with_scores_workspace(sizes));
  cuda::attention_with_scores<BFloat16>(sizes, {device_qkv.data(), 4097 * 96, 96}, {}, out.data(),
                                        scores.data(), workspace.data(), test_stream());
  const Buffer<float> actual = scores.read();
  std::vector<double> expected(4097);
  double largest = 0, sum = 0;
  for (int64_t n = 0; n < 4097; ++n) {
    for (int64_t c = 0; c < 32; ++c) expected[n] += to_double(qkv[c]) * to_double(qkv[96 * n + 32 + c]);
    largest = std::max(largest, std::abs(expected[n] *= sizes.scale));
  }
  for (double& value : expected) sum += value = std::exp(value);
  for (int64_t n = 0; n < 4097; ++n)
    CHECK(std::abs(actual[n] - expected[n] / sum) <= 6e-7 * (4 + largest) * expected[n] / sum);
}

// Most probabilities are 0, or all are equal.
TEST(cuda_attention_with_scores_agrees_on_extreme_scales) {
  for (const double scale : {8.0, -8.0, 0.0, 1e-30})
    for (const int64_t channels : kChannels) agrees<Half>({1, 70, 2, channels, scale});
}

// The largest logit is where it is passed over most easily: in each of the places that a lane sees in turn.
TEST(cuda_attention_with_scores_finds_the_largest_logit) {
  const AttentionWithScoresSizes sizes = {1, 70, 1, 32, 1.0};
  for (int64_t place = 0; place < sizes.tokens; ++place)
    for (const auto& [largest, others] : {std::pair(40, 8), {-8, -40}}) {  // of 8 times this, exponentials
      auto qkv = make_qkv<BFloat16>(sizes, {}, 5);
      for (int64_t n = 0; n < sizes.tokens; ++n) {
        qkv[n * 96] = from_double<BFloat16>(8);
        qkv[n * 96 + 32] = from_double<BFloat16>(n == place ? largest : others);
      }
      check(sizes, qkv);
    }
}

template <typename T>
T special(double value) {
  if (std::isnan(value)) return T{static_cast<uint16_t>(std::is_same_v<T, Half> ? 0x7e00 : 0x7fc0)};
  if (!std::isinf(value)) return from_double<T>(value);
  return T{static_cast<uint16_t>((std::is_same_v<T, Half> ? 0x7c00 : 0x7f80) | (value < 0 ? 0x8000 : 0))};
}

// Keys `first` to `last` have a logit that is not finite, with the queries of either sign.
template <typename T>
void bad_logits(int64_t channels) {
  const double inf = INFINITY;
  for (const double value : {double{NAN}, inf, -inf})
    for (const auto& [first, last] : {std::pair(0, 1), {0, 40}, {0, 69}, {0, 70}, {37, 38}, {66, 70}})
      for (const double scale : {0.5, -0.5, 0.0}) {
        const AttentionWithScoresSizes sizes = {1, 70, 2, channels, scale};
        auto qkv = make_qkv<T>(sizes, {}, 6);
        for (int64_t n = 0; n < sizes.tokens; ++n) {
          qkv[n * 6 * channels] = special<T>(n % 3 == 1 ? -1 : 1);  // of the first head; no query is 0
          if (n >= first && n < last) qkv[(n * 6 + 2) * channels] = special<T>(value);
        }
        check(sizes, qkv);
      }
}

TEST(cuda_attention_with_scores_is_nan_where_softmax_is) {
  bad_logits<BFloat16>(32);
  bad_logits<Half>(64);
  bad_logits<BFloat16>(128);
}

// To rounding of float32, next to the kernel whose place it takes: 6e-7 of the score was seen.
TEST(cuda_attention_with_scores_scores_as_class_attention) {
  for (const int64_t channels : kChannels) {
    const AttentionWithScoresSizes sizes = {2, 77, 3, channels, 1 / std::sqrt(channels)};
    const auto qkv = make_qkv<BFloat16>(sizes, {}, 7);
    const auto [out, scores] = run<BFloat16>(sizes, qkv, {});
    const DeviceBuffer<BFloat16> device_qkv(qkv);
    const DeviceBuffer<float> class_scores(2 * 77);
    const int64_t width = 3 * channels, b = 77 * 3 * width;
    cuda::class_attention<BFloat16>(
        {2, 3, 77, channels, sizes.scale},
        {device_qkv.data(), b, channels, device_qkv.data() + width, b, channels, 3 * width},
        class_scores.data(), nullptr, test_stream());
    const Buffer<float> others = class_scores.read();
    for (int64_t i = 0; i < scores.size; ++i) CHECK(std::abs(scores[i] - others[i]) <= 2e-6f * others[i]);
  }
}

TEST(cuda_attention_with_scores_says_what_it_takes) {
  const DeviceBuffer<Half> qkv(3 * 64 * 2 + 8);
  const auto available = [](int64_t channels, const Tokens<Half>& view) {
    return cuda::attention_with_scores_available<Half>({1, 2, 1, channels, 1.0}, view);
  };
  for (int64_t channels = 1; channels <= 256; ++channels)
    CHECK(available(channels, {qkv.data(), 0, 3 * channels * 8}) ==
          (channels == 32 || channels == 64 || channels == 128));
  CHECK(!available(64, {qkv.data() + 1, 384, 192}) && available(64, {qkv.data() + 8, 384, 192}));
  CHECK(!available(64, {qkv.data(), 388, 192}) && !available(64, {qkv.data(), 384, 196}));
  CHECK(throws<std::invalid_argument>([&] {
    cuda::attention_with_scores<Half>({1, 2, 1, 48, 1.0}, {qkv.data(), 288, 144}, {}, nullptr, nullptr,
                                      nullptr, test_stream());
  }));
}

}  // namespace
}  // namespace evit::tests
