#include "../fuse_tokens.h"

#include "rows.cuh"
#include "write_rows.cuh"

namespace evit::cuda {
namespace {

constexpr char kForward[] = "fuse_tokens";
constexpr char kBackward[] = "fuse_tokens_backward";

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRowLanes * 16, 1)
    fuse_kernel(GatherSizes sizes, Tokens<T> x, Tokens<accumulate_t<T>> weights, TokenIndex index, T* out,
                Slices slices) {
  using A = accumulate_t<T>;
  constexpr int W = kWidth<T>;
  const int slice = static_cast<int>(blockIdx.x % slices.count), vectors = slices.vectors;
  const int64_t b = blockIdx.x / slices.count;
  const int indices = static_cast<int>(sizes.indices);
  const int64_t column = (static_cast<int64_t>(slice) * vectors + threadIdx.x % vectors) * W;
  SharedParts parts;
  A* scratch = parts.take<A>(static_cast<int>(blockDim.x) / kWarp * Columns<W>(vectors).count());
  A sum[W] = {};
  for (int row = static_cast<int>(threadIdx.x) / vectors; row < indices; row += kUnroll * kRowLanes) {
    Vector<T> value[kUnroll] = {};
    A weight[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = row + u * kRowLanes;
      if (i >= indices) continue;
      const int64_t token = index.at(b, i);
      EVIT_DEVICE_ASSERT(token >= 0 && token < sizes.tokens && "fuse_tokens: index out of range");
      weight[u] = *weights.row(b, token);
      if (column < sizes.channels)
        value[u] = load<kAligned>(x.row(b, token) + column, sizes.channels - column);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (row + u * kRowLanes < indices && column < sizes.channels) {
        A element[W];
        widen_vector(value[u], element);
#pragma unroll
        for (int w = 0; w < W; ++w) sum[w] = multiply_add(weight[u], element[w], sum[w]);
      }
  }
  sum_row_lanes<W>(sum, vectors, scratch, [&](int offset, A total) {
    const int64_t c = static_cast<int64_t>(slice) * vectors * W + offset;
    if (c < sizes.channels) out[b * sizes.channels + c] = narrow<T>(total);
  });
}

// A block counts how often the index names each of its rows: so often the row's gradients count.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWriteThreads, sizeof(T) == 8 ? 2 : 4)
    fuse_backward_kernel(GatherSizes sizes, const T* grad, int64_t grad_stride_b, Tokens<T> x,
                         Tokens<accumulate_t<T>> weights, TokenIndex index, T* grad_x,
                         accumulate_t<T>* grad_weights, int chunks) {
  using A = accumulate_t<T>;
  const int64_t b = blockIdx.x / chunks;
  const int first = static_cast<int>(blockIdx.x % chunks) * kBlockRows;
  const int thread = static_cast<int>(threadIdx.x);
  SharedParts parts;
  int* count = parts.take<int>(kBlockRows);
  for (int i = thread; i < kBlockRows; i += kWriteThreads) count[i] = 0;
  __syncthreads();
  for (int i = thread; i < sizes.indices; i += kWriteThreads) {
    const int64_t token = index.at(b, i);
    EVIT_DEVICE_ASSERT(token >= 0 && token < sizes.tokens && "fuse_tokens: index out of range");
    if (token >= first && token < first + kBlockRows) atomicAdd(&count[token - first], 1);
  }
  __syncthreads();
  const auto describe = [&](int n) -> Row<T> {
    const A times = static_cast<A>(count[n - first]);
    if (times == 0) return {Row<T>::zeros, nullptr, 0};
    return {Row<T>::scaled, x.row(b, n), times * *weights.row(b, n)};
  };
  write_rows<kAligned, true>(
      first, static_cast<int>(sizes.tokens), sizes.channels, grad_x + b * sizes.tokens * sizes.channels,
      grad + b * grad_stride_b, describe,
      [&](int n, A dot) { grad_weights[b * sizes.tokens + n] = static_cast<A>(count[n - first]) * dot; });
}

}  // namespace

template <typename T>
void fuse_tokens(const GatherSizes& sizes, const Tokens<T>& x, const Tokens<accumulate_t<T>>& weights,
                 const TokenIndex& index, T* out, const Stream& stream) {
  if (sizes.channels == 0) return;
  const DeviceGuard guard(stream.device, kForward);
  check_count(sizes.indices, "indices", kForward);
  const bool is_aligned = aligned(x.data, x.stride_b, x.stride_n, sizes.channels);
  const Slices slices = share_out_columns<T>(sizes.batch, sizes.channels, stream);
  launch(kForward, is_aligned ? fuse_kernel<T, true> : fuse_kernel<T, false>, sizes.batch * slices.count,
         slices.threads(), row_sum_bytes<T>(slices), stream, sizes, x, weights, index, out, slices);
}

template <typename T>
void fuse_tokens_backward(const GatherSizes& sizes, const T* grad, int64_t grad_stride_b, const Tokens<T>& x,
                          const Tokens<accumulate_t<T>>& weights, const TokenIndex& index, T* grad_x,
                          accumulate_t<T>* grad_weights, const Stream& stream) {
  const DeviceGuard guard(stream.device, kBackward);
  check_count(sizes.tokens, "tokens", kBackward);
  check_count(sizes.indices, "indices", kBackward);
  const bool is_aligned = aligned(grad, grad_stride_b) &&
                          aligned(x.data, x.stride_b, x.stride_n, sizes.channels) && aligned(grad_x);
  const int chunks = row_blocks(sizes.tokens);
  launch(kBackward, is_aligned ? fuse_backward_kernel<T, true> : fuse_backward_kernel<T, false>,
         sizes.batch * chunks, kWriteThreads, SharedParts::bytes<int>(kBlockRows), stream, sizes, grad,
         grad_stride_b, x, weights, index, grad_x, grad_weights, chunks);
}

#define EVIT_INSTANTIATE(T)                                                                          \
  template void fuse_tokens<T>(const GatherSizes&, const Tokens<T>&, const Tokens<accumulate_t<T>>&, \
                               const TokenIndex&, T*, const Stream&);                                \
  template void fuse_tokens_backward<T>(const GatherSizes&, const T*, int64_t, const Tokens<T>&,     \
                                        const Tokens<accumulate_t<T>>&, const TokenIndex&, T*,       \
                                        accumulate_t<T>*, const Stream&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cuda
