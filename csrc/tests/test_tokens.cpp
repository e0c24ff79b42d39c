// gather, scatter, fuse, reorganize and restore, with their gradients, against plain loops in double.
#include <algorithm>
#include <numeric>

#include "../evit/fuse_tokens.h"
#include "../evit/gather_tokens.h"
#include "../evit/reorganize_tokens.h"
#include "../evit/restore_tokens.h"
#include "../evit/scatter_tokens.h"
#include "check.h"
#include "data.h"

namespace evit::tests {
namespace {

struct Shape {
  int64_t batch, tokens, channels, count;
};
constexpr Shape kShapes[] = {{2, 7, 5, 11}, {1, 1, 1, 1}, {3, 9, 16, 4},    {0, 3, 3, 2},
                             {2, 5, 0, 3},  {2, 6, 7, 0}, {4, 129, 65, 57}, {1, 50, 1030, 20}};

template <typename Body>
void for_each_shape(const Body& body) {
  for (const Executor& executor : {serial_executor(), thread_executor()})
    for (const Shape& shape : kShapes) body(shape, executor);
}

Buffer<int64_t> random_index(const Shape& s, uint32_t seed) {
  std::mt19937 generator(seed);
  Buffer<int64_t> index(s.batch * s.count * 2);  // every second element is one
  for (int64_t i = 0; i < index.size; ++i)
    index[i] = i % 2 ? -1000 : static_cast<int64_t>(generator() % s.tokens);
  return index;
}

template <typename T>
void gather_and_scatter(const Shape& s, const Executor& executor) {
  const GatherSizes sizes = {s.batch, s.tokens, s.count, s.channels};
  const int64_t stride = s.channels + 3;
  const auto x = random_values<T>(s.batch * s.tokens * stride, 1);
  const auto index = random_index(s, 2);
  const TokenIndex view = {index.data.get(), s.count * 2, 2};
  CHECK(cpu::first_out_of_range(sizes, view) == -1);
  Buffer<T> gathered(s.batch * s.count * s.channels);
  cpu::gather_tokens<T>(sizes, {x.data.get(), s.tokens * stride, stride}, view, gathered.data.get(),
                        executor);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t i = 0; i < s.count; ++i)
      for (int64_t c = 0; c < s.channels; ++c)
        CHECK(to_double(gathered[(b * s.count + i) * s.channels + c]) ==
              to_double(x[(b * s.tokens + view.at(b, i)) * stride + c]));

  Buffer<T> scattered(s.batch * s.tokens * s.channels);
  cpu::scatter_tokens<T>(sizes, {gathered.data.get(), s.count * s.channels, s.channels}, view,
                         scattered.data.get(), executor);
  std::vector<double> expected(scattered.size, 0);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t i = 0; i < s.count; ++i)
      for (int64_t c = 0; c < s.channels; ++c)
        expected[(b * s.tokens + view.at(b, i)) * s.channels + c] +=
            to_double(gathered[(b * s.count + i) * s.channels + c]);
  for (int64_t i = 0; i < scattered.size; ++i)
    CHECK_NEAR(to_double(scattered[i]), expected[i], tolerance<T>());
}

template <typename T>
void fuse(const Shape& s, const Executor& executor) {
  using A = accumulate_t<T>;
  const GatherSizes sizes = {s.batch, s.tokens, s.count, s.channels};
  const auto x = random_values<T>(s.batch * s.tokens * s.channels, 3);
  const auto weights = random_values<A>(s.batch * s.tokens * 3, 4);
  const auto grad = random_values<T>(s.batch * s.channels, 5);
  const auto index = random_index(s, 6);
  const TokenIndex view = {index.data.get(), s.count * 2, 2};
  const Tokens<T> tokens = {x.data.get(), s.tokens * s.channels, s.channels};
  const Tokens<A> weight_view = {weights.data.get(), s.tokens * 3, 3};
  Buffer<T> out(s.batch * s.channels), grad_x(x.size);
  Buffer<A> grad_weights(s.batch * s.tokens);
  cpu::fuse_tokens<T>(sizes, tokens, weight_view, view, out.data.get(), executor);
  cpu::fuse_tokens_backward<T>(sizes, grad.data.get(), s.channels, tokens, weight_view, view,
                               grad_x.data.get(), grad_weights.data.get(), executor);
  for (int64_t b = 0; b < s.batch; ++b) {
    std::vector<double> sum(s.channels, 0), dw(s.tokens, 0), dx(s.tokens * s.channels, 0);
    for (int64_t i = 0; i < s.count; ++i) {
      const int64_t n = view.at(b, i);
      for (int64_t c = 0; c < s.channels; ++c) {
        const double value = to_double(*(tokens.row(b, n) + c)), g = to_double(grad[b * s.channels + c]);
        sum[c] += *weight_view.row(b, n) * value;
        dw[n] += g * value;
        dx[n * s.channels + c] += g * *weight_view.row(b, n);
      }
    }
    for (int64_t c = 0; c < s.channels; ++c)
      CHECK_NEAR(to_double(out[b * s.channels + c]), sum[c], tolerance<T>() * 4);
    for (int64_t n = 0; n < s.tokens; ++n) {
      CHECK_NEAR(grad_weights[b * s.tokens + n], dw[n], tolerance<A>() * 10);
      for (int64_t c = 0; c < s.channels; ++c)
        CHECK_NEAR(to_double(grad_x[(b * s.tokens + n) * s.channels + c]), dx[n * s.channels + c],
                   tolerance<T>() * 4);
    }
  }
}

