#include "../scatter_tokens.h"

#include <cstring>
#include <memory>

#include "simd/row_kernels.h"

namespace evit::cpu {

template <typename T>
void scatter_tokens(const GatherSizes& sizes, const Tokens<T>& x, const TokenIndex& index, T* out,
                    const Executor& executor) {
  using A = accumulate_t<T>;
  const auto& kernels = row_kernels<T>();
  const int64_t tokens = sizes.tokens, channels = sizes.channels;
  if (channels == 0) return;
  executor.for_range(sizes.batch, (tokens + sizes.indices) * channels, [&](int64_t begin, int64_t end) {
    // Linked lists of the rows that go to each place, in ascending order, so that every output row is written
    // once despite repetitions: first[n], then next[i], -1 at the end.
    const std::unique_ptr<int64_t[]> lists(new int64_t[tokens + sizes.indices]);
    const std::unique_ptr<A[]> sum(new A[padded(channels)]);
    int64_t* first = lists.get();
    int64_t* next = first + tokens;
    const A one = 1;
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t n = 0; n < tokens; ++n) first[n] = -1;
      for (int64_t i = sizes.indices - 1; i >= 0; --i) {
        int64_t& head = first[index.at(b, i)];
        next[i] = head;
        head = i;
      }
      for (int64_t n = 0; n < tokens; ++n) {
        T* row = out + (b * tokens + n) * channels;
        if (first[n] < 0) {
          std::memset(static_cast<void*>(row), 0, channels * sizeof(T));
        } else if (next[first[n]] < 0) {
          std::memcpy(row, x.row(b, first[n]), channels * sizeof(T));
        } else {
          for (int64_t c = 0; c < padded(channels); ++c) sum[c] = 0;
          for (int64_t i = first[n]; i >= 0; i = next[i])
            kernels.add_rows(&one, x.row(b, i), 0, nullptr, 1, channels, sum.get());
          kernels.store_row(sum.get(), channels, row);
        }
      }
    }
  });
}

#define EVIT_INSTANTIATE(T)                                                                    \
  template void scatter_tokens<T>(const GatherSizes&, const Tokens<T>&, const TokenIndex&, T*, \
                                  const Executor&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cpu
