// The CUDA kernels of mean_attention against those of the CPU, and attention_with_scores with the mean over
// queries against both.
#include <algorithm>

#include "../evit/attention_with_scores.h"
#include "../evit/mean_attention.h"
#include "device.h"

namespace evit::tests {
namespace {

// As in a packed projection [B, max(M, N), 3, H, D]: queries are some of its first slice, keys its second;
// `padding` elements lie between tokens.
template <typename T>
MeanAttentionInput<T> packed(const MeanAttentionSizes& sizes, int64_t padding, const T* qkv) {
  const int64_t row = 3 * sizes.heads * sizes.channels + padding;
  const int64_t batch = std::max(sizes.tokens, sizes.queries) * row;
  return {qkv, batch, sizes.channels, row, qkv + sizes.heads * sizes.channels, batch, sizes.channels, row};
}

template <typename T>
int64_t packed_size(const MeanAttentionSizes& sizes, int64_t padding) {
  const int64_t width = sizes.heads * sizes.channels, row = 3 * width + padding;
  return sizes.batch == 0 ? 0 : sizes.batch * std::max(sizes.tokens, sizes.queries) * row - padding - width;
}

// Scores and the gradients of q and k.
template <typename T>
using Results = std::tuple<Buffer<accumulate_t<T>>, Buffer<T>, Buffer<T>>;

// grads [B, N] are the gradients of the scores. Those of q and k lie `offset` elements after where they would
// be aligned.
template <typename T>
Results<T> on_device(const MeanAttentionSizes& sizes, const MeanAttentionInput<T>& input,
                     const Tokens<accumulate_t<T>>& grads, int64_t offset = 0) {
  using A = accumulate_t<T>;
  const int64_t heads = sizes.batch * sizes.heads * sizes.channels;
  const DeviceBuffer<A> scores(sizes.batch * sizes.tokens);
  const DeviceBuffer<T> grad_q(heads * sizes.queries, offset), grad_k(heads * sizes.tokens, offset);
  const DeviceBuffer<char> workspace(cuda::mean_attention_workspace<T>(sizes)),
      backward_workspace(cuda::mean_attention_backward_workspace<T>(sizes));
  cuda::mean_attention<T>(sizes, input, scores.data(), workspace.data(), test_stream());
  cuda::mean_attention_backward<T>(sizes, input, grads, grad_q.data(), grad_k.data(),
                                   backward_workspace.data(), test_stream());
  return {scores.read(), grad_q.read(), grad_k.read()};
}

// The gradients of scores, the batch innermost: of a size that makes those of q and k numbers that every type
// has, times `size`.
template <typename A>
Buffer<A> make_grads(const MeanAttentionSizes& sizes, double size = 1) {
  auto grads = random_values<A>(sizes.batch * sizes.tokens, 62);
  for (int64_t i = 0; i < grads.size; ++i)
    grads[i] *= static_cast<A>(size * static_cast<double>(sizes.heads * sizes.queries));
  return grads;
}

template <typename T>
void check_on_device(const MeanAttentionSizes& sizes, int64_t padding, const Buffer<T>& qkv,
                     const Buffer<accumulate_t<T>>& grads, double terms = 0) {
  using A = accumulate_t<T>;
  const DeviceBuffer<T> device_qkv(qkv);
  const DeviceBuffer<A> device_grads(grads);
  const auto [scores, grad_q, grad_k] = same_every_time([&] {
    return on_device<T>(sizes, packed<T>(sizes, padding, device_qkv.data()),
                        {device_grads.data(), 1, sizes.batch});
  });
  const MeanAttentionInput<T> input = packed<T>(sizes, padding, qkv.data.get());
  Buffer<A> expected(scores.size);
  Buffer<T> dq(grad_q.size), dk(grad_k.size);
  cpu::mean_attention<T>(sizes, input, expected.data.get(), serial_executor());
  cpu::mean_attention_backward<T>(sizes, input, {grads.data.get(), 1, sizes.batch}, dq.data.get(),
                                  dk.data.get(), serial_executor());
  check_close(scores, expected, tolerance<A>() * 2);
  check_close(grad_q, dq, tolerance<T>() * 2, terms);
  check_close(grad_k, dk, tolerance<T>() * 2, terms);
}

template <typename T>
void agrees(const MeanAttentionSizes& sizes, int64_t padding, double size_of_grads = 1) {
  check_on_device<T>(sizes, padding, random_values<T>(packed_size<T>(sizes, padding), 61),
                     make_grads<accumulate_t<T>>(sizes, size_of_grads));
}

// Odd numbers of channels, and the ends of vectors, chunks and tiles.
template <typename T>
void agrees_on_all_sizes() {
  for (const int64_t padding : {int64_t{0}, int64_t{1}})
    for (const MeanAttentionSizes& sizes : {MeanAttentionSizes{0, 2, 5, 5, 4, 1.0},
                                            {1, 1, 1, 1, 1, 1.0},
                                            {2, 3, 17, 17, 5, -0.37},
                                            {2, 2, 3, 50, 33, 0.2},
                                            {1, 2, 50, 3, 16, 0.2},
                                            {1, 1, 31, 33, 32, 0.2},
                                            {2, 1, 32, 64, 63, 0.1},
                                            {1, 2, 65, 65, 64, 0.125},
                                            {1, 1, 40, 33, 65, 0.1},
                                            {1, 1, 33, 40, 128, 0.1},
                                            {1, 2, 33, 34, 136, 0.1}})
      agrees<T>(sizes, padding);
}

TEST(cuda_mean_attention_agrees) {
  agrees_on_all_sizes<float>();
  agrees_on_all_sizes<double>();
  agrees_on_all_sizes<Half>();
  agrees_on_all_sizes<BFloat16>();
}

// More rows than a block has, and more chunks of channels than stay in shared memory.
TEST(cuda_mean_attention_agrees_on_long_sequences_and_wide_heads) {
  agrees<BFloat16>({1, 2, 197, 197, 64, 0.125}, 0);
  agrees<Half>({1, 1, 290, 290, 16, 0.25}, 8);
  agrees<float>({1, 1, 140, 270, 20, 0.2}, 0);
  agrees<Half>({1, 1, 35, 40, 260, 0.06}, 0);
  agrees<BFloat16>({1, 1, 35, 40, 200, 0.07}, 4);
  agrees<double>({1, 1, 35, 40, 50, 0.1}, 2);
}

// Gradients as a scaled loss makes them, and as one without a scale.
TEST(cuda_mean_attention_has_gradients_of_any_size) {
  const MeanAttentionSizes sizes = {1, 1, 70, 70, 32, 0.2};
  agrees<BFloat16>(sizes, 0, 1e-20);
  agrees<BFloat16>(sizes, 0, 1e20);
  agrees<float>(sizes, 0, 1e-20);
  agrees<Half>(sizes, 0, 100);
  // One that is ten thousand times as large as the others; and none.
  auto qkv = random_values<Half>(packed_size<Half>(sizes, 0), 63);
  auto grads = make_grads<float>(sizes, 1);
  grads[11] *= 1e4f;
  check_on_device(sizes, 0, qkv, grads);
  std::fill_n(grads.data.get(), grads.size, 0.0f);
  check_on_device(sizes, 0, qkv, grads);
}

// Small integers but for the first channel, which makes all logits of a head so large, or with odd heads so
// small, that float does not hold their exponentials.
template <typename T>
void agrees_on_extreme_logits(const MeanAttentionSizes& sizes, int64_t padding) {
  const int64_t row = 3 * sizes.heads * sizes.channels + padding;
  auto qkv = random_values<T>(packed_size<T>(sizes, padding), 64);
  for (int64_t i = 0; i < qkv.size; ++i) {
    const int64_t c = i % row, h = c / sizes.channels % sizes.heads, which = c / sizes.channels / sizes.heads;
    if (c % sizes.channels != 0)
      qkv[i] = from_double<T>(std::round(to_double(qkv[i])));
    else
      qkv[i] = from_double<T>(which == 1 && h % 2 != 0 ? -11 : 11);
  }
  // The gradients of a query's logits sum up to nothing: what the first channels have is the rounding of
  // terms of about three times 11.
  check_on_device<T>(sizes, padding, qkv, make_grads<accumulate_t<T>>(sizes), 33);
}

TEST(cuda_mean_attention_agrees_on_extreme_logits) {
  agrees_on_extreme_logits<float>({2, 2, 40, 40, 8, 1.0}, 0);
  agrees_on_extreme_logits<BFloat16>({1, 2, 70, 70, 16, 1.0}, 1);
  agrees_on_extreme_logits<Half>({1, 2, 33, 70, 16, 1.0}, 0);
}

template <typename T>
void lies_anywhere() {
  using A = accumulate_t<T>;
  const MeanAttentionSizes sizes = {2, 3, 19, 21, 16, 0.2};
  const auto q = random_values<T>(2 * 3 * 19 * 16, 1), k = random_values<T>(2 * 3 * 21 * 16, 2);
  const DeviceBuffer<A> grads(make_grads<A>(sizes));
  same_wherever_tensors_lie(3, [&](const std::vector<Place>& at) {
    const Placed<T> queries(q, 19, 16, at[0]), keys(k, 21, 16, at[1]);
    const MeanAttentionInput<T> input = {
        queries.view.data, 3 * queries.view.stride_b, queries.view.stride_b, queries.view.stride_n,
        keys.view.data,    3 * keys.view.stride_b,    keys.view.stride_b,    keys.view.stride_n};
    return on_device<T>(sizes, input, {grads.data(), 21, 1}, at[2].offset);
  });
}

TEST(cuda_mean_attention_tensors_may_lie_anywhere) {
  lies_anywhere<float>();
  lies_anywhere<double>();
  lies_anywhere<Half>();
  lies_anywhere<BFloat16>();
}

// A logit that is not finite: of one key, in every tile, and of all of a head's.
TEST(cuda_mean_attention_gives_nan_where_the_cpu_does) {
  const MeanAttentionSizes sizes = {2, 2, 40, 40, 8, 1.0};
  for (const double value : {double{NAN}, double{INFINITY}, -double{INFINITY}})
    for (const auto& [first, last] : {std::pair(0, 1), {7, 8}, {33, 34}, {0, 39}, {0, 40}}) {
      auto qkv = random_values<float>(packed_size<float>(sizes, 0), 3);
      for (int64_t n = 0; n < 40; ++n) {
        qkv[n * 48] = 1;  // of the first head
        if (n >= first && n < last) qkv[n * 48 + 16] = static_cast<float>(value);
      }
      const DeviceBuffer<float> device_qkv(qkv), out(80);
      const DeviceBuffer<char> workspace(cuda::mean_attention_workspace<float>(sizes));
      cuda::mean_attention<float>(sizes, packed<float>(sizes, 0, device_qkv.data()), out.data(),
                                  workspace.data(), test_stream());
      Buffer<float> expected(80);
      cpu::mean_attention<float>(sizes, packed<float>(sizes, 0, qkv.data.get()), expected.data.get(),
                                 serial_executor());
      CHECK(std::isnan(expected[0]) == (!(value < 0) || last - first == 40) && !std::isnan(expected[40]));
      check_close(out.read(), expected, tolerance<float>() * 2);
    }
}

// attention_with_scores computes the mean over queries from its own sums of exponentials.
template <typename T>
void is_also_attentions(int64_t batch, int64_t tokens, int64_t heads, int64_t channels, double scale,
                        bool biased) {
  AttentionWithScoresSizes sizes = {batch, tokens, heads, channels, scale};
  const int64_t width = heads * channels, row = 3 * width + 8;
  const auto qkv = random_values<T>(batch * tokens * row, 65);
  auto bias = random_values<float>(biased ? batch * tokens : 0, 66);
  for (int64_t i = 0; i < bias.size; i += 5)
    if (tokens > 1) bias[i] = -INFINITY;
  const DeviceBuffer<T> device_qkv(qkv);
  const DeviceBuffer<float> device_bias(bias);
  const Tokens<T> view = {device_qkv.data(), tokens * row, row};
  const auto run = [&](bool mean) {
    return same_every_time([&] {
      sizes.mean = mean;
      CHECK(cuda::attention_with_scores_available<T>(sizes, view));
      const DeviceBuffer<T> out(batch * tokens * width);
      const DeviceBuffer<float> scores(batch * tokens);
      const DeviceBuffer<char> workspace(cuda::attention_with_scores_workspace(sizes));
      cuda::attention_with_scores<T>(sizes, view, {device_bias.data(), tokens, 1}, out.data(), scores.data(),
                                     workspace.data(), test_stream());
      return std::tuple(out.read(), scores.read());
    });
  };
  const auto [out, scores] = run(true);
  CHECK(same_bits(out, std::get<0>(run(false))));
  Buffer<T> others(out.size);
  Buffer<float> expected(scores.size);
  sizes.mean = true;
  cpu::attention_with_scores<T>(sizes, {qkv.data.get(), tokens * row, row},
                                {bias.size > 0 ? bias.data.get() : nullptr, tokens, 1}, others.data.get(),
                                expected.data.get(), serial_executor());
  // On the CPU, bfloat16 may have rounded its probabilities.
  check_close(scores, expected, std::is_same_v<T, BFloat16> ? tolerance<T>() : 2 * tolerance<float>());
}

TEST(cuda_attention_with_scores_gives_the_mean_of_all_queries) {
  for (const bool biased : {false, true}) {
    is_also_attentions<Half>(0, 5, 2, 64, 1.0, biased);
    is_also_attentions<Half>(2, 0, 2, 64, 1.0, biased);
    for (const int64_t tokens : {1, 15, 33, 64, 97}) {
      is_also_attentions<Half>(2, tokens, 2, 32, 0.2, biased);
      is_also_attentions<BFloat16>(1, tokens, 3, 64, -0.1, biased);
      is_also_attentions<Half>(1, tokens, 1, 128, 0.1, biased);
    }
    is_also_attentions<Half>(1, 197, 2, 64, 0.125, biased);
  }
}

}  // namespace
}  // namespace evit::tests
