#include "../restore_tokens.h"

#include "kept_places.cuh"
#include "rows.cuh"
#include "write_rows.cuh"

namespace evit::cuda {
namespace {

constexpr char kForward[] = "restore_tokens";
constexpr char kBackward[] = "restore_tokens_backward";

// Up to so many tokens the gradient of the fused token is one sum, without partial ones.
constexpr int kSumInPlace = 1024;

int64_t sum_chunks(const RestoreSizes& sizes) {
  return sizes.tokens <= kSumInPlace ? 1 : (sizes.tokens + kChunkRows - 1) / kChunkRows;
}

// Looks at kept[first] ... kept[first + count - 1] of one sequence, as far as they exist. Called by all
// threads of the block.
__device__ void check_kept(const int64_t* kept, int keep, int patches, int first, int count) {
  const int last = min(keep, first + count);
  for (int i = max(first, 0) + static_cast<int>(threadIdx.x); i < last; i += static_cast<int>(blockDim.x)) {
    const int64_t patch = kept[i];
    EVIT_DEVICE_ASSERT(patch >= 0 && patch < patches && "restore_tokens: kept out of range");
    EVIT_DEVICE_ASSERT((i == 0 || kept[i - 1] < patch) && "restore_tokens: kept not ascending");
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWriteThreads, sizeof(T) == 8 ? 2 : 4)
    restore_kernel(RestoreSizes sizes, Tokens<T> tokens, const int64_t* kept, Tokens<T> fill, T* out,
                   int chunks) {
  const int64_t b = blockIdx.x / chunks;
  const int first = static_cast<int>(blockIdx.x % chunks) * kBlockRows;
  const int num_tokens = static_cast<int>(sizes.tokens), prefix = static_cast<int>(sizes.prefix);
  const int patches = num_tokens - prefix, keep = static_cast<int>(sizes.keep);
  const int64_t* of_sequence = kept + b * keep;

  SharedParts parts;
  int* place = parts.take<int>(kBlockRows);
  find_places(of_sequence, keep, patches, prefix, first, kBlockRows, kWriteThreads, place);
  // There are no more kept tokens than patches: together, the blocks of a sequence look at all of them.
  check_kept(of_sequence, keep, patches, first - prefix, kBlockRows);
  __syncthreads();
  const auto describe = [&](int n) -> Row<T> {
    if (n < prefix) return {Row<T>::copy, tokens.row(b, n), 0};
    const int from = place[n - first];
    if (from >= 0) return {Row<T>::copy, tokens.row(b, prefix + from), 0};
    if (fill.data == nullptr) return {Row<T>::zeros, nullptr, 0};
    return {Row<T>::copy, fill.row(b, n), 0};
  };
  write_rows<kAligned, false>(first, num_tokens, sizes.channels, out + b * sizes.tokens * sizes.channels,
                              static_cast<const T*>(nullptr), describe, [](int, accumulate_t<T>) {});
}

// The gradient where nothing is summed: the rows of the prefix and the kept tokens, and zeros for a fused
// one.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWriteThreads, sizeof(T) == 8 ? 2 : 4)
    restore_backward_kernel(RestoreSizes sizes, Tokens<T> grad, const int64_t* kept, T* grad_tokens,
                            int chunks) {
  const int64_t b = blockIdx.x / chunks;
  const int first = static_cast<int>(blockIdx.x % chunks) * kBlockRows;
  const int prefix = static_cast<int>(sizes.prefix), keep = static_cast<int>(sizes.keep);
  const int64_t* of_sequence = kept + b * keep;
  // Before any of them is followed.
  check_kept(of_sequence, keep, static_cast<int>(sizes.patches()), first - prefix, kBlockRows);
  __syncthreads();
  const auto describe = [&](int n) -> Row<T> {
    if (n < prefix) return {Row<T>::copy, grad.row(b, n), 0};
    if (n < prefix + keep) return {Row<T>::copy, grad.row(b, prefix + of_sequence[n - prefix]), 0};
    return {Row<T>::zeros, nullptr, 0};
  };
  write_rows<kAligned, false>(first, static_cast<int>(sizes.in_tokens()), sizes.channels,
                              grad_tokens + b * sizes.in_tokens() * sizes.channels,
                              static_cast<const T*>(nullptr), describe, [](int, accumulate_t<T>) {});
}

// The gradient where the fused token has filled the places of the dropped ones: a block takes a slice of the
// columns, copies the rows of the prefix and the kept tokens and sums the others, in one pass over the rows
// in their order.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRowLanes * 16, kAligned && sizeof(T) < 8 ? 2 : 1)
    restore_backward_sum_kernel(RestoreSizes sizes, Tokens<T> grad, const int64_t* kept, T* grad_tokens,
                                accumulate_t<T>* partials, Slices slices, int chunks) {
  using A = accumulate_t<T>;
  constexpr int W = kWidth<T>;
  const int slice = static_cast<int>(blockIdx.x % slices.count);
  const int chunk = static_cast<int>(blockIdx.x / slices.count % chunks);
  const int64_t b = blockIdx.x / slices.count / chunks;
  const int num_tokens = static_cast<int>(sizes.tokens), prefix = static_cast<int>(sizes.prefix);
  const int patches = num_tokens - prefix, keep = static_cast<int>(sizes.keep);
  const int64_t* of_sequence = kept + b * keep;

  const int vectors = slices.vectors;
  const int64_t column = (static_cast<int64_t>(slice) * vectors + threadIdx.x % vectors) * W;
  const int64_t channels = sizes.channels, left = channels - column;
  const int first = chunk * kChunkRows, last = chunks == 1 ? num_tokens : min(first + kChunkRows, num_tokens);
  int row = first + static_cast<int>(threadIdx.x) / vectors;
  if (left <= 0) row = last;

  // The rows row, row + kRowLanes ... that this thread has in flight.
  Vector<T> value[kUnroll] = {};
  const auto load_rows = [&] {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int n = row + u * kRowLanes;
      if (n < last) value[u] = load<kAligned>(grad.row(b, n) + column, left);
    }
  };
  load_rows();  // under way while the kept ones among them are found

  SharedParts parts;
  A* scratch = parts.take<A>(static_cast<int>(blockDim.x) / kWarp * Columns<W>(vectors).count());
  int* place = parts.take<int>(last - first);
  find_places(of_sequence, keep, patches, prefix, first, last - first, static_cast<int>(blockDim.x), place);
  check_kept(of_sequence, keep, patches, first - prefix, last - first);
  __syncthreads();

  A sum[W] = {};
  T* out = grad_tokens + b * sizes.in_tokens() * channels + column;
  while (row < last) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int n = row + u * kRowLanes;
      if (n >= last) continue;
      const int to = n < prefix ? n : place[n - first] < 0 ? -1 : prefix + place[n - first];
      if (to >= 0) {
        store<kAligned>(out + to * channels, value[u], left);
      } else {
        A element[W];
        widen_vector(value[u], element);
#pragma unroll
        for (int w = 0; w < W; ++w) sum[w] += element[w];
      }
    }
    row += kUnroll * kRowLanes;
    load_rows();
  }
  sum_row_lanes<W>(sum, vectors, scratch, [&](int offset, A total) {
    const int64_t c = static_cast<int64_t>(slice) * vectors * W + offset;
    if (c >= channels) return;
    if (chunks == 1)
      grad_tokens[((b + 1) * sizes.in_tokens() - 1) * channels + c] = narrow<T>(total);
    else
      partials[(b * chunks + chunk) * channels + c] = total;
  });
}

}  // namespace

