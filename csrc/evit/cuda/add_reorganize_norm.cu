#include "../add_reorganize_norm.h"

#include "reorganize.cuh"

namespace evit::cuda {
namespace {

constexpr char kOperator[] = "add_reorganize_norm";
constexpr int kNormThreads = 256;

// Channels that a thread holds in registers, at most, or half as many.
template <typename T>
constexpr int kNormElements = 128 / sizeof(accumulate_t<T>);

// A warp normalises a row. kVectors: of those 16 bytes, a thread has so many of the row in registers; with 0
// it reads the row three times, from the second time on out of the first-level cache. In either case a thread
// adds up its elements in their order.
template <typename T, bool kAligned, int kVectors>
__global__ void __launch_bounds__(kNormThreads, kVectors* kWidth<T> * sizeof(accumulate_t<T>) > 64 ? 3 : 4)
    layer_norm_kernel(const T* tokens, int64_t rows, int64_t channels, LayerNorm<T> norm, T* normed) {
  using A = accumulate_t<T>;
  constexpr int W = kWidth<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kNormThreads / kWarp) + static_cast<int>(threadIdx.x) / kWarp;
  if (row >= rows) return;  // a whole warp
  const T* in = tokens + row * channels;
  T* out = normed + row * channels;

  A held[kVectors > 0 ? kVectors : 1][W];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = (lane + v * kWarp) * W;
    if (c < channels) widen_vector(load<kAligned>(in + c, channels - c), held[v]);
  }
  // Calls use(c, elements) for each of the thread's vectors, which may change what is held.
  const auto for_each_vector = [&](const auto& use) {
    if constexpr (kVectors > 0) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = (lane + v * kWarp) * W;
        if (c < channels) use(c, held[v]);
      }
    } else {
      for (int64_t c = lane * W; c < channels; c += kWarp * W) {
        widen_vector(load<kAligned>(in + c, channels - c), held[0]);
        use(c, held[0]);
      }
    }
  };

  // Of a parameter that may be left out, and is `otherwise` then.
  const auto read_or = [&](const T* parameter, int64_t c, A otherwise, A(&element)[W]) {
    if (parameter != nullptr)
      widen_vector(load<kAligned>(parameter + c, channels - c), element);
    else
#pragma unroll
      for (int w = 0; w < W; ++w) element[w] = otherwise;
  };

  A sum = 0, squares = 0;
  for_each_vector([&](int64_t, const A(&element)[W]) {
#pragma unroll
    for (int w = 0; w < W; ++w) sum += element[w];
  });
  const A mean = warp_sum(sum) / static_cast<A>(channels);
  for_each_vector([&](int64_t c, A(&element)[W]) {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      element[w] -= mean;
      if (kAligned || c + w < channels) squares = multiply_add(element[w], element[w], squares);
    }
  });
  const A variance = warp_sum(squares) / static_cast<A>(channels);
  const A factor = A{1} / sqrt(variance + static_cast<A>(norm.eps));
  for_each_vector([&](int64_t c, A(&element)[W]) {
    A scale[W], shift[W];
    read_or(norm.weight, c, A{1}, scale);
    read_or(norm.bias, c, A{0}, shift);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const A difference = kVectors > 0 ? element[w] : element[w] - mean;
      element[w] = multiply_add(multiply(difference, factor), scale[w], shift[w]);
    }
    store<kAligned>(out + c, narrow_vector<T>(element), channels - c);
  });
}

// The kernel for rows of so many channels.
template <typename T>
auto layer_norm_for(int64_t channels, bool is_aligned) {
  constexpr int some = kNormElements<T> / 2 / kWidth<T>, many = 2 * some;
  if (!is_aligned) return layer_norm_kernel<T, false, 0>;
  const int64_t vectors = channels / kWidth<T>;
  if (vectors <= some * kWarp) return layer_norm_kernel<T, true, some>;
  if (vectors <= many * kWarp) return layer_norm_kernel<T, true, many>;
  return layer_norm_kernel<T, true, 0>;
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
  launch(kOperator, layer_norm_for<T>(sizes.channels, is_aligned),
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
