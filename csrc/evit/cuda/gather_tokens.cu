#include "../gather_tokens.h"

#include "write_rows.cuh"

namespace evit::cuda {
namespace {

constexpr char kOperator[] = "gather_tokens";

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWriteThreads, sizeof(T) == 8 ? 2 : 4)
    gather_kernel(GatherSizes sizes, Tokens<T> x, TokenIndex index, T* out, int chunks) {
  const int64_t b = blockIdx.x / chunks;
  const int first = static_cast<int>(blockIdx.x % chunks) * kBlockRows;
  const auto describe = [&](int i) -> Row<T> {
    const int64_t token = index.at(b, i);
    EVIT_DEVICE_ASSERT(token >= 0 && token < sizes.tokens && "gather_tokens: index out of range");
    return {Row<T>::copy, x.row(b, token), 0};
  };
  write_rows<kAligned, false>(first, static_cast<int>(sizes.indices), sizes.channels,
                              out + b * sizes.indices * sizes.channels, static_cast<const T*>(nullptr),
                              describe, [](int, accumulate_t<T>) {});
}

}  // namespace

template <typename T>
void gather_tokens(const GatherSizes& sizes, const Tokens<T>& x, const TokenIndex& index, T* out,
                   const Stream& stream) {
  const DeviceGuard guard(stream.device, kOperator);
  check_count(sizes.indices, "indices", kOperator);
  const bool is_aligned = aligned(x.data, x.stride_b, x.stride_n, sizes.channels) && aligned(out);
  const int chunks = row_blocks(sizes.indices);
  launch(kOperator, is_aligned ? gather_kernel<T, true> : gather_kernel<T, false>, sizes.batch * chunks,
         kWriteThreads, 0, stream, sizes, x, index, out, chunks);
}

#define EVIT_INSTANTIATE(T) \
  template void gather_tokens<T>(const GatherSizes&, const Tokens<T>&, const TokenIndex&, T*, const Stream&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cuda
