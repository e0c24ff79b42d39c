#include "mean_attention.cuh"

namespace evit::cuda {
namespace {

constexpr char kOperator[] = "mean_attention_backward";

// The sums that a lane has of 32 rows' gradients, a chunk of channels: in 16 bits as tensor cores make them,
// of which [8 i + c] are the rows from 16 i on and the channels from 8 c on; else [2 r + v] are those of
// vector lane % 4 + 4 v of row 8 r + lane / 4.
template <typename T>
using RowGradients = accumulate_t<T>[sizeof(T) == 2 ? 16 : 8][sizeof(T) == 2 ? 4 : kWidth<T>];

// Adds to them the columns, whose vectors are a tile, times the gradients of the logits.
template <typename T>
__device__ void add_weighted(const TileProducts<accumulate_t<T>>& weights, const T* columns, int channels,
                             RowGradients<T>& sum) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int step = 0; step < kTileColumns / 16; ++step) {
      // As results, a lane holds just those weights that it has to bring as factors.
      uint32_t a[kTileRows / 16][4];
#pragma unroll
      for (int i = 0; i < kTileRows / 16; ++i)
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const float (&two)[4] = weights[i][2 * step + x / 2];
          a[i][x] = narrow_pair<T>(two[x % 2 * 2], two[x % 2 * 2 + 1]);
        }
#pragma unroll
      for (int c = 0; c < kChunkVectors; c += 2) {
        if (c * kWidth<T> >= channels) break;
        uint32_t b[4];  // of channels 8 c onwards, eight columns and the next eight; of the next channels
        warp_load_matrices<true>(
            b, shared_address(columns + tile_place<T>(16 * step + lane % 16, c + lane / 16)));
#pragma unroll
        for (int i = 0; i < kTileRows / 16; ++i) {
          warp_multiply_add<T>(sum[8 * i + c], a[i], b[0], b[1]);
          warp_multiply_add<T>(sum[8 * i + c + 1], a[i], b[2], b[3]);
        }
      }
    }
  } else {
    using A = accumulate_t<T>;
    constexpr int W = kWidth<T>;
#pragma unroll 1
    for (int other = 0; other < 4; ++other)  // lanes that have columns of this lane's rows
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        A weight[kLaneRows];
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r)
          weight[r] = __shfl_sync(kFullWarp, weights[r / 2][j / 2][r % 2 * 2 + j % 2], lane / 4 * 4 + other);
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          A column[W];
          widen_vector(load_shared(columns + tile_place<T>(j / 2 * 8 + other * 2 + j % 2, lane % 4 + 4 * v)),
                       column);
#pragma unroll
          for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
            for (int w = 0; w < W; ++w)
              sum[2 * r + v][w] = multiply_add(weight[r], column[w], sum[2 * r + v][w]);
        }
      }
  }
}

// Writes them, times `factor`, to a chunk of rows `out` of `channels` each, of which `left` are there.
template <typename T>
__device__ void store_rows(const RowGradients<T>& sum, accumulate_t<T> factor, bool vectors, T* tile, T* out,
                           int channels, int rows_left, int left) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const auto put = [&](int row, int vector, const Vector<T>& value) {
    const int c = vector * kWidth<T>;
    if (row >= rows_left || c >= left) return;
    T* to = out + static_cast<int64_t>(row) * channels + c;
    if (vectors)
      store<true>(to, value, kWidth<T>);
    else
      store<false>(to, value, left - c);
  };
  if constexpr (sizeof(T) == 2) {
    // Through shared memory, so that 16 bytes can be written at a time.
    __syncwarp();  // nobody needs the rows
#pragma unroll
    for (int x = 0; x < 16; ++x)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_shared_pair(tile + tile_place<T>(x / 8 * 16 + half * 8 + lane / 4, x % 8) + lane % 4 * 2,
                          narrow_pair<T>(sum[x][2 * half] * factor, sum[x][2 * half + 1] * factor));
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < kTileRows * kChunkVectors; i += kWarp)
      put(i / kChunkVectors, i % kChunkVectors,
          load_shared(tile + tile_place<T>(i / kChunkVectors, i % kChunkVectors)));
  } else {
#pragma unroll
    for (int x = 0; x < 2 * kLaneRows; ++x) {
      accumulate_t<T> value[kWidth<T>];
#pragma unroll
      for (int w = 0; w < kWidth<T>; ++w) value[w] = sum[x][w] * factor;
      put(x / 2 * 8 + lane / 4, lane % 4 + x % 2 * 4, narrow_vector<T>(value));
    }
  }
}

