// What the kernels of mean_attention share: the products of queries with keys, tile by tile, and the sums of
// probabilities, which attention_with_scores needs as well.
//
// A warp has 32 rows, and goes over all columns, 32 at a time. Rows are queries and columns keys, or the
// other way round: either way it is over columns that a warp sums, so that nothing is added up between
// blocks. Of the 32 x 32 products a lane has those that a matrix of tensor cores would give it
// (tensor_cores.cuh), for every element type: s[i][j][2 h + c] is row 16 i + 8 h + lane / 4, column 8 j +
// lane % 4 * 2 + c.
#pragma once

#include <cmath>

#include "../mean_attention.h"
#include "tensor_cores.cuh"

namespace evit::cuda {

constexpr double kLog2E = 1.4426950408889634;
constexpr int kTileRows = 32;     // of a warp
constexpr int kTileColumns = 32;  // at once
constexpr int kTileWarps = 4;     // of a block, at most
constexpr int kLaneRows = kTileRows / 8, kLaneColumns = kTileColumns / 4;

// Rows pass through shared memory in chunks of 128 bytes, which are all banks.
constexpr int kChunkVectors = 8;
template <typename T>
constexpr int kChunk = kChunkVectors * kWidth<T>;  // channels

// Where a vector of a row lies in a tile: the rows exchange their vectors, so that threads read without
// conflicts four neighbouring vectors of two rows, and one vector of eight rows.
template <typename T>
__device__ inline int tile_place(int row, int vector) {
  return (row * kChunkVectors + (vector ^ (row % 2 * 4 + row / 2 % 4))) * kWidth<T>;
}

// Queries or keys, [B, H, count, D].
template <typename T>
struct TileSide {
  const T* data;
  int64_t stride_b, stride_h, stride;
  int count;
};

template <typename T>
struct TileJob {
  TileSide<T> rows, columns;
  int heads, channels;
  int blocks;              // that share the rows of a head
  bool aligned;            // whether vectors can be copied as such
  accumulate_t<T> factor;  // e^(dot * scale) = 2^(dot * factor)

  // The same with rows and columns exchanged.
  TileJob turned() const {
    TileJob job = *this;
    job.rows = columns;
    job.columns = rows;
    return job;
  }
};

template <typename A>
using TileProducts = A[kTileRows / 16][kTileColumns / 8][4];

// 2^x. In 16 bits, to two units in the last place of float.
template <typename T>
__device__ accumulate_t<T> power_of_two(accumulate_t<T> x) {
  if constexpr (sizeof(T) == 2)
    return fast_exp2(x);
  else
    return exp2(x);
}

// Rows `first` to `first + rows` of a head, a chunk of their channels from `start` on, zeros where there are
// none.
template <typename T>
__device__ void copy_chunk(const TileSide<T>& side, const T* head, bool vectors, int channels, int start,
                           int first, int rows, T* tile) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * kChunkVectors; i += static_cast<int>(blockDim.x)) {
    const int row = i / kChunkVectors, vector = i % kChunkVectors, c = start + vector * kWidth<T>;
    const bool there = first + row < side.count && c < channels;
    const T* from = head + (there ? (first + row) * side.stride + c : 0);
    T* to = tile + tile_place<T>(row, vector);
    if (vectors) {
      copy_vector_to_shared(to, from, there);
    } else {
      const Vector<T> value = there ? load<false>(from, channels - c) : Vector<T>{};
      memcpy(static_cast<void*>(to), &value, sizeof value);
    }
  }
}

