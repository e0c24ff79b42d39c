// bipartite_matching, and merge_tokens with its gradients, against plain loops in double.
#include <algorithm>
#include <numeric>

#include "../evit/bipartite_matching.h"
#include "../evit/merge_tokens.h"
#include "check.h"
#include "data.h"

namespace evit::tests {
namespace {

#define FOR_EACH_TYPE(call) call(float) call(double) call(Half) call(BFloat16)

constexpr MergeSizes kMerges[] = {{2, 8, 1, 4, 5},    {1, 1, 0, 1, 1},     {3, 9, 2, 7, 16},
                                  {0, 3, 1, 2, 2},    {2, 5, 1, 3, 0},     {2, 3, 3, 2, 7},
                                  {2, 6, 0, 20, 130}, {4, 129, 1, 60, 65}, {1, 50, 2, 1, 1030}};

template <typename T>
void merge(const MergeSizes& s, const Executor& executor) {
  using A = accumulate_t<T>;
  const int64_t patches = s.patches(), stride = s.channels + 3, outs = s.out_tokens();
  std::mt19937 generator(1);
  const auto x = random_values<T>(s.batch * s.tokens * stride, 2);
  const auto grad = random_values<T>(s.batch * outs * stride, 3);
  const auto grad_totals = random_values<A>(s.batch * s.owners * 2, 4);
  Buffer<A> weights(s.batch * patches * 3);
  for (int64_t i = 0; i < weights.size; ++i) weights[i] = static_cast<A>(1 + generator() % 5);
  Buffer<int64_t> index(s.batch * patches * 2);  // every second element is an owner
  for (int64_t i = 0; i < index.size; ++i)
    index[i] = i % 2 ? -1000 : static_cast<int64_t>(generator() % s.owners);
  const Tokens<T> tokens = {x.data.get(), s.tokens * stride, stride},
                  grads = {grad.data.get(), outs * stride, stride};
  const Tokens<A> weight = {weights.data.get(), patches * 3, 3},
                  of_totals = {grad_totals.data.get(), s.owners * 2, 2};
  const TokenIndex owner = {index.data.get(), patches * 2, 2};
  Buffer<T> out(s.batch * outs * s.channels), dx(s.batch * s.tokens * s.channels);
  Buffer<A> totals(s.batch * s.owners), dw(s.batch * patches);
  cpu::merge_tokens<T>(s, tokens, owner, weight, out.data.get(), totals.data.get(), executor);
  cpu::merge_tokens_backward<T>(s, grads, of_totals, tokens, owner, weight, dx.data.get(), dw.data.get(),
                                executor);

  const auto at = [&](const Tokens<T>& rows, int64_t b, int64_t n, int64_t c) {
    return to_double(rows.row(b, n)[c]);
  };
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t n = 0; n < s.prefix; ++n)
      for (int64_t c = 0; c < s.channels; ++c) {
        CHECK(to_double(out[(b * outs + n) * s.channels + c]) == at(tokens, b, n, c));
        CHECK(to_double(dx[(b * s.tokens + n) * s.channels + c]) == at(grads, b, n, c));
      }
    for (int64_t m = 0; m < s.owners; ++m) {
      std::vector<int64_t> owned;
      double total = 0;
      for (int64_t i = 0; i < patches; ++i)
        if (owner.at(b, i) == m) {
          owned.push_back(i);
          total += *weight.row(b, i);
        }
      CHECK_NEAR(totals[b * s.owners + m], total, tolerance<A>());
      std::vector<double> mean(s.channels, 0);
      for (const int64_t i : owned)
        for (int64_t c = 0; c < s.channels; ++c)
          mean[c] += *weight.row(b, i) / total * at(tokens, b, s.prefix + i, c);
      for (int64_t c = 0; c < s.channels; ++c) {
        const double actual = to_double(out[(b * outs + s.prefix + m) * s.channels + c]);
        CHECK_NEAR(actual, mean[c], tolerance<T>() * 2);
        if (owned.size() == 1) CHECK(actual == at(tokens, b, s.prefix + owned[0], c));
      }
      for (const int64_t i : owned) {
        double expected = 0;
        for (int64_t c = 0; c < s.channels; ++c) {
          const double g = at(grads, b, s.prefix + m, c);
          expected += g * (at(tokens, b, s.prefix + i, c) - mean[c]) / total;
          CHECK_NEAR(to_double(dx[(b * s.tokens + s.prefix + i) * s.channels + c]),
                     *weight.row(b, i) / total * g, tolerance<T>() * 2);
        }
        CHECK_NEAR(dw[b * patches + i], expected + *of_totals.row(b, m), tolerance<A>() * 20);
      }
    }
  }
}

TEST(merge_agrees) {
  for (const Executor& executor : {serial_executor(), thread_executor()})
    for (const MergeSizes& sizes : kMerges) {
#define CALL(T) merge<T>(sizes, executor);
      FOR_EACH_TYPE(CALL)
#undef CALL
    }
}

