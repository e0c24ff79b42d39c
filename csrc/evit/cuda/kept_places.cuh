// Where the rows of a sequence with every patch stand among the kept ones.
#pragma once

#include "device.cuh"

namespace evit::cuda {

// Up to so many kept patches are looked through for those of a block; among more, each row is searched for.
constexpr int kLookThrough = 1024;

// The place of `patch` among kept[low] ... kept[high - 1], which ascend, or -1.
__device__ inline int find_kept(const int64_t* kept, int low, int high, int patch) {
  const int end = high;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (kept[middle] < patch)
      low = middle + 1;
    else
      high = middle;
  }
  return low < end && kept[low] == patch ? low : -1;
}

// For each row first ... first + count - 1 of a sequence, which may end before, the i for which it is patch
// kept[i], else -1: to place[0] ... place[count - 1], complete after a barrier. Whatever kept holds, i is in
// [0, keep). Called by all threads of the block, of which there are `threads`.
__device__ inline void find_places(const int64_t* kept, int keep, int patches, int prefix, int first,
                                   int count, int threads, int* place) {
  const int thread = static_cast<int>(threadIdx.x), patch = first - prefix;
  // Of `keep` patches out of `patches`, the i-th has a number between i and i + patches - keep.
  const int low = max(0, patch - (patches - keep)), high = min(keep, patch + count);
  const bool look_through = high - low <= kLookThrough;
  for (int i = thread; i < count; i += threads)
    place[i] = look_through ? -1 : find_kept(kept, low, high, patch + i);
  if (!look_through) return;
  __syncthreads();
  for (int i = low + thread; i < high; i += threads) {
    const int64_t value = kept[i];
    if (value >= patch && value < patch + count) place[value - patch] = i;
  }
}

}  // namespace evit::cuda