template <typename T>
void restore_tokens(const RestoreSizes& sizes, const Tokens<T>& tokens, const int64_t* kept,
                    const Tokens<T>& fill, T* out, const Stream& stream) {
  const DeviceGuard guard(stream.device, kForward);
  check_count(sizes.tokens, "tokens", kForward);
  const bool is_aligned = aligned(tokens.data, tokens.stride_b, tokens.stride_n, sizes.channels) &&
                          aligned(fill.data, fill.stride_b, fill.stride_n) && aligned(out);
  const int chunks = row_blocks(sizes.tokens);
  launch(kForward, is_aligned ? restore_kernel<T, true> : restore_kernel<T, false>, sizes.batch * chunks,
         kWriteThreads, SharedParts::bytes<int>(kBlockRows), stream, sizes, tokens, kept, fill, out, chunks);
}

template <typename T>
int64_t restore_tokens_backward_workspace(const RestoreSizes& sizes, bool fill_fused) {
  const int64_t chunks = sum_chunks(sizes);
  if (!fill_fused || chunks == 1) return 0;
  return SharedParts::bytes<accumulate_t<T>>(sizes.batch * chunks * sizes.channels);
}

template <typename T>
void restore_tokens_backward(const RestoreSizes& sizes, bool fill_fused, const Tokens<T>& grad,
                             const int64_t* kept, T* grad_tokens, void* workspace, const Stream& stream) {
  using A = accumulate_t<T>;
  const DeviceGuard guard(stream.device, kBackward);
  check_count(sizes.tokens, "tokens", kBackward);
  const bool is_aligned =
      aligned(grad.data, grad.stride_b, grad.stride_n, sizes.channels) && aligned(grad_tokens);
  if (!fill_fused) {
    const int chunks = row_blocks(sizes.in_tokens());
    launch(kBackward, is_aligned ? restore_backward_kernel<T, true> : restore_backward_kernel<T, false>,
           sizes.batch * chunks, kWriteThreads, 0, stream, sizes, grad, kept, grad_tokens, chunks);
    return;
  }
  if (sizes.channels == 0) return;
  const int64_t chunks = sum_chunks(sizes);
  const Slices slices = share_out_columns<T>(sizes.batch * chunks, sizes.channels, stream);
  const int64_t places = chunks == 1 ? sizes.tokens : kChunkRows;
  static_assert(SharedParts::bytes<int>(kSumInPlace) + row_sum_bytes<T>({16, 1, 1}) <= kSharedMemory);
  static_assert(kChunkRows <= kSumInPlace);
  A* partials = static_cast<A*>(workspace);
  launch(kBackward, is_aligned ? restore_backward_sum_kernel<T, true> : restore_backward_sum_kernel<T, false>,
         sizes.batch * chunks * slices.count, slices.threads(),
         row_sum_bytes<T>(slices) + SharedParts::bytes<int>(places), stream, sizes, grad, kept, grad_tokens,
         partials, slices, static_cast<int>(chunks));
  if (chunks > 1)
    sum_partials<T>(kBackward, partials, sizes.batch, chunks, sizes.channels,
                    grad_tokens + (sizes.in_tokens() - 1) * sizes.channels,
                    sizes.in_tokens() * sizes.channels, stream);
}

#define EVIT_INSTANTIATE(T)                                                                                 \
  template void restore_tokens<T>(const RestoreSizes&, const Tokens<T>&, const int64_t*, const Tokens<T>&,  \
                                  T*, const Stream&);                                                       \
  template int64_t restore_tokens_backward_workspace<T>(const RestoreSizes&, bool);                         \
  template void restore_tokens_backward<T>(const RestoreSizes&, bool, const Tokens<T>&, const int64_t*, T*, \
                                           void*, const Stream&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cuda
