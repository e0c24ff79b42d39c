#include "class_attention.cuh"

namespace evit::cuda {
namespace {

constexpr char kOperator[] = "class_attention_backward";
constexpr int kThreads = 256;

// Backward, a block for each head of each sequence. The softmax is computed again: the keys have to be read
// for grad_q in any case, so that probabilities kept from the forward pass would save no memory traffic.
// Where the keys of a head fit into shared memory they are read once (kTile); else the second reading meets
// the cache. Only what is not zero is written: of all queries, the gradient of the class token's.
template <typename T, bool kAligned, bool kTile>
__global__ void __launch_bounds__(kThreads, 2)
    class_attention_backward_kernel(Attention<T> job, const accumulate_t<T>* grad_scores,
                                    int64_t grad_stride_b, int64_t grad_stride_n, T* grad_q, T* grad_k,
                                    accumulate_t<T>* workspace) {
  using A = accumulate_t<T>;
  const unsigned heads = static_cast<unsigned>(job.sizes.heads);
  const int64_t head = blockIdx.x, b = blockIdx.x / heads, h = blockIdx.x % heads;
  const int num_tokens = static_cast<int>(job.sizes.tokens), channels = static_cast<int>(job.sizes.channels);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  constexpr int warps = kThreads / kWarp, W = kWidth<T>;
  const int lanes = job.lanes, keys = keys_per_warp<T>(lanes);
  const T* global_keys = job.input.keys(b, h);
  const T* q = job.input.query(b, h);
  const A* g = grad_scores + b * grad_stride_b;

  SharedParts parts;
  A* partial = parts.take<A>(warps * lanes * W);
  A* row;  // logits, then their gradients
  if (kTile || workspace == nullptr)
    row = parts.take<A>(num_tokens);
  else
    row = workspace + head * num_tokens;
  if constexpr (kTile) {
    const int vectors = (channels + W - 1) / W, row_width = vectors * W;
    T* tile = parts.take<T>(static_cast<int64_t>(num_tokens) * row_width);
    for (int n = thread / lanes; n < num_tokens; n += kThreads / lanes)
      for (int c = (thread & (lanes - 1)) * W; c < channels; c += lanes * W)
        copy_to_shared<kAligned>(tile + n * row_width + c, global_keys + n * job.input.k_stride_n + c,
                                 channels - c);
    copies_arrived();
    __syncthreads();
    job.input.k = tile;
    job.input.k_stride_b = job.input.k_stride_h = 0;
    job.input.k_stride_n = row_width;
  }
  for (int first = warp * keys; first < num_tokens; first += warps * keys)
    warp_logits<kAligned, kTile>(job, b, h, first, num_tokens, [&](int n, A logit) { row[n] = logit; });
  __syncthreads();

  // Every warp forms the statistics for itself, which costs no barrier:
  // d logits_n = scale / H * p_n * (g_n - sum_m p_m g_m).
  const A largest = warp_largest(row, num_tokens);
  A sum = 0, product = 0;
  for (int n = lane; n < num_tokens; n += kWarp) {
    const A e = exp(row[n] - largest);
    sum = add(sum, e);
    product = multiply_add(e, g[n * grad_stride_n], product);
  }
  sum = warp_sum(sum);
  const A mean = warp_sum(product) / sum;
  const A factor = job.scale / static_cast<A>(heads) / sum;
  __syncthreads();  // all warps have read the logits
  for (int n = thread; n < num_tokens; n += kThreads)
    row[n] = factor * exp(row[n] - largest) * (g[n * grad_stride_n] - mean);
  __syncthreads();

  const T* key_rows = job.input.keys(b, h);
  const int group = thread / lanes, groups = kThreads / lanes;
  T* out = grad_k + head * num_tokens * channels;
  for (int start = 0; start < channels; start += lanes * W) {
    const int c = start + (thread & (lanes - 1)) * W;
    A total[W] = {};
    if (c < channels) {
      A query[W];
      widen_vector(load<kAligned>(q + c, channels - c), query);
      for (int n = group; n < num_tokens; n += groups) {
        const A z = row[n];
        const T* from = key_rows + n * job.input.k_stride_n + c;
        A key[W], result[W];
        widen_vector(kTile ? load_shared(from) : load<kAligned>(from, channels - c), key);
#pragma unroll
        for (int w = 0; w < W; ++w) {
          total[w] = multiply_add(z, key[w], total[w]);
          result[w] = z * query[w];
        }
        store<kAligned>(out + static_cast<int64_t>(n) * channels + c, narrow_vector<T>(result), channels - c);
      }
    }
    for (int distance = lanes; distance < kWarp; distance *= 2)
#pragma unroll
      for (int w = 0; w < W; ++w) total[w] += __shfl_xor_sync(kFullWarp, total[w], distance);
    if (lane < lanes)
#pragma unroll
      for (int w = 0; w < W; ++w) partial[(warp * lanes + lane) * W + w] = total[w];
    __syncthreads();
    for (int i = thread; i < lanes * W && start + i < channels; i += kThreads) {
      A all = 0;
      for (int w = 0; w < warps; ++w) all += partial[w * lanes * W + i];
      grad_q[head * channels + start + i] = narrow<T>(all);
    }
    __syncthreads();  // the partial sums have been read
  }
}

// Bytes of shared memory of the backward kernel, in the order in which it takes them.
template <typename T>
struct BackwardShared {
  using A = accumulate_t<T>;
  int64_t partial, row, tile;
  explicit BackwardShared(const ClassAttentionSizes& sizes)
      : partial(SharedParts::bytes<A>(kThreads / kWarp * lanes_per_key<T>(sizes.channels) * kWidth<T>)),
        row(SharedParts::bytes<A>(sizes.tokens)),
        tile(SharedParts::bytes<T>(sizes.tokens *
                                   ((sizes.channels + kWidth<T> - 1) / kWidth<T> * kWidth<T>))) {}
  bool row_fits() const { return partial + row <= kSharedMemory; }
  // With more than that, too few blocks would share a multiprocessor.
  bool tile_fits() const { return partial + row + tile <= kSharedMemory; }
};

template <typename T, bool kAligned>
void backward(const ClassAttentionSizes& sizes, const ClassAttentionInput<T>& input,
              const accumulate_t<T>* grad_scores, int64_t grad_stride_b, int64_t grad_stride_n, T* grad_q,
              T* grad_k, void* workspace, const Stream& stream) {
  using A = accumulate_t<T>;
  const Attention<T> job = {sizes, input, lanes_per_key<T>(sizes.channels), static_cast<A>(sizes.scale)};
  const BackwardShared<T> shared(sizes);
  const bool tile = shared.tile_fits();
  const int64_t bytes = shared.partial + (shared.row_fits() ? shared.row : 0) + (tile ? shared.tile : 0);
  launch(kOperator,
         tile ? class_attention_backward_kernel<T, kAligned, true>
              : class_attention_backward_kernel<T, kAligned, false>,
         sizes.batch * sizes.heads, kThreads, bytes, stream, job, grad_scores, grad_stride_b, grad_stride_n,
         grad_q, grad_k, shared.row_fits() ? nullptr : static_cast<A*>(workspace));
}

}  // namespace

template <typename T>
int64_t class_attention_backward_workspace(const ClassAttentionSizes& sizes) {
  if (BackwardShared<T>(sizes).row_fits()) return 0;
  return sizes.batch * sizes.heads * sizes.tokens * static_cast<int64_t>(sizeof(accumulate_t<T>));
}

template <typename T>
void class_attention_backward(const ClassAttentionSizes& sizes, const ClassAttentionInput<T>& input,
                              const accumulate_t<T>* grad_scores, int64_t grad_stride_b,
                              int64_t grad_stride_n, T* grad_q, T* grad_k, void* workspace,
                              const Stream& stream) {
  const DeviceGuard guard(stream.device, kOperator);
  check_sizes(sizes, kOperator);
  if (input_aligned(sizes, input) && aligned(grad_k))
    backward<T, true>(sizes, input, grad_scores, grad_stride_b, grad_stride_n, grad_q, grad_k, workspace,
                      stream);
  else
    backward<T, false>(sizes, input, grad_scores, grad_stride_b, grad_stride_n, grad_q, grad_k, workspace,
                       stream);
}

#define EVIT_INSTANTIATE(T)                                                                            \
  template int64_t class_attention_backward_workspace<T>(const ClassAttentionSizes&);                  \
  template void class_attention_backward<T>(const ClassAttentionSizes&, const ClassAttentionInput<T>&, \
                                            const accumulate_t<T>*, int64_t, int64_t, T*, T*, void*,   \
                                            const Stream&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cuda
