// The K best of long rows of scores in a small batch: the selection of select.cuh by several blocks a row,
// one for each chunk of it, in five launches. What they find out goes through device memory; all of it are
// whole numbers.
#pragma once

#include "../reorganize_tokens.h"
#include "select.cuh"

namespace evit::cuda {

constexpr int kSelectChunk = 4096;
constexpr int kKeyBytes = 4;  // of scores in float32; others have one block

// A block takes about 0.2 µs for a thousand scores and byte, a launch takes as long as some ten thousand. An
// estimate, not measured.
constexpr int64_t kChunkedBatch = 4, kChunkedPatches = 16 * 1024;
template <typename S>
bool selects_in_chunks(const ReorganizeSizes& sizes) {
  return sizeof(S) == kKeyBytes && sizes.batch <= kChunkedBatch && sizes.patches() >= kChunkedPatches;
}

// What is known of the wanted key once its first bytes are.
struct FoundBytes {
  unsigned prefix;
  int wanted;  // so many of the keys that begin with it
};

struct ChunkedSelection {
  FoundBytes* found;     // [4, B]: before the byte
  unsigned* histograms;  // [4, B, chunks, 256]: of the byte, where the bytes before agree
  int batch, chunks;

  static int chunks_of(const ReorganizeSizes& sizes) {
    return static_cast<int>((sizes.patches() + kSelectChunk - 1) / kSelectChunk);
  }
  static int64_t bytes(const ReorganizeSizes& sizes) {
    const int64_t rows = kKeyBytes * sizes.batch;
    return SharedParts::bytes<FoundBytes>(rows) + SharedParts::bytes<unsigned>(rows * chunks_of(sizes) * 256);
  }
  ChunkedSelection(void* memory, const ReorganizeSizes& sizes)
      : found(static_cast<FoundBytes*>(memory)),
        histograms(reinterpret_cast<unsigned*>(static_cast<unsigned char*>(memory) +
                                               SharedParts::bytes<FoundBytes>(kKeyBytes * sizes.batch))),
        batch(static_cast<int>(sizes.batch)),
        chunks(chunks_of(sizes)) {}

