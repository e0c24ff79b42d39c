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

  // logsumexp lies as [H, B], every third element of it.
  auto given = input;
  Buffer<A> logsumexp(batch * heads * 3), given_scores(batch * tokens);
  given.logsumexp = logsumexp.data.get();
  given.logsumexp_stride_b = 3;
  given.logsumexp_stride_h = 3 * batch;
  for (int64_t i = 0; i < logsumexp.size; ++i) logsumexp[i] = NAN;

  Error scores_error, given_error, grad_q_error, grad_k_error;
  std::vector<double> mean(batch * tokens, 0);
  for (int64_t b = 0; b < batch; ++b) {
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
      logsumexp[3 * (h * batch + b)] = static_cast<A>(largest + std::log(sum));
      for (int64_t n = 0; n < tokens; ++n) {
        p[n] /= sum;
        mean[b * tokens + n] += p[n] / heads;
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
  }
  cpu::class_attention<T>(sizes, given, given_scores.data.get(), executor);
  for (int64_t i = 0; i < batch * tokens; ++i) {
    scores_error.add(scores[i], mean[i]);
    given_error.add(given_scores[i], mean[i]);
  }
  CHECK(scores_error.relative() <= tolerance<A>());
  CHECK(given_error.relative() <= tolerance<A>());
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

template <typename T>
void trusts_logsumexp() {
  // One token of logit 0.5: its probability is exp(0.5 - logsumexp), whatever that is.
  const T q = from_double<T>(0.5), k = from_double<T>(1);
  for (const double value : {0.5, 1.25, -1.0, double{INFINITY}, double{NAN}}) {
    const accumulate_t<T> logsumexp = static_cast<accumulate_t<T>>(value);
    accumulate_t<T> score = -1;
    cpu::class_attention<T>({1, 1, 1, 1, 1.0}, {&q, 1, 1, &k, 1, 1, 1, &logsumexp, 1, 1}, &score,
                            serial_executor());
    CHECK_NEAR(score, std::exp(0.5 - value), tolerance<accumulate_t<T>>());
  }
}

TEST(logsumexp_is_trusted) {
  trusts_logsumexp<float>();
  trusts_logsumexp<double>();
  trusts_logsumexp<Half>();
  trusts_logsumexp<BFloat16>();
}

}  // namespace
}  // namespace evit::tests
