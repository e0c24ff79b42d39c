#include "../scatter_tokens.h"

#include "write_rows.cuh"

namespace evit::cuda {
namespace {

constexpr char kOperator[] = "scatter_tokens";

// A block reads the whole index of its sequence and notes what concerns its rows: for each, how many rows of
// x go there and the first of them. Rows that get several are written by a second loop, in which a warp looks
// through the index for them in ascending order.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWriteThreads, sizeof(T) == 8 ? 2 : 4 + kAligned)
    scatter_kernel(GatherSizes sizes, Tokens<T> x, TokenIndex index, T* out, int chunks) {
  using A = accumulate_t<T>;
  constexpr int W = kWidth<T>;
  const int64_t b = blockIdx.x / chunks, channels = sizes.channels;
  const int first = static_cast<int>(blockIdx.x % chunks) * kBlockRows;
  const int num_tokens = static_cast<int>(sizes.tokens), indices = static_cast<int>(sizes.indices);
  const int thread = static_cast<int>(threadIdx.x);
  T* rows = out + b * sizes.tokens * channels;

  SharedParts parts;
  int* count = parts.take<int>(kBlockRows);
  int* from = parts.take<int>(kBlockRows);
  for (int i = thread; i < kBlockRows; i += kWriteThreads) {
    count[i] = 0;
    from[i] = indices;
  }
  __syncthreads();
  for (int i = thread; i < indices; i += kWriteThreads) {
    const int64_t token = index.at(b, i);
    EVIT_DEVICE_ASSERT(token >= 0 && token < sizes.tokens && "scatter_tokens: index out of range");
    if (token < first || token >= first + kBlockRows) continue;
    const int row = static_cast<int>(token) - first;
    atomicAdd(&count[row], 1);
    atomicMin(&from[row], i);
  }
  __syncthreads();
  const auto describe = [&](int n) -> Row<T> {
    const int copies = count[n - first];
    if (copies == 0) return {Row<T>::zeros, nullptr, 0};
    if (copies > 1) return {Row<T>::skip, nullptr, 0};
    return {Row<T>::copy, x.row(b, from[n - first]), 0};
  };
  write_rows<kAligned, false>(first, num_tokens, channels, rows, static_cast<const T*>(nullptr), describe,
                              [](int, A) {});

  const int lane = thread % kWarp;
  for (int row = thread / kWarp; row < kBlockRows; row += kWriteThreads / kWarp) {
    if (count[row] < 2) continue;  // the same for the whole warp
    const int n = first + row;
    for (int64_t c = lane * W; c - lane * W < channels; c += kWarp * W) {
      A sum[W] = {};
      int left = count[row];
      for (int start = from[row]; left > 0; start += kWarp) {
        const bool hit = start + lane < indices && index.at(b, start + lane) == n;
        unsigned hits = __ballot_sync(kFullWarp, hit);
        left -= __popc(hits);
        for (; hits != 0; hits &= hits - 1) {
          if (c >= channels) continue;
          const Vector<T> value =
              load<kAligned>(x.row(b, start + __ffs(static_cast<int>(hits)) - 1) + c, channels - c);
          A element[W];
          widen_vector(value, element);
#pragma unroll
          for (int w = 0; w < W; ++w) sum[w] += element[w];
        }
      }
      if (c >= channels) continue;
      store<kAligned>(rows + n * channels + c, narrow_vector<T>(sum), channels - c);
    }
  }
}

}  // namespace

template <typename T>
void scatter_tokens(const GatherSizes& sizes, const Tokens<T>& x, const TokenIndex& index, T* out,
                    const Stream& stream) {
  const DeviceGuard guard(stream.device, kOperator);
  check_count(sizes.tokens, "tokens", kOperator);
  check_count(sizes.indices, "indices", kOperator);
  const bool is_aligned = aligned(x.data, x.stride_b, x.stride_n, sizes.channels) && aligned(out);
  const int chunks = row_blocks(sizes.tokens);
  launch(kOperator, is_aligned ? scatter_kernel<T, true> : scatter_kernel<T, false>, sizes.batch * chunks,
         kWriteThreads, 2 * SharedParts::bytes<int>(kBlockRows), stream, sizes, x, index, out, chunks);
}

#define EVIT_INSTANTIATE(T) \
  template void scatter_tokens<T>(const GatherSizes&, const Tokens<T>&, const TokenIndex&, T*, const Stream&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cuda
