#include "../gather_tokens.h"

#include <cstring>

namespace evit::cpu {

int64_t first_out_of_range(const GatherSizes& sizes, const TokenIndex& index) {
  for (int64_t b = 0; b < sizes.batch; ++b)
    for (int64_t i = 0; i < sizes.indices; ++i) {
      const int64_t n = index.at(b, i);
      if (n < 0 || n >= sizes.tokens) return b * sizes.indices + i;
    }
  return -1;
}

template <typename T>
void gather_tokens(const GatherSizes& sizes, const Tokens<T>& x, const TokenIndex& index, T* out,
                   const Executor& executor) {
  const int64_t channels = sizes.channels;
  if (channels == 0) return;  // a tensor without elements may have no memory to copy from
  executor.for_range(sizes.batch * sizes.indices, channels, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / sizes.indices, i = row % sizes.indices;
      std::memcpy(out + row * channels, x.row(b, index.at(b, i)), channels * sizeof(T));
    }
  });
}

#define EVIT_INSTANTIATE(T)                                                                   \
  template void gather_tokens<T>(const GatherSizes&, const Tokens<T>&, const TokenIndex&, T*, \
                                 const Executor&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cpu
