#include "../merge_tokens.h"

#include "write_rows.cuh"

namespace evit::cuda {
namespace {

constexpr char kForward[] = "merge_tokens";
constexpr char kBackward[] = "merge_tokens_backward";

// What concerns the rows of a block: of each how many patches it owns, and the first of them.
struct Owned {
  int* count;
  int* from;

  static EVIT_HOST_DEVICE constexpr int64_t bytes() { return 2 * SharedParts::bytes<int>(kBlockRows); }
};

// Reads the whole of a sequence's owners. Called by all threads of the block; complete when it returns.
__device__ inline Owned look_through(const MergeSizes& sizes, const TokenIndex& owner, int64_t b, int first) {
  const int thread = static_cast<int>(threadIdx.x), patches = static_cast<int>(sizes.patches());
  SharedParts parts;
  int* count = parts.take<int>(kBlockRows);
  int* from = parts.take<int>(kBlockRows);
  for (int i = thread; i < kBlockRows; i += kWriteThreads) {
    count[i] = 0;
    from[i] = patches;
  }
  __syncthreads();
  for (int i = thread; i < patches; i += kWriteThreads) {
    const int64_t m = owner.at(b, i);
    EVIT_DEVICE_ASSERT(m >= 0 && m < sizes.owners && "merge_tokens: owner out of range");
    const int64_t row = sizes.prefix + m - first;
    if (row < 0 || row >= kBlockRows) continue;
    atomicAdd(&count[row], 1);
    atomicMin(&from[row], i);
  }
  __syncthreads();
  return {count, from};
}

// Calls body(i) for the `left` patches of the owner m, ascending, the first of which is `start`. Called by
// whole warps, with one m.
template <typename Body>
__device__ void for_each_owned(const TokenIndex& owner, int64_t b, int patches, int64_t m, int start,
                               int left, const Body& body) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (; left > 0; start += kWarp) {
    const bool hit = start + lane < patches && owner.at(b, start + lane) == m;
    unsigned hits = __ballot_sync(kFullWarp, hit);
    left -= __popc(hits);
    for (; hits != 0; hits &= hits - 1) body(start + __ffs(static_cast<int>(hits)) - 1);
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWriteThreads, sizeof(T) == 8 ? 2 : 4)
    merge_kernel(MergeSizes sizes, Tokens<T> x, TokenIndex owner, Tokens<accumulate_t<T>> weights, T* out,
                 accumulate_t<T>* totals, int chunks) {
  using A = accumulate_t<T>;
  constexpr int W = kWidth<T>;
  const int64_t b = blockIdx.x / chunks, channels = sizes.channels;
  const int first = static_cast<int>(blockIdx.x % chunks) * kBlockRows;
  const int prefix = static_cast<int>(sizes.prefix), patches = static_cast<int>(sizes.patches());
  const int num_out = static_cast<int>(sizes.out_tokens());
  T* rows = out + b * sizes.out_tokens() * channels;
  const Owned owned = look_through(sizes, owner, b, first);
  const auto describe = [&](int n) -> Row<T> {
    if (n < prefix) return {Row<T>::copy, x.row(b, n), 0};
    const int count = owned.count[n - first];
    if (count == 0) return {Row<T>::zeros, nullptr, 0};
    if (count > 1) return {Row<T>::skip, nullptr, 0};
    return {Row<T>::copy, x.row(b, prefix + owned.from[n - first]), 0};
  };
  write_rows<kAligned, false>(first, num_out, channels, rows, static_cast<const T*>(nullptr), describe,
                              [](int, A) {});

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int row = static_cast<int>(threadIdx.x) / kWarp; row < kBlockRows; row += kWriteThreads / kWarp) {
    const int n = first + row, m = n - prefix, count = owned.count[row], from = owned.from[row];
    if (m < 0 || n >= num_out) continue;  // the same for the whole warp
    A total = 0;
    for_each_owned(owner, b, patches, m, from, count, [&](int i) { total += *weights.row(b, i); });
    if (lane == 0) totals[b * sizes.owners + m] = total;
    if (count < 2) continue;
    for (int64_t c = lane * W; c - lane * W < channels; c += kWarp * W) {
      A sum[W] = {};
      for_each_owned(owner, b, patches, m, from, count, [&](int i) {
        if (c >= channels) return;
        const A share = *weights.row(b, i) / total;
        A element[W];
        widen_vector(load<kAligned>(x.row(b, prefix + i) + c, channels - c), element);
#pragma unroll
        for (int w = 0; w < W; ++w) sum[w] = multiply_add(share, element[w], sum[w]);
      });
      if (c < channels) store<kAligned>(rows + n * channels + c, narrow_vector<T>(sum), channels - c);
    }
  }
}

// A warp writes what comes of one row of the gradient: the rows of all patches that it owns.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWriteThreads, 2)
    merge_backward_kernel(MergeSizes sizes, Tokens<T> grad_out, Tokens<accumulate_t<T>> grad_totals,
                          Tokens<T> x, TokenIndex owner, Tokens<accumulate_t<T>> weights, T* grad_x,
                          accumulate_t<T>* grad_weights, int chunks) {
  using A = accumulate_t<T>;
  constexpr int W = kWidth<T>;
  const int64_t b = blockIdx.x / chunks, channels = sizes.channels;
  const int first = static_cast<int>(blockIdx.x % chunks) * kBlockRows;
  const int prefix = static_cast<int>(sizes.prefix), patches = static_cast<int>(sizes.patches());
  const int num_out = static_cast<int>(sizes.out_tokens()), lane = static_cast<int>(threadIdx.x) % kWarp;
  T* rows = grad_x + b * sizes.tokens * channels;
  const Owned owned = look_through(sizes, owner, b, first);
  for (int row = static_cast<int>(threadIdx.x) / kWarp; row < kBlockRows; row += kWriteThreads / kWarp) {
    const int n = first + row, m = n - prefix, count = owned.count[row], from = owned.from[row];
    if (n >= num_out || (m >= 0 && count == 0)) continue;  // the same for the whole warp
    const T* gradient = grad_out.row(b, n);
    if (m < 0 || count == 1) {
      T* copy = rows + (m < 0 ? n : prefix + from) * channels;
      for (int64_t c = lane * W; c < channels; c += kWarp * W)
        store<kAligned>(copy + c, load<kAligned>(gradient + c, channels - c), channels - c);
    }
    if (m < 0) continue;
    const A grad_total = *grad_totals.row(b, m);
    A* dots = grad_weights + b * patches;  // until all are known; written and read by the first lane
    if (count == 1) {
      if (lane == 0) dots[from] = grad_total;
      continue;
    }
    A total = 0, mean = 0;
    for_each_owned(owner, b, patches, m, from, count, [&](int i) { total += *weights.row(b, i); });
    for_each_owned(owner, b, patches, m, from, count, [&](int i) {
      const A share = *weights.row(b, i) / total;
      A dot = 0;
      for (int64_t c = lane * W; c < channels; c += kWarp * W) {
        A g[W], element[W];
        widen_vector(load<kAligned>(gradient + c, channels - c), g);
        widen_vector(load<kAligned>(x.row(b, prefix + i) + c, channels - c), element);
#pragma unroll
        for (int w = 0; w < W; ++w) {
          dot = multiply_add(g[w], element[w], dot);
          g[w] = share * g[w];
        }
        store<kAligned>(rows + (prefix + i) * channels + c, narrow_vector<T>(g), channels - c);
      }
      dot = warp_sum(dot);
      mean = multiply_add(share, dot, mean);
      if (lane == 0) dots[i] = dot;
    });
    for_each_owned(owner, b, patches, m, from, count, [&](int i) {
      if (lane == 0) dots[i] = (dots[i] - mean) / total + grad_total;
    });
  }
}

void check_sizes(const MergeSizes& sizes, const char* what) {
  check_count(sizes.tokens, "tokens", what);
  check_count(sizes.out_tokens(), "tokens", what);
}

}  // namespace

