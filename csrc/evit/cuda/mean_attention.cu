#include "mean_attention.cuh"

namespace evit::cuda {
namespace {

constexpr char kOperator[] = "mean_attention";
constexpr int kThreads = 256;  // of the launch that averages

// Rows are keys, columns queries: sums[b, h, n] = sum_m of the probabilities.
template <typename T>
__global__ void __launch_bounds__(kTileWarps* kWarp, sizeof(T) == 8 ? 2 : 4)
    sum_probabilities_kernel(TileJob<T> job, Tokens<accumulate_t<T>> key_bias,
                             const SoftmaxRow<accumulate_t<T>>* rows, accumulate_t<T>* sums) {
  using A = accumulate_t<T>;
  const TileWarp<T> warp(job, blockIdx.x);
  A bias[kLaneRows], sum[kLaneRows];
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) {
    const int n = min(warp.row_of(r), job.rows.count - 1);
    bias[r] = key_bias.data == nullptr ? A{0} : multiply(*key_bias.row(warp.b, n), static_cast<A>(kLog2E));
    sum[r] = 0;
  }
  const SoftmaxRow<A>* of_head = rows + warp.head * job.columns.count;
  for_each_tile(job, warp, 0, [&](TileProducts<A>& s, int first, const T*) {
    A total[kLaneRows] = {};  // of a tile, so that sums of thousands of queries lose few bits
    for_lane_columns(first, job.columns.count, [&](int j, int m, bool there) {
      const SoftmaxRow<A> query = of_head[there ? m : 0];
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const A exponent = multiply_add(s[r / 2][j / 2][r % 2 * 2 + j % 2], job.factor, bias[r]);
        const A power = power_of_two<T>(exponent - query.shift);
        total[r] = there ? multiply_add(power, query.inverse, total[r]) : total[r];
      }
    });
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) sum[r] = add(sum[r], total[r]);
  });
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) {
    const A all = row_sum(sum[r]);
    const int n = warp.row_of(r);
    if (threadIdx.x % 4 == 0 && n < job.rows.count) sums[warp.head * job.rows.count + n] = all;
  }
}

// The mean over heads and queries, a thread for each key.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    mean_of_sums_kernel(const A* sums, int heads, int tokens, int queries, int chunks, A* scores) {
  const int64_t b = blockIdx.x / chunks;
  const int n = static_cast<int>(blockIdx.x % chunks * blockDim.x + threadIdx.x);
  if (n >= tokens) return;
  A sum = 0;
  for (int64_t head = b * heads; head < (b + 1) * heads; ++head) sum = add(sum, sums[head * tokens + n]);
  scores[b * tokens + n] = sum / (static_cast<A>(heads) * static_cast<A>(queries));
}

}  // namespace

template <typename T>
void mean_from_rows(const MeanAttentionSizes& sizes, const MeanAttentionInput<T>& input,
                    const Tokens<accumulate_t<T>>& key_bias, const SoftmaxRow<accumulate_t<T>>* rows,
                    accumulate_t<T>* sums, accumulate_t<T>* scores, const Stream& stream) {
  using A = accumulate_t<T>;
  TileJob<T> job = make_job(sizes, input, kOperator).turned();
  const TileLaunch tiles = share_out_rows(job, sizes.batch * sizes.heads, 1, stream);
  launch(kOperator, sum_probabilities_kernel<T>, tiles.blocks, tiles.threads, tiles.shared_bytes, stream, job,
         key_bias, rows, sums);
  const int tokens = static_cast<int>(sizes.tokens), chunks = (tokens + kThreads - 1) / kThreads;
  launch(kOperator, mean_of_sums_kernel<A>, sizes.batch * chunks, kThreads, 0, stream,
         static_cast<const A*>(sums), static_cast<int>(sizes.heads), tokens, static_cast<int>(sizes.queries),
         chunks, scores);
}

template <typename T>
int64_t mean_attention_workspace(const MeanAttentionSizes& sizes) {
  return sizes.batch * sizes.heads * (2 * sizes.queries + sizes.tokens) *
         static_cast<int64_t>(sizeof(accumulate_t<T>));
}

template <typename T>
void mean_attention(const MeanAttentionSizes& sizes, const MeanAttentionInput<T>& input,
                    accumulate_t<T>* scores, void* workspace, const Stream& stream) {
  using A = accumulate_t<T>;
  const DeviceGuard guard(stream.device, kOperator);
  auto* rows = static_cast<SoftmaxRow<A>*>(workspace);
  query_statistics<T, false>(kOperator, make_job(sizes, input, kOperator), sizes.batch, {}, {rows}, stream);
  mean_from_rows<T>(sizes, input, {}, rows,
                    reinterpret_cast<A*>(rows + sizes.batch * sizes.heads * sizes.queries), scores, stream);
}

#define EVIT_INSTANTIATE(T)                                                                                  \
  template void mean_from_rows<T>(const MeanAttentionSizes&, const MeanAttentionInput<T>&,                   \
                                  const Tokens<accumulate_t<T>>&, const SoftmaxRow<accumulate_t<T>>*,        \
                                  accumulate_t<T>*, accumulate_t<T>*, const Stream&);                        \
  template int64_t mean_attention_workspace<T>(const MeanAttentionSizes&);                                   \
  template void mean_attention<T>(const MeanAttentionSizes&, const MeanAttentionInput<T>&, accumulate_t<T>*, \
                                  void*, const Stream&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cuda
