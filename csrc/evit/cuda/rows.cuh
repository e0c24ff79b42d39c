// Sums over the rows of a token tensor, column by column.
//
// A block takes a slice of the columns, `vectors` wide; its threads form kRowLanes row
// lanes of that many threads each, so that a row's part is read by neighbouring threads. A row lane sums
// every kRowLanes-th row; the lanes' sums are added by a binary tree whose shape depends on nothing, so that
// a sum has the same bits whatever the batch, the slices and the device.
#pragma once

#include "device.cuh"

namespace evit::cuda {

constexpr int kRowLanes = 32;
constexpr int kUnroll = 4;  // rows that a thread has in flight
// Rows of a long sequence that a block sums; their partial sums are added by another launch.
constexpr int kChunkRows = 512;

// How the columns of [B, N, C] are shared out among blocks.
struct Slices {
  int vectors;  // in a slice: a block has kRowLanes times as many threads
  int count;    // slices of a row

  int threads() const { return kRowLanes * vectors; }
};

// Wide slices read longer pieces of a row and repeat less work; narrow ones give a small batch more blocks.
template <typename T>
Slices share_out_columns(int64_t parts, int64_t channels, const Stream& stream) {
  const int64_t vectors = (channels + kWidth<T> - 1) / kWidth<T>;
  const auto slices = [&](int width) {
    return Slices{width, static_cast<int>((vectors + width - 1) / width)};
  };
  const Slices wide = slices(16);
  return parts * wide.count >= 2 * multiprocessors(stream) ? wide : slices(8);
}

// Bytes of shared memory that sum_row_lanes needs.
template <typename T>
int64_t row_sum_bytes(const Slices& slices) {
  const int64_t warps = slices.threads() / kWarp;
  return SharedParts::bytes<accumulate_t<T>>(warps * slices.vectors * kWidth<T>);
}

// Adds up `sum` over the row lanes and calls write(column, total) for every column of the slice, `column`
// counting elements. Called by all threads of the block.
template <int W, typename A, typename Write>
__device__ void sum_row_lanes(A (&sum)[W], int vectors, A* scratch, const Write& write) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp, width = vectors * W;
  for (int distance = vectors; distance < kWarp; distance *= 2)
#pragma unroll
    for (int w = 0; w < W; ++w) sum[w] += __shfl_xor_sync(kFullWarp, sum[w], distance);
  if (lane < vectors)
#pragma unroll
    for (int w = 0; w < W; ++w) scratch[warp * width + lane * W + w] = sum[w];
  __syncthreads();
  for (int column = thread; column < width; column += static_cast<int>(blockDim.x)) {
    A* part = scratch + column;
    for (int step = 1; step < warps; step *= 2)
      for (int w = 0; w + step < warps; w += 2 * step) part[w * width] += part[(w + step) * width];
    write(column, part[0]);
  }
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