// A token that is alone is copied, whatever its weight, and so is its gradient.
TEST(merging_leaves_those_alone_as_they_are) {
  const float x[] = {3, INFINITY, 4}, weights[] = {0, NAN, 0}, grad[] = {5, INFINITY, 6},
              no_grad[] = {7, 8, 9};
  const int64_t owner[] = {2, 0, 1};
  float out[3], totals[3], dx[3], dw[3];
  const MergeSizes sizes = {1, 3, 0, 3, 1};
  cpu::merge_tokens<float>(sizes, {x, 3, 1}, {owner, 3, 1}, {weights, 3, 1}, out, totals, serial_executor());
  cpu::merge_tokens_backward<float>(sizes, {grad, 3, 1}, {no_grad, 3, 1}, {x, 3, 1}, {owner, 3, 1},
                                    {weights, 3, 1}, dx, dw, serial_executor());
  CHECK(out[0] == INFINITY && out[1] == 4 && out[2] == 3);
  CHECK(std::isnan(totals[0]) && totals[1] == 0 && totals[2] == 0);
  CHECK(dx[0] == 6 && dx[1] == 5 && dx[2] == INFINITY);
  CHECK(dw[0] == 9 && dw[1] == 7 && dw[2] == 8);
}

constexpr MatchingSizes kMatchings[] = {{2, 3, 9, 5, 6},   {1, 1, 2, 1, 1},  {3, 2, 7, 16, 4},
                                        {0, 2, 6, 3, 4},   {2, 1, 8, 33, 7}, {1, 6, 130, 64, 65},
                                        {2, 2, 77, 70, 50}};

template <typename T>
void match(const MatchingSizes& s, const Executor& executor) {
  // Whole numbers of which some tokens have the same: ties.
  std::mt19937 generator(5);
  const int64_t stride = s.channels + 2;
  Buffer<T> values(s.batch * s.tokens * s.heads * stride);
  for (int64_t i = 0; i < values.size; ++i)
    values[i] = from_double<T>(static_cast<double>(generator() % 7) - 3);
  for (int64_t i = 0; i < values.size; ++i)
    if (i / stride / s.heads % 5 == 4) values[i] = values[i - 2 * s.heads * stride];
  // [B, N, H, D] as a packed projection has them.
  const Keys<T> keys = {values.data.get(), s.tokens * s.heads * stride, stride, s.heads * stride};
  Buffer<int64_t> kept(s.batch * s.out), owner(s.batch * s.tokens);
  cpu::bipartite_matching<T>(s, keys, kept.data.get(), owner.data.get(), executor);
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t in_a = s.in_a(), in_b = s.in_b();
    std::vector<double> best(in_a, -2);
    std::vector<int64_t> partner(in_a), order(in_a);
    const auto cosine = [&](int64_t i, int64_t j) {
      double dot = 0, of_i = 0, of_j = 0;
      for (int64_t c = 0; c < s.channels; ++c) {
        double mean_i = 0, mean_j = 0;
        for (int64_t h = 0; h < s.heads; ++h) {
          mean_i += to_double(keys.row(b, h, i)[c]);
          mean_j += to_double(keys.row(b, h, j)[c]);
        }
        dot += mean_i * mean_j;
        of_i += mean_i * mean_i;
        of_j += mean_j * mean_j;
      }
      return of_i == 0 || of_j == 0 ? 0 : dot / std::sqrt(of_i * of_j);
    };
    // What differs by rounding alone is a tie here and a choice there: either must be among the best.
    const double close = 4e-6;
    for (int64_t i = 0; i < in_a; ++i)
      for (int64_t j = 0; j < in_b; ++j) best[i] = std::max(best[i], cosine(2 * i, 2 * j + 1));
    std::vector<double> sorted = best;
    std::sort(sorted.rbegin(), sorted.rend());
    const double last = sorted[s.merged() - 1];
    int64_t place = 0;
    for (int64_t n = 0; n < s.tokens; ++n) {
      const bool stays = place < s.out && kept[b * s.out + place] == n;
      if (stays) {
        CHECK(owner[b * s.tokens + n] == place);
        if (n % 2 == 0) CHECK(best[n / 2] <= last + close);
        ++place;
        continue;
      }
      CHECK(n % 2 == 0);
      CHECK(best[n / 2] >= last - close);
      const int64_t other = kept[b * s.out + owner[b * s.tokens + n]];
      CHECK(other % 2 == 1);
      CHECK(cosine(n, other) >= best[n / 2] - close);
    }
    CHECK(place == s.out);
  }
}

TEST(matching_agrees) {
  for (const Executor& executor : {serial_executor(), thread_executor()})
    for (const MatchingSizes& sizes : kMatchings) {
#define CALL(T) match<T>(sizes, executor);
      FOR_EACH_TYPE(CALL)
#undef CALL
    }
}

// Equal keys: each of A goes to the first of B, and the first of A go. A NaN is the largest of all.
TEST(ties_of_a_matching_go_to_the_lower_number) {
  const float same[] = {1, 1, 1, 1, 1, 1, 1}, with_nan[] = {1, 1, -1, 1, NAN, 1, 1};
  int64_t kept[6], owner[7];
  cpu::bipartite_matching<float>({1, 1, 7, 1, 5}, {same, 7, 7, 1}, kept, owner, serial_executor());
  const int64_t expected_kept[] = {1, 3, 4, 5, 6}, expected_owner[] = {0, 0, 0, 1, 2, 3, 4};
  CHECK(std::equal(kept, kept + 5, expected_kept) && std::equal(owner, owner + 7, expected_owner));
  cpu::bipartite_matching<float>({1, 1, 7, 1, 6}, {with_nan, 7, 7, 1}, kept, owner, serial_executor());
  const int64_t nan_kept[] = {0, 1, 2, 3, 5};
  CHECK(std::equal(kept, kept + 5, nan_kept) && owner[4] == 1);
}

}  // namespace
}  // namespace evit::tests
