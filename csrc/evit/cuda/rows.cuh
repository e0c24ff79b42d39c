// Sums over the rows of a token tensor, column by column.
//
// A block takes a slice of the columns, `vectors` wide. There are kRowLanes row lanes, each of which sums
// every kRowLanes-th row; the lanes' sums are added by a binary tree whose shape depends on nothing, so that
// a sum has the same bits whatever the batch, the slices and the device. As many neighbouring threads as the
// slice has vectors read a row's part. They serve one lane, or the wide blocks of a large batch kUnroll
// lanes, which takes as many sums in registers, and a quarter of the threads.
#pragma once

#include "vectors.cuh"

namespace evit::cuda {

constexpr int kRowLanes = 32;
constexpr int kUnroll = 4;  // rows that a thread has in flight
// Rows of a long sequence that a block sums; their partial sums are added by another launch.
constexpr int kChunkRows = 512;
constexpr int kWideVectors = 48;  // of a slice whose threads serve kUnroll row lanes each, at most

// How the columns of [B, N, C] are shared out among blocks.
struct Slices {
  int vectors;  // in a slice
  int count;    // slices of a row
  int own;      // row lanes that a thread serves: 1 or kUnroll

  constexpr int threads() const { return kRowLanes / own * vectors; }
};

// Wide slices read longer pieces of a row and repeat less work; narrow ones give a small batch more blocks.
template <typename T>
Slices share_out_columns(int64_t parts, int64_t channels, const Stream& stream) {
  const int64_t vectors = (channels + kWidth<T> - 1) / kWidth<T>;
  const auto slices = [&](int width) {
    return Slices{width, static_cast<int>((vectors + width - 1) / width), 1};
  };
  const Slices wide = slices(16);
  return parts * wide.count >= 2 * multiprocessors(stream) ? wide : slices(8);
}

// The same, but the widest slices where they are enough for all multiprocessors.
template <typename T>
Slices share_out_columns_widely(int64_t parts, int64_t channels, const Stream& stream) {
  const int64_t vectors = (channels + kWidth<T> - 1) / kWidth<T>;
  const int count = static_cast<int>((vectors + kWideVectors - 1) / kWideVectors);
  if (parts * count < multiprocessors(stream)) return share_out_columns<T>(parts, channels, stream);
  // A multiple of four, for whole warps.
  return {static_cast<int>((vectors + 4 * count - 1) / (4 * count)) * 4, count, kUnroll};
}

// Where the columns' sums lie in shared memory: element w of all vectors, then element w + 1, so far apart
// that neither the writers of vectors nor the readers of columns meet in a bank.
template <int W>
struct Columns {
  static constexpr int kApart = kWarp / W;
  int stride;

  EVIT_HOST_DEVICE explicit constexpr Columns(int vectors)
      : stride(((vectors + kApart - 1) / kApart | 1) * kApart) {}
  EVIT_HOST_DEVICE constexpr int count() const { return W * stride; }
};

// Bytes of shared memory that sum_row_lanes or sum_own_row_lanes need.
template <typename T>
constexpr int64_t row_sum_bytes(const Slices& slices) {
  const int64_t parts = slices.own > 1 ? kRowLanes / slices.own : slices.threads() / kWarp;
  return SharedParts::bytes<accumulate_t<T>>(parts * Columns<kWidth<T>>(slices.vectors).count());
}

// Adds up `parts` parts of the sums, of which every thread that `writes` brings a vector, and calls
// write(column, total) for every column of the slice, `column` counting elements. Called by all threads.
template <int W, typename A, typename Write>
__device__ void sum_parts(const A (&sum)[W], bool writes, int part, int parts, int vector, int vectors,
                          A* scratch, const Write& write) {
  const Columns<W> columns(vectors);
  if (writes)
#pragma unroll
    for (int w = 0; w < W; ++w) scratch[part * columns.count() + w * columns.stride + vector] = sum[w];
  __syncthreads();
  for (int column = static_cast<int>(threadIdx.x); column < vectors * W;
       column += static_cast<int>(blockDim.x)) {
    A* of_parts = scratch + column % W * columns.stride + column / W;
    for (int step = 1; step < parts; step *= 2)
      for (int p = 0; p + step < parts; p += 2 * step)
        of_parts[p * columns.count()] += of_parts[(p + step) * columns.count()];
    write(column, of_parts[0]);
  }
}

// Adds up `sum` over the row lanes, of which a thread serves one, for slices of 8 or 16 vectors.
template <int W, typename A, typename Write>
__device__ void sum_row_lanes(A (&sum)[W], int vectors, A* scratch, const Write& write) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  for (int distance = vectors; distance < kWarp; distance *= 2)
#pragma unroll
    for (int w = 0; w < W; ++w) sum[w] += __shfl_xor_sync(kFullWarp, sum[w], distance);
  sum_parts(sum, lane < vectors, warp, static_cast<int>(blockDim.x) / kWarp, lane, vectors, scratch, write);
}

// The same where a thread has the sums of kUnroll neighbouring lanes.
template <int W, typename A, typename Write>
__device__ void sum_own_row_lanes(A (&sum)[kUnroll][W], int vectors, A* scratch, const Write& write) {
#pragma unroll
  for (int step = 1; step < kUnroll; step *= 2)
#pragma unroll
    for (int u = 0; u < kUnroll; u += 2 * step)
#pragma unroll
      for (int w = 0; w < W; ++w) sum[u][w] += sum[u + step][w];
  const int thread = static_cast<int>(threadIdx.x);
  sum_parts(sum[0], true, thread / vectors, kRowLanes / kUnroll, thread % vectors, vectors, scratch, write);
}

// rows[b] = the sum of partials[b, :], in order, rounded once. Rows are row_stride elements apart.
template <typename T>
__global__ void sum_partials_kernel(const accumulate_t<T>* partials, int64_t batch, int64_t chunks,
                                    int64_t channels, T* rows, int64_t row_stride) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= batch * channels) return;
  const int64_t b = i / channels, c = i % channels;
  accumulate_t<T> sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partials[(b * chunks + chunk) * channels + c];
  rows[b * row_stride + c] = narrow<T>(sum);
}

template <typename T>
void sum_partials(const char* what, const accumulate_t<T>* partials, int64_t batch, int64_t chunks,
                  int64_t channels, T* rows, int64_t row_stride, const Stream& stream) {
  constexpr int threads = 256;
  launch(what, sum_partials_kernel<T>, (batch * channels + threads - 1) / threads, threads, 0, stream,
         partials, batch, chunks, channels, rows, row_stride);
}

}  // namespace evit::cuda
