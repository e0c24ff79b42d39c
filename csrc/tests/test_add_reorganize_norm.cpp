// add_reorganize_norm against its three steps: a plain sum, reorganize_tokens, a LayerNorm in double.
#include "../evit/add_reorganize_norm.h"

#include <algorithm>

#include "check.h"
#include "data.h"

namespace evit::tests {
namespace {

constexpr double kEps = 0.03;

template <typename T, typename S>
void agrees(const ReorganizeSizes& sizes, bool weighted, bool biased, const Executor& executor) {
  const auto [batch, num_tokens, prefix, keep, channels, fuse] = sizes;
  const int64_t x_stride = channels + 1, branch_stride = channels + 4, width = sizes.patches();
  const auto x_values = random_values<T>(batch * num_tokens * x_stride, 1);
  const auto branch_values = random_values<T>(batch * num_tokens * branch_stride, 2);
  const auto score_values = random_values<S>(batch * width * 2, 3);  // every second element
  const auto weight = random_values<T>(channels, 4), bias = random_values<T>(channels, 5);
  const Tokens<T> x = {x_values.data.get(), num_tokens * x_stride, x_stride};
  const Tokens<T> branch = {branch_values.data.get(), num_tokens * branch_stride, branch_stride};
  const Tokens<S> scores = {score_values.data.get(), width * 2, 2};
  const LayerNorm<T> norm = {weighted ? weight.data.get() : nullptr, biased ? bias.data.get() : nullptr,
                             kEps};

  const int64_t out_rows = batch * sizes.out_tokens();
  Buffer<T> tokens(out_rows * channels), normed(out_rows * channels);
  Buffer<int64_t> kept(batch * keep);
  cpu::add_reorganize_norm<T, S>(sizes, x, branch, scores, norm, tokens.data.get(), normed.data.get(),
                                 kept.data.get(), executor);

  Buffer<T> sum(batch * num_tokens * channels), expected(tokens.size);
  Buffer<int64_t> expected_kept(kept.size);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t n = 0; n < num_tokens; ++n)
      for (int64_t c = 0; c < channels; ++c)
        sum[(b * num_tokens + n) * channels + c] =
            from_double<T>(to_double(x.row(b, n)[c]) + to_double(branch.row(b, n)[c]));
  cpu::reorganize_tokens<T, S>(sizes, {sum.data.get(), num_tokens * channels, channels}, scores,
                               expected.data.get(), expected_kept.data.get(), serial_executor());
  for (int64_t i = 0; i < kept.size; ++i) CHECK(kept[i] == expected_kept[i]);
  for (int64_t i = 0; i < tokens.size; ++i) CHECK(to_double(tokens[i]) == to_double(expected[i]));

  for (int64_t row = 0; row < out_rows; ++row) {
    const T* in = &tokens[row * channels];
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < channels; ++c) mean += to_double(in[c]) / channels;
    for (int64_t c = 0; c < channels; ++c) variance += std::pow(to_double(in[c]) - mean, 2) / channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double w = weighted ? to_double(weight[c]) : 1, shift = biased ? to_double(bias[c]) : 0;
      CHECK_NEAR(to_double(normed[row * channels + c]),
                 (to_double(in[c]) - mean) / std::sqrt(variance + kEps) * w + shift,
                 tolerance<T>() * (sizeof(T) == 2 ? 1 : 4));
    }
  }
}

template <typename T>
void agrees_on_all_sizes() {
  for (const Executor& executor : {serial_executor(), thread_executor()})
    for (const ReorganizeSizes& sizes : {ReorganizeSizes{2, 7, 1, 4, 5, true},
                                         {0, 3, 1, 1, 3, true},
                                         {1, 2, 1, 1, 1, false},
                                         {3, 9, 0, 9, 16, false},
                                         {2, 6, 2, 1, 7, true},
                                         {1, 50, 1, 20, 1030, true},
                                         {7, 12, 3, 8, 65, true},
                                         {4, 129, 5, 57, 65, false},
                                         {1, 197, 1, 138, 384, true}}) {
      agrees<T, float>(sizes, true, true, executor);
      agrees<T, double>(sizes, false, true, executor);
      agrees<T, float>(sizes, true, false, executor);
      agrees<T, double>(sizes, false, false, executor);
    }
}

TEST(add_reorganize_norm_agrees) {
  agrees_on_all_sizes<float>();
  agrees_on_all_sizes<double>();
  agrees_on_all_sizes<Half>();
  agrees_on_all_sizes<BFloat16>();
}

// How the work is shared out must not tell on a bit of the result.
TEST(add_reorganize_norm_is_the_same_with_any_threads) {
  const ReorganizeSizes sizes = {1, 60, 1, 31, 200, true};
  const auto x = random_values<float>(60 * 200, 1), branch = random_values<float>(60 * 200, 2);
  const auto scores = random_values<float>(59, 3);
  std::vector<Buffer<float>> seen;
  for (const int64_t threads : {1, 2, 3, 5, 64}) {
    Executor executor = thread_executor();
    executor.threads = threads;
    Buffer<float> tokens(33 * 200), normed(33 * 200);
    Buffer<int64_t> kept(31);
    cpu::add_reorganize_norm<float, float>(
        sizes, {x.data.get(), 60 * 200, 200}, {branch.data.get(), 60 * 200, 200}, {scores.data.get(), 59, 1},
        {nullptr, nullptr, kEps}, tokens.data.get(), normed.data.get(), kept.data.get(), executor);
    seen.push_back(std::move(tokens));
    seen.push_back(std::move(normed));
  }
  for (size_t i = 2; i < seen.size(); ++i)
    CHECK(std::memcmp(seen[i].data.get(), seen[i % 2].data.get(), 33 * 200 * sizeof(float)) == 0);
}

}  // namespace
}  // namespace evit::tests
