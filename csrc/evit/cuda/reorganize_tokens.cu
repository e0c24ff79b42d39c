#include "../reorganize_tokens.h"

#include "kept_places.cuh"
#include "reorganize.cuh"
#include "write_rows.cuh"

namespace evit::cuda {
namespace {

constexpr char kForward[] = "reorganize_tokens";
constexpr char kBackward[] = "reorganize_tokens_backward";

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWriteThreads, sizeof(T) == 8 ? 2 : 4)
    reorganize_backward_kernel(ReorganizeSizes sizes, Tokens<T> grad_tokens, Tokens<T> x,
                               Tokens<accumulate_t<T>> scores, const int64_t* kept, T* grad_x,
                               accumulate_t<T>* grad_scores, int64_t skip, int chunks) {
  using A = accumulate_t<T>;
  const int64_t b = blockIdx.x / chunks;
  const int first = static_cast<int>(blockIdx.x % chunks) * kBlockRows;
  const int num_tokens = static_cast<int>(sizes.tokens), prefix = static_cast<int>(sizes.prefix);
  const int patches = num_tokens - prefix, keep = static_cast<int>(sizes.keep);
  A* out_scores = grad_scores + b * (skip + patches);

  SharedParts parts;
  int* place = parts.take<int>(kBlockRows);
  find_places(kept + b * keep, keep, patches, prefix, first, kBlockRows, kWriteThreads, place);
  const int thread = static_cast<int>(threadIdx.x);
  if (first == 0)
    for (int64_t i = thread; i < skip; i += kWriteThreads) out_scores[i] = 0;
  __syncthreads();

  const auto describe = [&](int n) -> Row<T> {
    const int to = place[n - first];
    if (n < prefix) return {Row<T>::copy, grad_tokens.row(b, n), 0};
    if (to >= 0) return {Row<T>::copy, grad_tokens.row(b, prefix + to), 0};
    return {Row<T>::scaled, x.row(b, n), *scores.row(b, n - prefix)};
  };
  write_rows<kAligned, true>(first, num_tokens, sizes.channels, grad_x + b * sizes.tokens * sizes.channels,
                             grad_tokens.row(b, prefix + keep), describe, [&](int n, A dot) {
                               if (n >= prefix) out_scores[skip + n - prefix] = dot;
                             });
}

}  // namespace

template <typename T, typename S>
int64_t reorganize_tokens_workspace(const ReorganizeSizes& sizes) {
  using Workspace = ReorganizeWorkspace<accumulate_t<T>>;
  if (!Workspace::needed(sizes, std::is_same_v<S, accumulate_t<T>>)) return 0;
  return Workspace::bytes(sizes) + (selects_in_chunks<S>(sizes) ? ChunkedSelection::bytes(sizes) : 0);
}

template <typename T, typename S>
void reorganize_tokens(const ReorganizeSizes& sizes, const Tokens<T>& x, const Tokens<S>& scores, T* tokens,
                       int64_t* kept, void* workspace, const Stream& stream) {
  reorganize<T, S, false>(kForward, sizes, x, x, scores, tokens, kept, workspace, stream);
}

template <typename T>
void reorganize_tokens_backward(const ReorganizeSizes& sizes, const Tokens<T>& grad_tokens,
                                const Tokens<T>& x, const Tokens<accumulate_t<T>>& scores,
                                const int64_t* kept, T* grad_x, accumulate_t<T>* grad_scores, int64_t skip,
                                const Stream& stream) {
  const DeviceGuard guard(stream.device, kBackward);
  check_count(sizes.tokens, "tokens", kBackward);
  const bool is_aligned = aligned(grad_tokens.data, grad_tokens.stride_b, grad_tokens.stride_n) &&
                          aligned(x.data, x.stride_b, x.stride_n, sizes.channels) && aligned(grad_x);
  const int chunks = row_blocks(sizes.tokens);
  const auto kernel = is_aligned ? reorganize_backward_kernel<T, true> : reorganize_backward_kernel<T, false>;
  launch(kBackward, kernel, sizes.batch * chunks, kWriteThreads, SharedParts::bytes<int>(kBlockRows), stream,
         sizes, grad_tokens, x, scores, kept, grad_x, grad_scores, skip, chunks);
}

#define EVIT_INSTANTIATE_PAIR(T, S)                                                                     \
  template int64_t reorganize_tokens_workspace<T, S>(const ReorganizeSizes&);                           \
  template void reorganize_tokens<T, S>(const ReorganizeSizes&, const Tokens<T>&, const Tokens<S>&, T*, \
                                        int64_t*, void*, const Stream&);
#define EVIT_INSTANTIATE(T)                                                                               \
  EVIT_INSTANTIATE_PAIR(T, float)                                                                         \
  EVIT_INSTANTIATE_PAIR(T, double)                                                                        \
  template void reorganize_tokens_backward<T>(const ReorganizeSizes&, const Tokens<T>&, const Tokens<T>&, \
                                              const Tokens<accumulate_t<T>>&, const int64_t*, T*,         \
                                              accumulate_t<T>*, int64_t, const Stream&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE
#undef EVIT_INSTANTIATE_PAIR

}  // namespace evit::cuda