template <typename T, typename S>
void reorganize(const Shape& s, int64_t prefix, bool fuse, const Executor& executor) {
  // Without a fused token every patch may be kept.
  // The gradient knows no other type of scores.
  const bool differentiates = fuse && std::is_same_v<S, accumulate_t<T>>;
  constexpr int64_t skip = 2;
  const int64_t patches = s.tokens - prefix, most = fuse ? patches - 1 : patches;
  const int64_t keep = std::min(std::max<int64_t>(s.count, 1), most);
  if (keep < 1) return;
  const ReorganizeSizes sizes = {s.batch, s.tokens, prefix, keep, s.channels, fuse};
  const int64_t stride = s.channels + 1;
  const auto x = random_values<T>(s.batch * s.tokens * stride, 7);
  const auto scores = random_values<S>(s.batch * patches, 8);
  const Tokens<T> tokens = {x.data.get(), s.tokens * stride, stride};
  const Tokens<S> score_view = {scores.data.get(), patches, 1};
  Buffer<T> out(s.batch * sizes.out_tokens() * s.channels);
  Buffer<int64_t> kept(s.batch * keep);
  cpu::reorganize_tokens<T, S>(sizes, tokens, score_view, out.data.get(), kept.data.get(), executor);
  const auto grad = random_values<T>(out.size, 9);
  Buffer<T> grad_x(s.batch * s.tokens * s.channels);
  Buffer<S> grad_scores(s.batch * (skip + patches));
  if constexpr (std::is_same_v<S, accumulate_t<T>>)
    if (fuse)
      cpu::reorganize_tokens_backward<T>(
          sizes, {grad.data.get(), sizes.out_tokens() * s.channels, s.channels}, tokens, score_view,
          kept.data.get(), grad_x.data.get(), grad_scores.data.get(), skip, executor);

  for (int64_t b = 0; b < s.batch; ++b) {
    std::vector<int64_t> order(patches);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t i, int64_t j) { return *score_view.row(b, i) > *score_view.row(b, j); });
    std::sort(order.begin(), order.begin() + keep);
    const auto actual = [&](int64_t row, int64_t c) {
      return to_double(out[(b * sizes.out_tokens() + row) * s.channels + c]);
    };
    const auto g = [&](int64_t row, int64_t c) {
      return to_double(grad[(b * sizes.out_tokens() + row) * s.channels + c]);
    };
    const auto dx = [&](int64_t n, int64_t c) {
      return to_double(grad_x[(b * s.tokens + n) * s.channels + c]);
    };
    for (int64_t i = 0; i < keep; ++i) CHECK(kept[b * keep + i] == order[i]);
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t n = 0; n < prefix; ++n) {
        CHECK(actual(n, c) == to_double(tokens.row(b, n)[c]));
        if (differentiates) CHECK(dx(n, c) == g(n, c));
      }
      for (int64_t i = 0; i < keep; ++i) {
        CHECK(actual(prefix + i, c) == to_double(tokens.row(b, prefix + order[i])[c]));
        if (differentiates) CHECK(dx(prefix + order[i], c) == g(prefix + i, c));
      }
      if (!fuse) continue;
      double sum = 0;
      for (int64_t i = keep; i < patches; ++i) {
        sum += static_cast<double>(*score_view.row(b, order[i])) *
               to_double(tokens.row(b, prefix + order[i])[c]);
        if (differentiates)
          CHECK_NEAR(dx(prefix + order[i], c), *score_view.row(b, order[i]) * g(prefix + keep, c),
                     tolerance<T>() * 4);
      }
      CHECK_NEAR(actual(prefix + keep, c), sum, tolerance<T>() * 10);
    }
    if (!differentiates) continue;
    const S* of_scores = &grad_scores[b * (skip + patches)];
    for (int64_t i = 0; i < skip; ++i) CHECK(of_scores[i] == 0);
    for (int64_t i = 0; i < patches; ++i) {
      double dot = 0;
      for (int64_t c = 0; c < s.channels && i >= keep; ++c)
        dot += to_double(tokens.row(b, prefix + order[i])[c]) * g(prefix + keep, c);
      CHECK_NEAR(of_scores[skip + order[i]], dot, tolerance<S>() * 20);
    }
  }
}

enum class Fill { zeros, fused, given };