// Adds to the products those of a chunk, of which `channels` are not zero.
template <typename T>
__device__ void add_products(const T* rows, const T* columns, int channels,
                             TileProducts<accumulate_t<T>>& s) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  if constexpr (sizeof(T) == 2) {
    // Which channels meet in a product is left open by the sum: every lane takes eight neighbouring ones of
    // rows and columns alike, and nothing is exchanged.
#pragma unroll
    for (int v = 0; v < kChunkVectors; v += 4) {
      if (v * kWidth<T> >= channels) break;
      Vector<T> row[kLaneRows];
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r)
        row[r] = load_shared(rows + tile_place<T>(8 * r + lane / 4, v + lane % 4));
#pragma unroll
      for (int j = 0; j < kTileColumns / 8; ++j) {
        const Vector<T> column = load_shared(columns + tile_place<T>(8 * j + lane / 4, v + lane % 4));
#pragma unroll
        for (int pair = 0; pair < 4; pair += 2)
#pragma unroll
          for (int i = 0; i < kTileRows / 16; ++i) {
            const Vector<T>&upper = row[2 * i], &lower = row[2 * i + 1];
            const uint32_t a[4] = {upper.word[pair], lower.word[pair], upper.word[pair + 1],
                                   lower.word[pair + 1]};
            warp_multiply_add<T>(s[i][j], a, column.word[pair], column.word[pair + 1]);
          }
      }
    }
  } else {
    using A = accumulate_t<T>;
    constexpr int W = kWidth<T>;
#pragma unroll 1
    for (int v = 0; v * W < channels && v < kChunkVectors; ++v) {
      A row[kLaneRows][W];
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r)
        widen_vector(load_shared(rows + tile_place<T>(8 * r + lane / 4, v)), row[r]);
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        A column[W];
        widen_vector(load_shared(columns + tile_place<T>(j / 2 * 8 + lane % 4 * 2 + j % 2, v)), column);
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) {
          A& dot = s[r / 2][j / 2][r % 2 * 2 + j % 2];
#pragma unroll
          for (int w = 0; w < W; ++w) dot = multiply_add(row[r][w], column[w], dot);
        }
      }
    }
  }
}

// Of a job, the part of one warp.
template <typename T>
struct TileWarp {
  int64_t head;        // of all sequences
  int64_t b;           // sequence
  int h;               // head of it
  int block_row, row;  // first row of the block, and of the warp
  T* own_tile;         // of the warp's rows, free once all columns are through

  // `block` counts the blocks of all heads.
  __device__ TileWarp(const TileJob<T>& job, int64_t block) {
    head = block / job.blocks;
    b = head / job.heads;
    h = static_cast<int>(head % job.heads);
    const int warp = static_cast<int>(threadIdx.x / kWarp);
    block_row = static_cast<int>(block % job.blocks) * static_cast<int>(blockDim.x);  // a lane for each row
    row = block_row + warp * kTileRows;
    own_tile = static_cast<T*>(shared_memory()) + warp * kTileRows * kChunk<T>;
  }

  // The row that is the lane's row r of the products.
  __device__ int row_of(int r) const { return row + 8 * r + static_cast<int>(threadIdx.x % kWarp / 4); }
};

static_assert(kTileRows == kWarp);

// Tiles of rows that a block holds: all chunks if they are few; else one, and the next one on its way.
EVIT_HOST_DEVICE inline int row_tiles(int chunks) { return chunks < 2 ? chunks : 2; }

// Calls take(products, first column, its tile) for all columns of the warp's rows, in order. The tile holds
// chunk `last_chunk` of the columns' channels. Called by all threads of a block; `take` only by warps that
// have rows.
template <typename T, typename Take>
__device__ void for_each_tile(const TileJob<T>& job, const TileWarp<T>& warp, int last_chunk,
                              const Take& take) {
  using A = accumulate_t<T>;
  const int chunks = (job.channels + kChunk<T> - 1) / kChunk<T>, slots = row_tiles(chunks);
  const int rows = static_cast<int>(blockDim.x);
  T* shared = static_cast<T*>(shared_memory());
  const auto rows_at = [&](int t) { return t % slots * rows * kChunk<T>; };
  const auto columns_at = [&](int t) {
    return shared + slots * rows * kChunk<T> + t % 2 * kTileColumns * kChunk<T>;
  };
  const auto chunk_of = [&](int t) { return (last_chunk + 1 + t) % chunks; };
  const T* row_head = job.rows.data + warp.b * job.rows.stride_b + warp.h * job.rows.stride_h;
  const T* column_head = job.columns.data + warp.b * job.columns.stride_b + warp.h * job.columns.stride_h;
  const auto copy = [&](int t) {
    const int start = chunk_of(t) * kChunk<T>;
    if (t < slots || chunks > slots)
      copy_chunk(job.rows, row_head, job.aligned, job.channels, start, warp.block_row, rows,
                 shared + rows_at(t));
    copy_chunk(job.columns, column_head, job.aligned, job.channels, start, t / chunks * kTileColumns,
               kTileColumns, columns_at(t));
  };
  const int steps = (job.columns.count + kTileColumns - 1) / kTileColumns * chunks;
  TileProducts<A> s;
  copy(0);
#pragma unroll 1
  for (int t = 0; t < steps; ++t) {
    copies_arrived();
    __syncthreads();  // this tile is there, and nobody needs the one before
    if (t + 1 < steps) copy(t + 1);
    if (warp.row >= job.rows.count) continue;
    if (t % chunks == 0)
#pragma unroll
      for (int i = 0; i < kTileRows / 16; ++i)
#pragma unroll
        for (int j = 0; j < kTileColumns / 8; ++j)
#pragma unroll
          for (int x = 0; x < 4; ++x) s[i][j][x] = 0;
    add_products(warp.own_tile + rows_at(t), columns_at(t), job.channels - chunk_of(t) * kChunk<T>, s);
    if (t % chunks == chunks - 1) take(s, t / chunks * kTileColumns, columns_at(t));
  }
}