// d logit[m, n] = scale / (H M) * p[m, n] * (grad_n - mean_m), whose products with keys are the gradients of
// queries, and with queries those of keys. Rows are either; a block has a chunk of their channels.
//
// In 16 bits the gradients of logits are rounded. They may be as small as float16 has no numbers for, so they
// are divided by the largest gradient, and multiplied by 2^14: a difference of two is at most 2^15.
template <typename T, bool kRowsAreQueries>
__global__ void __launch_bounds__(kTileWarps* kWarp, 2)
    mean_attention_backward_kernel(TileJob<T> job, QueryStatistics<accumulate_t<T>> statistics,
                                   Tokens<accumulate_t<T>> grads, accumulate_t<T> factor, int slices,
                                   bool vectors, T* out) {
  using A = accumulate_t<T>;
  const int slice = static_cast<int>(blockIdx.x) % slices;
  const TileWarp<T> warp(job, blockIdx.x / slices);
  A enlarged = 1;
  if constexpr (sizeof(T) == 2) {
    const float largest = max(statistics.largest[warp.b], 0x1p-100f);
    enlarged = 0x1p14f / largest;
    factor *= largest * 0x1p-14f;
  }
  // What a query or a key has of the gradients.
  struct Terms {
    SoftmaxRow<A> query;
    A mean_or_grad;
  };
  const auto terms_of = [&](bool of_query, int count, int i) -> Terms {
    if (!of_query) return {{}, multiply(*grads.row(warp.b, i), enlarged)};
    const int64_t at = warp.head * count + i;
    return {statistics.rows[at], multiply(statistics.means[at], enlarged)};
  };
  Terms row[kLaneRows];
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r)
    row[r] = terms_of(kRowsAreQueries, job.rows.count, min(warp.row_of(r), job.rows.count - 1));
  RowGradients<T> sum = {};
  const int left = job.channels - slice * kChunk<T>;
  for_each_tile(job, warp, slice, [&](TileProducts<A>& s, int first, const T* columns) {
    for_lane_columns(first, job.columns.count, [&](int j, int i, bool there) {
      const Terms column = terms_of(!kRowsAreQueries, job.columns.count, there ? i : 0);
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        A& value = s[r / 2][j / 2][r % 2 * 2 + j % 2];
        const Terms &query = kRowsAreQueries ? row[r] : column, &key = kRowsAreQueries ? column : row[r];
        const A power = power_of_two<T>(multiply(value, job.factor) - query.query.shift);
        const A gradient =
            multiply(multiply(power, query.query.inverse), add(key.mean_or_grad, -query.mean_or_grad));
        value = there ? gradient : A{0};
      }
    });
    add_weighted<T>(s, columns, left, sum);
  });
  if (warp.row >= job.rows.count) return;
  store_rows<T>(sum, factor, vectors, warp.own_tile,
                out + (warp.head * job.rows.count + warp.row) * job.channels + slice * kChunk<T>,
                job.channels, job.rows.count - warp.row, left);
}

template <typename T, bool kRowsAreQueries>
void gradients_of_rows(const MeanAttentionSizes& sizes, TileJob<T> job,
                       const QueryStatistics<accumulate_t<T>>& statistics,
                       const Tokens<accumulate_t<T>>& grads, T* out, const Stream& stream) {
  using A = accumulate_t<T>;
  const int64_t slices = (sizes.channels + kChunk<T> - 1) / kChunk<T>;
  const TileLaunch tiles = share_out_rows(job, sizes.batch * sizes.heads, slices, stream);
  const A factor =
      static_cast<A>(sizes.scale) / (static_cast<A>(sizes.heads) * static_cast<A>(sizes.queries));
  launch(kOperator, mean_attention_backward_kernel<T, kRowsAreQueries>, tiles.blocks * slices, tiles.threads,
         tiles.shared_bytes, stream, job, statistics, grads, factor, static_cast<int>(slices),
         aligned(out, sizes.channels), out);
}

}  // namespace

template <typename T>
int64_t mean_attention_backward_workspace(const MeanAttentionSizes& sizes) {
  return (3 * sizes.batch * sizes.heads * sizes.queries + sizes.batch) *
         static_cast<int64_t>(sizeof(accumulate_t<T>));
}

template <typename T>
void mean_attention_backward(const MeanAttentionSizes& sizes, const MeanAttentionInput<T>& input,
                             const Tokens<accumulate_t<T>>& grad_scores, T* grad_q, T* grad_k,
                             void* workspace, const Stream& stream) {
  using A = accumulate_t<T>;
  const DeviceGuard guard(stream.device, kOperator);
  const int64_t queries = sizes.batch * sizes.heads * sizes.queries;
  auto* rows = static_cast<SoftmaxRow<A>*>(workspace);
  auto* means = reinterpret_cast<A*>(rows + queries);
  const QueryStatistics<A> statistics = {rows, means, means + queries};
  const TileJob<T> job = make_job(sizes, input, kOperator);
  query_statistics<T, true>(kOperator, job, sizes.batch, grad_scores, statistics, stream);
  gradients_of_rows<T, true>(sizes, job, statistics, grad_scores, grad_q, stream);
  gradients_of_rows<T, false>(sizes, job.turned(), statistics, grad_scores, grad_k, stream);
}

#define EVIT_INSTANTIATE(T)                                                                         \
  template int64_t mean_attention_backward_workspace<T>(const MeanAttentionSizes&);                 \
  template void mean_attention_backward<T>(const MeanAttentionSizes&, const MeanAttentionInput<T>&, \
                                           const Tokens<accumulate_t<T>>&, T*, T*, void*, const Stream&);
EVIT_FOR_EACH_TYPE(EVIT_INSTANTIATE)
#undef EVIT_INSTANTIATE

}  // namespace evit::cuda