template <typename T>
void restore(const Shape& s, int64_t prefix, bool fused, Fill kind, const Executor& executor) {
  const int64_t patches = s.tokens - prefix, keep = std::min(s.count, patches);
  const bool fill_fused = kind == Fill::fused;
  if (keep < 0 || (fill_fused && (!fused || keep == patches))) return;
  const RestoreSizes sizes = {s.batch, s.tokens, prefix, keep, s.channels, fused};
  const int64_t stride = s.channels + 1, in_tokens = sizes.in_tokens();
  const auto values = random_values<T>(s.batch * in_tokens * stride, 10),
             filling = random_values<T>(s.batch * s.tokens * stride, 11),
             gradient = random_values<T>(s.batch * s.tokens * stride, 12);
  const auto kept = random_kept(s.batch, keep, patches, 13);
  const Tokens<T> tokens = {values.data.get(), in_tokens * stride, stride},
                  given = {filling.data.get(), s.tokens * stride, stride},
                  grad = {gradient.data.get(), s.tokens * stride, stride};
  const Tokens<T> fill = kind == Fill::given ? given
                         : fill_fused        ? Tokens<T>{tokens.row(0, in_tokens - 1), tokens.stride_b, 0}
                                             : Tokens<T>{nullptr, 0, 0};
  Buffer<T> out(s.batch * s.tokens * s.channels), grad_tokens(s.batch * in_tokens * s.channels);
  cpu::restore_tokens<T>(sizes, tokens, kept.data.get(), fill, out.data.get(), executor);
  cpu::restore_tokens_backward<T>(sizes, fill_fused, grad, kept.data.get(), grad_tokens.data.get(), executor);

  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t c = 0; c < s.channels; ++c) {
      const auto actual = [&](int64_t n) { return to_double(out[(b * s.tokens + n) * s.channels + c]); };
      const auto dx = [&](int64_t n) { return to_double(grad_tokens[(b * in_tokens + n) * s.channels + c]); };
      const auto g = [&](int64_t n) { return to_double(grad.row(b, n)[c]); };
      double sum = 0;
      for (int64_t n = 0; n < prefix; ++n) {
        CHECK(actual(n) == to_double(tokens.row(b, n)[c]));
        CHECK(dx(n) == g(n));
      }
      for (int64_t j = 0; j < patches; ++j) {
        const int64_t* begin = &kept[b * keep];
        const int64_t i = std::find(begin, begin + keep, j) - begin, n = prefix + j;
        if (i < keep) {
          CHECK(actual(n) == to_double(tokens.row(b, prefix + i)[c]));
          CHECK(dx(prefix + i) == g(n));
          continue;
        }
        sum += g(n);
        CHECK(actual(n) == (kind == Fill::given   ? to_double(given.row(b, n)[c])
                            : kind == Fill::fused ? to_double(tokens.row(b, prefix + keep)[c])
                                                  : 0));
      }
      if (fused && !fill_fused) CHECK(dx(prefix + keep) == 0);
      if (fill_fused) CHECK_NEAR(dx(prefix + keep), sum, tolerance<T>() * 10);
    }
}

#define FOR_EACH_TYPE(call)                                         \
  for_each_shape([](const Shape& shape, const Executor& executor) { \
    call(float) call(double) call(Half) call(BFloat16)              \
  })

TEST(gather_and_scatter_agree) {
#define CALL(T) gather_and_scatter<T>(shape, executor);
  FOR_EACH_TYPE(CALL);
#undef CALL
}

TEST(fuse_agrees) {
#define CALL(T) fuse<T>(shape, executor);
  FOR_EACH_TYPE(CALL);
#undef CALL
}

TEST(reorganize_agrees) {
#define CALL(T)                                             \
  for (const int64_t prefix : {0, 1, 2})                    \
    for (const bool fuse : {true, false}) {                 \
      reorganize<T, float>(shape, prefix, fuse, executor);  \
      reorganize<T, double>(shape, prefix, fuse, executor); \
    }
  FOR_EACH_TYPE(CALL);
#undef CALL
}

TEST(restore_agrees) {
#define CALL(T)                                                       \
  for (const int64_t prefix : {0, 1, 2})                              \
    for (const bool fused : {true, false})                            \
      for (const Fill fill : {Fill::zeros, Fill::fused, Fill::given}) \
        restore<T>(shape, prefix, fused, fill, executor);
  FOR_EACH_TYPE(CALL);
#undef CALL
}

TEST(an_index_out_of_range_is_found) {
  const int64_t index[] = {0, 1, 2, 3, -1, 0};
  CHECK(cpu::first_out_of_range({2, 4, 3, 1}, {index, 3, 1}) == 4);
  CHECK(cpu::first_out_of_range({1, 3, 4, 1}, {index, 6, 1}) == 3);
  CHECK(cpu::first_out_of_range({1, 4, 4, 1}, {index, 6, 1}) == -1);
}

}  // namespace
}  // namespace evit::tests