template <typename T>
void merge_tokens(const MergeSizes& sizes, const Tokens<T>& x, const TokenIndex& owner,
                  const Tokens<accumulate_t<T>>& weights, T* out, accumulate_t<T>* totals,
                  const Stream& stream) {
  const DeviceGuard guard(stream.device, kForward);
  check_sizes(sizes, kForward);
  const bool is_aligned = aligned(x.data, x.stride_b, x.stride_n, sizes.channels) && aligned(out);
  const int chunks = row_blocks(sizes.out_tokens());
  launch(kForward, is_aligned ? merge_kernel<T, true> : merge_kernel<T, false>, sizes.batch * chunks,
         kWriteThreads, Owned::bytes(), stream, sizes, x, owner, weights, out, totals, chunks);
}

template <typename T>
void merge_tokens_backward(const MergeSizes& sizes, const Tokens<T>& grad_out,
                           const Tokens<accumulate_t<T>>& grad_totals, const Tokens<T>& x,
                           const TokenIndex& owner, const Tokens<accumulate_t<T>>& weights, T* grad_x,
                           accumulate_t<T>* grad_weights, const Stream& stream) {
  const DeviceGuard guard(stream.device, kBackward);
  check_sizes(sizes, kBackward);
  const bool is_aligned = aligned(grad_out.data, grad_out.stride_b, grad_out.stride_n) &&
                          aligned(x.data, x.stride_b, x.stride_n, sizes.channels) && aligned(grad_x);
  const int chunks = row_blocks(sizes.out_tokens());
  launch(kBackward, is_aligned ? merge_backward_kernel<T, true> : merge_backward_kernel<T, false>,
         sizes.batch * chunks, kWriteThreads, Owned::bytes(), stream, sizes, grad_out, grad_totals, x, owner,
         weights, grad_x, grad_weights, chunks);
}

#define EVIT_INSTANTIATE(T)                                                                           \
  template void merge_tokens<T>(const MergeSizes&, const Tokens<T>&, const TokenIndex&,               \
                                const Tokens<accumulate_t<T>>&, T*, accumulate_t<T>*, const Stream&); \
  template void merge_tokens_backward<T>(                                                             \
      const MergeSizes&, const Tokens<T>&, const Tokens<accumulate_t<T>>&, const Tokens<T>&,          \
      const TokenIndex&, const Tokens<accumulate_t<T>>&, T*, accumulate_t<T>*, const Stream&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cuda
