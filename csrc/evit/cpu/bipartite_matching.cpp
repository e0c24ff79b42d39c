#include "../bipartite_matching.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "select.h"
#include "simd/row_kernels.h"

namespace evit::cpu {

template <typename T>
void bipartite_matching(const MatchingSizes& sizes, const Keys<T>& keys, int64_t* kept, int64_t* owner,
                        const Executor& executor) {
  using A = accumulate_t<T>;
  using Key = decltype(order_key(A{}));
  const auto& kernels = row_kernels<T>();
  const auto& wide_kernels = row_kernels<A>();
  const int64_t tokens = sizes.tokens, channels = sizes.channels, row = padded(channels);
  const int64_t in_a = sizes.in_a(), in_b = sizes.in_b();

  // The mean key of each token, of length 1.
  const std::unique_ptr<A[]> means(new A[buffer_size(sizes.batch, tokens, row)]);
  executor.for_range(sizes.batch * tokens, sizes.heads * channels, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> weights(new A[sizes.heads]);
    std::fill_n(weights.get(), sizes.heads, A{1} / static_cast<A>(sizes.heads));
    for (int64_t i = begin; i < end; ++i) {
      A* mean = &means[i * row];
      std::fill_n(mean, row, A{0});
      kernels.add_rows(weights.get(), keys.row(i / tokens, 0, i % tokens), keys.stride_h, nullptr,
                       sizes.heads, channels, mean);
      A square;
      wide_kernels.dot_rows(mean, mean, 0, nullptr, 1, channels, &square);
      const A factor = A{1} / (std::sqrt(square) < A{1e-12} ? A{1e-12} : std::sqrt(square));  // NaN stays
      wide_kernels.outer_rows(&factor, mean, mean, 0, nullptr, 1, channels);
    }
  });

  // Of each token of A its partner, and its cosine with that as a key of the order.
  const std::unique_ptr<int64_t[]> partners(new int64_t[buffer_size(sizes.batch, in_a)]);
  const std::unique_ptr<Key[]> cosines(new Key[buffer_size(sizes.batch, in_a)]);
  executor.for_range(sizes.batch * in_a, in_b * channels, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> of_b(new A[in_b]);
    for (int64_t i = begin; i < end; ++i) {
      const A* first = &means[i / in_a * tokens * row];
      wide_kernels.dot_rows(first + i % in_a * 2 * row, first + row, 2 * row, nullptr, in_b, channels,
                            of_b.get());
      partners[i] = 0;
      cosines[i] = order_key(of_b[0]);
      for (int64_t j = 1; j < in_b; ++j)
        if (const Key key = order_key(of_b[j]); key > cosines[i]) {
          partners[i] = j;
          cosines[i] = key;
        }
    }
  });

  executor.for_range(sizes.batch, 8 * tokens, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Key* cosine = &cosines[b * in_a];
      const int64_t* partner = &partners[b * in_a];
      int64_t* place = owner + b * tokens;
      auto [threshold, ties] = select_threshold(cosine, in_a, sizes.merged());
      int64_t stays = 0;
      for (int64_t n = 0; n < tokens; ++n) {
        const bool tie = n % 2 == 0 && cosine[n / 2] == threshold && ties > 0;
        if (tie) --ties;
        if (tie || (n % 2 == 0 && cosine[n / 2] > threshold)) {
          place[n] = -1;
        } else {
          kept[b * sizes.out + stays] = n;
          place[n] = stays++;
        }
      }
      for (int64_t i = 0; i < in_a; ++i)
        if (place[2 * i] < 0) place[2 * i] = place[2 * partner[i] + 1];
    }
  });
}

#define EVIT_INSTANTIATE(T)                                                                     \
  template void bipartite_matching<T>(const MatchingSizes&, const Keys<T>&, int64_t*, int64_t*, \
                                      const Executor&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cpu
