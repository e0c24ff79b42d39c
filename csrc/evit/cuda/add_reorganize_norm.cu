#include "../add_reorganize_norm.h"

#include "reorganize.cuh"

namespace evit::cuda {
namespace {

constexpr char kOperator[] = "add_reorganize_norm";
constexpr int kNormThreads = 256;

// A warp normalises a row: it reads it three times, from the second time on out of the first-level cache.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNormThreads, 4)
    layer_norm_kernel(const T* tokens, int64_t rows, int64_t channels, LayerNorm<T> norm, T* normed) {
  using A = accumulate_t<T>;
  constexpr int W = kWidth<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kNormThreads / kWarp) + static_cast<int>(threadIdx.x) / kWarp;
  if (row >= rows) return;  // a whole warp
  const T* in = tokens + row * channels;
  T* out = normed + row * channels;
  A sum = 0, squares = 0;
  for (int64_t c = lane * W; c < channels; c += kWarp * W) {
    const Vector<T> value = load<kAligned>(in + c, channels - c);
#pragma unroll
    for (int w = 0; w < W; ++w) sum += widen(value.element[w]);
  }
  const A mean = warp_sum(sum) / static_cast<A>(channels);
  for (int64_t c = lane * W; c < channels; c += kWarp * W) {
    const Vector<T> value = load<kAligned>(in + c, channels - c);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const A difference = widen(value.element[w]) - mean;
      if (kAligned || c + w < channels) squares = multiply_add(difference, difference, squares);
    }
  }
  const A variance = warp_sum(squares) / static_cast<A>(channels);
  const A factor = A{1} / sqrt(variance + static_cast<A>(norm.eps));
  for (int64_t c = lane * W; c < channels; c += kWarp * W) {
    Vector<T> value = load<kAligned>(in + c, channels - c), weight = {}, bias = {};
    if (norm.weight != nullptr) weight = load<kAligned>(norm.weight + c, channels - c);
    if (norm.bias != nullptr) bias = load<kAligned>(norm.bias + c, channels - c);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const A normal = (widen(value.element[w]) - mean) * factor;
      const A scale = norm.weight != nullptr ? widen(weight.element[w]) : A{1};
      value.element[w] = narrow<T>(multiply_add(normal, scale, static_cast<A>(widen(bias.element[w]))));
    }
    store<kAligned>(out + c, value, channels - c);
  }
}

}  // namespace

template <typename T, typename S>
void add_reorganize_norm(const ReorganizeSizes& sizes, const Tokens<T>& x, const Tokens<T>& branch,
                         const Tokens<S>& scores, const LayerNorm<T>& norm, T* tokens, T* normed,
                         int64_t* kept, void* workspace, const Stream& stream) {
  reorganize<T, S, true>(kOperator, sizes, x, branch, scores, tokens, kept, workspace, stream);
  const DeviceGuard guard(stream.device, kOperator);
  const bool is_aligned =
      aligned(tokens, sizes.channels) && aligned(normed) && aligned(norm.weight) && aligned(norm.bias);
  const int64_t rows = sizes.batch * sizes.out_tokens();
  constexpr int rows_per_block = kNormThreads / kWarp;
  launch(kOperator, is_aligned ? layer_norm_kernel<T, true> : layer_norm_kernel<T, false>,
         (rows + rows_per_block - 1) / rows_per_block, kNormThreads, 0, stream, static_cast<const T*>(tokens),
         rows, sizes.channels, norm, normed);
}

#define EVIT_INSTANTIATE_PAIR(T, S)                                                                       \
  template void add_reorganize_norm<T, S>(const ReorganizeSizes&, const Tokens<T>&, const Tokens<T>&,     \
                                          const Tokens<S>&, const LayerNorm<T>&, T*, T*, int64_t*, void*, \
                                          const Stream&);
#define EVIT_INSTANTIATE(T)       \
  EVIT_INSTANTIATE_PAIR(T, float) \
  EVIT_INSTANTIATE_PAIR(T, double)
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE
#undef EVIT_INSTANTIATE_PAIR

}  // namespace evit::cuda
