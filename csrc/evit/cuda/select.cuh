// The K best of a row of scores, by the threads of one block: radix selection, linear in N, no sort.
#pragma once

#include "../order_key.h"
#include "device.cuh"

namespace evit::cuda {

// Shared memory of one selection.
struct SelectScratch {
  unsigned histogram[256];  // of the byte d at slot(d)
  int counts[kWarp];        // of each warp
  int digit;
  int wanted;
  bool whole;
};

// Neighbouring lanes look after 8 digits each; so they read neighbouring words.
__device__ inline unsigned slot(unsigned digit) { return digit % 8 * kWarp + digit / 8; }

template <typename Key>
struct Threshold {
  Key key;   // keys above it are selected,
  int ties;  // and so many equal ones, the first ones
};

// Finds the byte of the wanted key, the `wanted`-th largest of those in the histogram: the digit, how many of
// the keys with it are wanted, and whether that is all of them, to the scratch memory. Called by all threads
// of the block; the first warp does it.
__device__ inline void find_digit(SelectScratch& scratch, int wanted) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= kWarp) return;
  // Lane l looks after the digits 255 - 8l ... 248 - 8l; exactly one lane finds the wanted key among its.
  constexpr int share = 256 / kWarp;
  const int first = 255 - share * thread;
  int inside = 0;
  static_assert(share == 8);  // so slot(255 - 8 l - d) is this, of which only the lane is not constant:
  for (int d = 0; d < share; ++d)
    inside += static_cast<int>(scratch.histogram[(share - 1 - d) * kWarp + kWarp - 1 - thread]);
  int through = inside;  // keys with this lane's digits or larger ones
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kFullWarp, through, distance);
    if (thread >= distance) through += other;
  }
  int rest = wanted - (through - inside);
  if (rest > 0 && rest <= inside) {
    unsigned digit = static_cast<unsigned>(first);
    for (; static_cast<int>(scratch.histogram[slot(digit)]) < rest; --digit)
      rest -= static_cast<int>(scratch.histogram[slot(digit)]);
    scratch.digit = static_cast<int>(digit);
    scratch.wanted = rest;
    scratch.whole = static_cast<int>(scratch.histogram[slot(digit)]) == rest;
  }
}

// The threshold that selects `keep` of the `count` keys key_at(0), key_at(1) ..., 1 <= keep <= count. Byte by
// byte from the top, the byte that the keep-th largest key has is found from a histogram of the keys that
// agree so far, until all that agree are wanted. Called by all threads of a block of whole warps.
template <typename Key, typename KeyAt>
__device__ Threshold<Key> select_threshold(SelectScratch& scratch, int count, int keep, const KeyAt& key_at) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  Key prefix = 0, mask = 0;
  int wanted = keep;
  for (int shift = 8 * static_cast<int>(sizeof(Key)) - 8; shift >= 0; shift -= 8) {
    for (int digit = thread; digit < 256; digit += threads) scratch.histogram[digit] = 0;
    __syncthreads();
    for (int i = thread; i < count; i += threads) {
      const Key key = key_at(i);
      if ((key & mask) == prefix)
        atomicAdd(&scratch.histogram[slot(static_cast<unsigned>(key >> shift & 0xff))], 1u);
    }
    __syncthreads();
    find_digit(scratch, wanted);
    __syncthreads();
    prefix |= static_cast<Key>(scratch.digit) << shift;
    mask |= Key{0xff} << shift;
    wanted = scratch.wanted;
    if (scratch.whole)
      return {prefix, count};  // lower bytes are zero: every key that agrees is above or equal
  }
  return {prefix, wanted};
}

// Calls emit(i, selected, position) for every i below count, in any order: whether key_at(i) is selected
// by the threshold and how many selected ones come before it. `above` and `ties` are how many keys above the
// threshold and equal to it come before the first one. Called by all threads of a block of whole warps.
template <typename Key, typename KeyAt, typename Emit>
__device__ void place_selected(SelectScratch& scratch, int count, const Threshold<Key>& threshold,
                               const KeyAt& key_at, const Emit& emit, int above = 0, int ties = 0) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  const unsigned lanes_before = (1u << lane) - 1;
  for (int start = 0; start < count; start += threads) {
    const int i = start + thread;
    bool is_above = false, is_tie = false;
    if (i < count) {
      const Key key = key_at(i);
      is_above = key > threshold.key;
      is_tie = key == threshold.key;
    }
    const unsigned above_lanes = __ballot_sync(kFullWarp, is_above);
    const unsigned tie_lanes = __ballot_sync(kFullWarp, is_tie);
    // Two counts in one number: a block has at most 1024 threads.
    if (lane == 0) scratch.counts[warp] = __popc(above_lanes) << 16 | __popc(tie_lanes);
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < warps; ++w) {
      if (w == warp) before = all;
      all += scratch.counts[w];
    }
    const int above_before = above + (before >> 16) + __popc(above_lanes & lanes_before);
    const int ties_before = ties + (before & 0xffff) + __popc(tie_lanes & lanes_before);
    if (i < count) {
      const bool selected = is_above || (is_tie && ties_before < threshold.ties);
      emit(i, selected, above_before + min(ties_before, threshold.ties));
    }
    above += all >> 16;
    ties += all & 0xffff;
    __syncthreads();  // the counts have been read
  }
}

}  // namespace evit::cuda
