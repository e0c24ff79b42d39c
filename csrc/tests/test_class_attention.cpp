// class_attention and its gradient against plain loops in double.
#include "../evit/class_attention.h"

#include <algorithm>

#include "check.h"
#include "data.h"

namespace evit::tests {
namespace {

// The largest error, relative to the largest expected value: scores and gradients are small numbers.
struct Error {
  double largest = 0, scale = 0;
  void add(double actual, double expected) {
    largest = std::max(largest, std::abs(actual - expected));
    scale = std::max(scale, std::abs(expected));
  }
  double relative() const { return scale > 0 ? largest / scale : largest; }
};

template <typename T>
void agrees(const ClassAttentionSizes& sizes, const Executor& executor) {
  using A = accumulate_t<T>;
  const auto [batch, heads, tokens, channels, scale] = sizes;
  // As in a packed qkv projection [B, N, 3, H, D]: q is its first row, k its second slice.
  const int64_t row = 3 * heads * channels;
  const auto qkv = random_values<T>(batch * tokens * row, 11);
  const ClassAttentionInput<T> input = {qkv.data.get(), tokens * row, channels, &qkv[heads * channels],
                                        tokens * row,   channels,     row};
  Buffer<A> scores(batch * tokens);
  cpu::class_attention<T>(sizes, input, scores.data.get(), executor);
  const auto grad = random_values<A>(batch * tokens * 2, 12);  // every second element
  Buffer<T> grad_q(batch * heads * channels), grad_k(batch * heads * tokens * channels);
  cpu::class_attention_backward<T>(sizes, input, grad.data.get(), tokens * 2, 2, grad_q.data.get(),
                                   grad_k.data.get(), executor);

  Error scores_error, grad_q_error, grad_k_error;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> mean(tokens, 0);
    for (int64_t h = 0; h < heads; ++h) {
      const T* q = input.query(b, h);
      const auto k = [&](int64_t n) { return input.keys(b, h) + n * input.k_stride_n; };
      std::vector<double> p(tokens);
      double largest = -INFINITY, sum = 0, dot = 0;
      for (int64_t n = 0; n < tokens; ++n) {
        for (int64_t c = 0; c < channels; ++c) p[n] += to_double(q[c]) * to_double(k(n)[c]) * scale;
        largest = std::max(largest, p[n]);
      }
      for (auto& value : p) sum += value = std::exp(value - largest);
      for (int64_t n = 0; n < tokens; ++n) {
        p[n] /= sum;
        mean[n] += p[n] / heads;
        dot += p[n] * grad[(b * tokens + n) * 2];
      }
      std::vector<double> dq(channels, 0);
      for (int64_t n = 0; n < tokens; ++n) {
        const double dz = scale / heads * p[n] * (grad[(b * tokens + n) * 2] - dot);
        for (int64_t c = 0; c < channels; ++c) {
          dq[c] += dz * to_double(k(n)[c]);
          grad_k_error.add(to_double(grad_k[((b * heads + h) * tokens + n) * channels + c]),
                           dz * to_double(q[c]));
        }
      }
      for (int64_t c = 0; c < channels; ++c)
        grad_q_error.add(to_double(grad_q[(b * heads + h) * channels + c]), dq[c]);
    }
    for (int64_t n = 0; n < tokens; ++n) scores_error.add(scores[b * tokens + n], mean[n]);
  }
  CHECK(scores_error.relative() <= tolerance<A>());
  CHECK(grad_q_error.relative() <= tolerance<T>() * 2);
  CHECK(grad_k_error.relative() <= tolerance<T>() * 2);
}

template <typename T>
void agrees_on_all_sizes() {
  for (const Executor& executor : {serial_executor(), thread_executor()})
    for (const ClassAttentionSizes& sizes : {ClassAttentionSizes{0, 2, 5, 4, 1.0},
                                             {1, 1, 1, 1, 1.0},
                                             {2, 3, 17, 5, 0.37},
                                             {1, 6, 197, 64, 0.125},
                                             {5, 2, 129, 33, 0.2}})
      agrees<T>(sizes, executor);
}

TEST(class_attention_agrees) {
  agrees_on_all_sizes<float>();
  agrees_on_all_sizes<double>();
  agrees_on_all_sizes<Half>();
  agrees_on_all_sizes<BFloat16>();
}

}  // namespace
}  // namespace evit::tests