// What a lane has of a tile's columns: body(number of its column, column, whether there is one).
template <typename Body>
__device__ void for_lane_columns(int first, int count, const Body& body) {
#pragma unroll
  for (int j = 0; j < kLaneColumns; ++j) {
    const int n = first + j / 2 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + j % 2;
    body(j, n, n < count);
  }
}

// The sum over the four lanes that share a row, to all of them.
template <typename A>
__device__ A row_sum(A value) {
  for (int distance = 1; distance < 4; distance *= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

template <typename A>
__device__ A row_max(A value) {
  for (int distance = 1; distance < 4; distance *= 2)
    value = max(value, __shfl_xor_sync(kFullWarp, value, distance));
  return value;
}

// Blocks, threads and bytes of shared memory of a launch.
struct TileLaunch {
  int64_t blocks;  // of all heads
  int threads;
  int64_t shared_bytes;
};

// Shares out the rows of `heads` heads, `repeats` times, and tells the job.
template <typename T>
TileLaunch share_out_rows(TileJob<T>& job, int64_t heads, int64_t repeats, const Stream& stream) {
  const Shares shares =
      share_out_warps((job.rows.count + kTileRows - 1) / kTileRows, kTileWarps, heads * repeats, stream);
  job.blocks = shares.blocks;
  const int chunks = (job.channels + kChunk<T> - 1) / kChunk<T>;
  const int rows = row_tiles(chunks) * shares.warps * kTileRows + 2 * kTileColumns;
  return {heads * job.blocks, shares.warps * kWarp,
          static_cast<int64_t>(rows) * kChunk<T> * static_cast<int64_t>(sizeof(T))};
}

// Checks what the kernels count in 32 bits, and says where queries and keys are; rows are the queries.
template <typename T>
TileJob<T> make_job(const MeanAttentionSizes& sizes, const MeanAttentionInput<T>& input, const char* what) {
  check_count(sizes.queries, "queries", what);
  check_count(sizes.tokens, "tokens", what);
  check_count(sizes.heads, "heads", what);
  check_count(sizes.channels, "channels a head", what);
  return {{input.q, input.q_stride_b, input.q_stride_h, input.q_stride_m, static_cast<int>(sizes.queries)},
          {input.k, input.k_stride_b, input.k_stride_h, input.k_stride_n, static_cast<int>(sizes.tokens)},
          static_cast<int>(sizes.heads),
          static_cast<int>(sizes.channels),
          0,
          aligned(input.q, input.q_stride_b, input.q_stride_h, input.q_stride_m, sizes.channels) &&
              aligned(input.k, input.k_stride_b, input.k_stride_h, input.k_stride_n),
          static_cast<accumulate_t<T>>(sizes.scale * kLog2E)};
}

// What turns exponents of a query into probabilities: p = 2^(exponent - shift) * inverse. The logarithm of
// the sum would be one number instead of two, but where logits are large, a float has no place for it.
template <typename A>
struct SoftmaxRow {
  A shift;    // the largest exponent
  A inverse;  // of the sum of powers
};

// Of every query. The gradients of scores [B, N] are given for the latter two.
template <typename A>
struct QueryStatistics {
  SoftmaxRow<A>* rows;   // [B, H, M]
  A* means = nullptr;    // [B, H, M], sum_n p_n grad_n
  A* largest = nullptr;  // [B], max_n |grad_n|
};

// Rows are queries. Every lane goes on with the largest of its own columns; they agree at the end.
template <typename T, bool kWithGradients>
__global__ void __launch_bounds__(kTileWarps* kWarp, sizeof(T) == 8 ? 2 : 4)
    query_statistics_kernel(TileJob<T> job, Tokens<accumulate_t<T>> grads,
                            QueryStatistics<accumulate_t<T>> statistics) {
  using A = accumulate_t<T>;
  constexpr A none = static_cast<A>(-INFINITY);
  // What is subtracted from exponents: where all are -Inf, their powers are 0.
  const auto shift_of = [](A exponent) { return exponent == none ? A{0} : exponent; };
  const TileWarp<T> warp(job, blockIdx.x);
  A largest[kLaneRows], sum[kLaneRows] = {}, weighted[kLaneRows] = {}, largest_grad = 0;
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) largest[r] = none;
  for_each_tile(job, warp, 0, [&](TileProducts<A>& s, int first, const T*) {
    for_lane_columns(first, job.columns.count, [&](int j, int, bool there) {
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        A& exponent = s[r / 2][j / 2][r % 2 * 2 + j % 2];
        exponent = there ? multiply(exponent, job.factor) : none;
      }
    });
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const A before = largest[r];
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) largest[r] = max(largest[r], s[r / 2][j / 2][r % 2 * 2 + j % 2]);
      const A shift = shift_of(largest[r]);
      const A scaling = before == none ? A{0} : power_of_two<T>(before - shift);
      A part = 0;
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        A& p = s[r / 2][j / 2][r % 2 * 2 + j % 2];
        p = power_of_two<T>(p - shift);
        part = add(part, p);
      }
      sum[r] = multiply_add(sum[r], scaling, part);
      weighted[r] = multiply(weighted[r], scaling);
    }
    if constexpr (kWithGradients)
      for_lane_columns(first, job.columns.count, [&](int j, int n, bool there) {
        const A grad = there ? *grads.row(warp.b, n) : A{0};
        largest_grad = max(largest_grad, abs(grad));
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r)
          weighted[r] = multiply_add(s[r / 2][j / 2][r % 2 * 2 + j % 2], grad, weighted[r]);
      });
  });
  largest_grad = row_max(largest_grad);
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) {
    const A shift = shift_of(row_max(largest[r]));
    const A scaling = largest[r] == none ? A{0} : power_of_two<T>(largest[r] - shift);
    const A all = row_sum(multiply(sum[r], scaling));
    const A all_weighted = kWithGradients ? row_sum(multiply(weighted[r], scaling)) : A{0};
    const int m = warp.row_of(r);
    if (threadIdx.x % 4 != 0 || m >= job.rows.count) continue;
    const int64_t at = warp.head * job.rows.count + m;
    statistics.rows[at] = {shift, 1 / all};
    if (kWithGradients) statistics.means[at] = all_weighted / all;
    if (kWithGradients && m == 0 && warp.h == 0) statistics.largest[warp.b] = largest_grad;
  }
}

template <typename T, bool kWithGradients>
void query_statistics(const char* what, TileJob<T> job, int64_t batch, const Tokens<accumulate_t<T>>& grads,
                      const QueryStatistics<accumulate_t<T>>& statistics, const Stream& stream) {
  const TileLaunch tiles = share_out_rows(job, batch * job.heads, 1, stream);
  launch(what, query_statistics_kernel<T, kWithGradients>, tiles.blocks, tiles.threads, tiles.shared_bytes,
         stream, job, grads, statistics);
}

// scores[b, n] = mean_h mean_m of the probabilities that rows [B, H, M] make of the exponents, which are the
// products in powers of two, with log2(e) times the bias of the key if there is one. `sums` [B, H, N] is for
// the sums over queries. Two launches.
template <typename T>
void mean_from_rows(const MeanAttentionSizes& sizes, const MeanAttentionInput<T>& input,
                    const Tokens<accumulate_t<T>>& key_bias, const SoftmaxRow<accumulate_t<T>>* rows,
                    accumulate_t<T>* sums, accumulate_t<T>* scores, const Stream& stream);

}  // namespace evit::cuda
