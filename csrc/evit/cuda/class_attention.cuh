// What the forward and backward kernels of class_attention share: dot products and reductions of a warp.
#pragma once

#include <cmath>

#include "../class_attention.h"
#include "device.cuh"

namespace evit::cuda {

constexpr int kKeysInFlight = 4;  // keys that a thread has in flight

// Threads that share a key: as many as it has vectors, rounded up to a power of two, at most a warp. So the
// order of a dot product depends on D and the element type alone.
template <typename T>
int lanes_per_key(int64_t channels) {
  const int64_t vectors = (channels + kWidth<T> - 1) / kWidth<T>;
  int lanes = 1;
  while (lanes < kWarp && lanes < vectors) lanes *= 2;
  return lanes;
}

// Keys that a warp takes at once.
EVIT_HOST_DEVICE inline int keys_per_warp(int lanes) { return kWarp / lanes * kKeysInFlight; }

template <typename T>
struct Attention {
  using A = accumulate_t<T>;
  ClassAttentionSizes sizes;
  ClassAttentionInput<T> input;
  int lanes;  // threads that share a key
  A scale;    // of sizes, in the accumulation type
};

// Calls emit(n, logit) for keys_per_warp keys of head h from `first` on, those below `last`, by one thread
// each. kShared: the keys lie in shared memory. Called by whole warps. The query is read again for each of
// these calls, out of the cache.
template <bool kAligned, bool kShared, typename T, typename Emit>
__device__ void warp_logits(const Attention<T>& job, int64_t b, int64_t h, int first, int last,
                            const Emit& emit) {
  using A = accumulate_t<T>;
  constexpr int W = kWidth<T>;
  const int lanes = job.lanes, thread = static_cast<int>(threadIdx.x) % kWarp;
  const int lane = thread & (lanes - 1), group = thread / lanes, groups = kWarp / lanes;
  const T* q = job.input.query(b, h);
  const T* keys = job.input.keys(b, h);
  const int channels = static_cast<int>(job.sizes.channels);
  A dot[kKeysInFlight] = {};
  for (int c = lane * W; c < channels; c += lanes * W) {
    Vector<T> key[kKeysInFlight];
#pragma unroll
    for (int u = 0; u < kKeysInFlight; ++u) {
      // Beyond the end the last key is read once more: cheaper than a branch for every load.
      const int n = min(first + group + u * groups, last - 1);
      const T* from = keys + n * job.input.k_stride_n + c;
      key[u] = kShared ? load_shared(from) : load<kAligned>(from, channels - c);
    }
    const Vector<T> query = load<kAligned>(q + c, channels - c);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const A value = widen(query.element[w]);
#pragma unroll
      for (int u = 0; u < kKeysInFlight; ++u)
        dot[u] = multiply_add(value, static_cast<A>(widen(key[u].element[w])), dot[u]);
    }
  }
#pragma unroll
  for (int u = 0; u < kKeysInFlight; ++u) {
    for (int distance = 1; distance < lanes; distance *= 2)
      dot[u] += __shfl_xor_sync(kFullWarp, dot[u], distance);
    const int n = first + group + u * groups;
    if (lane == 0 && n < last) emit(n, dot[u] * job.scale);
  }
}

template <typename A>
__device__ A warp_max(A value) {
  for (int distance = 1; distance < kWarp; distance *= 2)
    value = max(value, __shfl_xor_sync(kFullWarp, value, distance));
  return value;
}

// The largest of `count` logits, to a whole warp. NaN may be passed over: the sum of exponentials finds it.
template <typename A>
__device__ A warp_largest(const A* logits, int count) {
  A largest = static_cast<A>(-INFINITY);
  for (int n = static_cast<int>(threadIdx.x) % kWarp; n < count; n += kWarp)
    largest = max(largest, logits[n]);
  return warp_max(largest);
}

// The kernels count tokens and channels of one sequence in 32 bits.
inline void check_sizes(const ClassAttentionSizes& sizes, const char* what) {
  check_count(sizes.tokens, "tokens", what);
  check_count(sizes.heads, "heads", what);
  check_count(sizes.channels, "channels a head", what);
}

template <typename T>
bool input_aligned(const ClassAttentionSizes& sizes, const ClassAttentionInput<T>& input) {
  return aligned(input.q, input.q_stride_b, input.q_stride_h, sizes.channels) &&
         aligned(input.k, input.k_stride_b, input.k_stride_h, input.k_stride_n);
}

}  // namespace evit::cuda