  __device__ unsigned* histogram(int byte, int64_t b, int chunk) const {
    return histograms + ((byte * batch + b) * chunks + chunk) * 256;
  }
};

__device__ inline int shift_of_byte(int byte) { return 8 * (kKeyBytes - 1 - byte); }

// What is known after the byte, from the histograms of all chunks. Called by all threads of the block.
__device__ inline FoundBytes after_byte(SelectScratch& scratch, const ChunkedSelection& selection, int64_t b,
                                        int byte, FoundBytes before) {
  for (unsigned digit = threadIdx.x; digit < 256; digit += blockDim.x) {
    unsigned sum = 0;
    for (int chunk = 0; chunk < selection.chunks; ++chunk) sum += selection.histogram(byte, b, chunk)[digit];
    scratch.histogram[slot(digit)] = sum;
  }
  __syncthreads();
  find_digit(scratch, before.wanted);
  __syncthreads();
  return {before.prefix | static_cast<unsigned>(scratch.digit) << shift_of_byte(byte), scratch.wanted};
}

// Finds out the bytes before this one, and makes the histogram of a chunk.
template <typename S>
__global__ void __launch_bounds__(1024, 1)
    chunk_histogram_kernel(ReorganizeSizes sizes, Tokens<S> scores, ChunkedSelection selection, int byte) {
  const int64_t b = blockIdx.x / selection.chunks;
  const int chunk = static_cast<int>(blockIdx.x % selection.chunks), first = chunk * kSelectChunk;
  const int last = min(first + kSelectChunk, static_cast<int>(sizes.patches()));
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  SharedParts parts;
  SelectScratch& scratch = *parts.take<SelectScratch>(1);
  FoundBytes found = {0, static_cast<int>(sizes.keep)};
  if (byte > 0) {
    if (byte > 1) found = selection.found[(byte - 1) * selection.batch + b];
    found = after_byte(scratch, selection, b, byte - 1, found);
    if (chunk == 0 && thread == 0) selection.found[byte * selection.batch + b] = found;
  }
  const int shift = shift_of_byte(byte);
  const unsigned mask = byte == 0 ? 0 : ~0u << (shift + 8);
  for (int digit = thread; digit < 256; digit += threads) scratch.histogram[digit] = 0;
  __syncthreads();
  for (int i = first + thread; i < last; i += threads) {
    const unsigned key = order_key(*scores.row(b, i));
    if ((key & mask) == found.prefix) atomicAdd(&scratch.histogram[slot(key >> shift & 0xff)], 1u);
  }
  __syncthreads();
  unsigned* histogram = selection.histogram(byte, b, chunk);
  for (int digit = thread; digit < 256; digit += threads)
    histogram[digit] = scratch.histogram[slot(static_cast<unsigned>(digit))];
}

// What select_kernel writes, of a chunk. How many are selected in the chunks before is in the histograms.
template <typename S, typename A>
__global__ void __launch_bounds__(1024, 1)
    chunk_place_kernel(ReorganizeSizes sizes, Tokens<S> scores, ChunkedSelection selection, int64_t* kept,
                       int* place, A* weights) {
  const int64_t b = blockIdx.x / selection.chunks;
  const int chunk = static_cast<int>(blockIdx.x % selection.chunks), first = chunk * kSelectChunk;
  const int patches = static_cast<int>(sizes.patches()), keep = static_cast<int>(sizes.keep);
  SharedParts parts;
  SelectScratch& scratch = *parts.take<SelectScratch>(1);
  int* before = parts.take<int>(2);  // above the threshold, equal to it
  constexpr int last_byte = kKeyBytes - 1;
  const FoundBytes found =
      after_byte(scratch, selection, b, last_byte, selection.found[last_byte * selection.batch + b]);
  if (threadIdx.x < 2) before[threadIdx.x] = 0;
  __syncthreads();
  int above = 0, ties = 0;
  for (int byte = 0; byte < kKeyBytes; ++byte) {
    const int wanted = static_cast<int>(found.prefix >> shift_of_byte(byte) & 0xff);
    // The histograms of the chunks before lie one after the other.
    const unsigned* histogram = selection.histogram(byte, b, 0);
    for (int i = static_cast<int>(threadIdx.x); i < chunk * 256; i += static_cast<int>(blockDim.x)) {
      if (i % 256 > wanted) above += static_cast<int>(histogram[i]);
      if (i % 256 == wanted && byte == last_byte) ties += static_cast<int>(histogram[i]);
    }
  }
  atomicAdd(&before[0], above);
  atomicAdd(&before[1], ties);
  __syncthreads();
  const auto score_at = [&](int i) { return *scores.row(b, first + i); };
  const auto key_at = [&](int i) { return order_key(score_at(i)); };
  const Threshold<unsigned> threshold = {found.prefix, found.wanted};
  place_selected(
      scratch, min(kSelectChunk, patches - first), threshold, key_at,
      [&](int i, bool selected, int position) {
        if (selected) kept[b * keep + position] = first + i;
        place[b * patches + first + i] = selected ? position : -1;
        weights[b * patches + first + i] = static_cast<A>(score_at(i));
      },
      before[0], before[1]);
}

// As select_kernel does it, for scores in float32.
template <typename S, typename A>
void select_in_chunks(const char* what, const ReorganizeSizes& sizes, const Tokens<S>& scores,
                      const ChunkedSelection& selection, int64_t* kept, int* place, A* weights,
                      const Stream& stream) {
  constexpr int threads = 1024;
  constexpr int64_t shared = SharedParts::bytes<SelectScratch>(1) + SharedParts::bytes<int>(2);
  const int64_t blocks = sizes.batch * selection.chunks;
  for (int byte = 0; byte < kKeyBytes; ++byte)
    launch(what, chunk_histogram_kernel<S>, blocks, threads, shared, stream, sizes, scores, selection, byte);
  launch(what, chunk_place_kernel<S, A>, blocks, threads, shared, stream, sizes, scores, selection, kept,
         place, weights);
}

}  // namespace evit::cuda
