// What the forward and backward kernels of class_attention share: dot products and reductions of a warp.
#pragma once

#include <cmath>

#include "../class_attention.h"
#include "tensor_cores.cuh"

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

// Keys that a warp takes at once: in 16 bits, the rows of two matrices (tensor_cores.cuh).
constexpr int kMatrixKeys = 32;
template <typename T>
EVIT_HOST_DEVICE int keys_per_warp(int lanes) {
  return sizeof(T) == 2 ? kMatrixKeys : kWarp / lanes * kKeysInFlight;
}

template <typename T>
struct Attention {
  using A = accumulate_t<T>;
  ClassAttentionSizes sizes;
  ClassAttentionInput<T> input;
  int lanes;  // threads that share a key
  A scale;    // of sizes, in the accumulation type
};

// The dot products of 32 keys with a query, on tensor cores. The lanes 4 i to 4 i + 3 get those of the keys
// first + i + 8 r, in dots[r]. The keys are the rows of two matrices, the query is every column of another
// one. Which channels meet in a product is left open by the sum: every lane takes eight neighbouring ones, of
// keys and query alike, so that 16 bytes are read at once and nothing is exchanged.
template <bool kAligned, bool kShared, typename T>
__device__ void matrix_dots(const T* q, const T* keys, int64_t stride, int channels, int first, int last,
                            float (&dots)[kMatrixKeys / 8]) {
  constexpr int W = kWidth<T>, kStep = 4 * W;  // channels that the four lanes take at once
  const int lane = static_cast<int>(threadIdx.x % kWarp), own = lane % 4 * W;
  const T* rows[kMatrixKeys / 8];
#pragma unroll
  for (int r = 0; r < kMatrixKeys / 8; ++r)
    // Beyond the end the last key is read once more: cheaper than a branch for every load.
    rows[r] = keys + min(first + lane / 4 + 8 * r, last - 1) * stride + own;
  q += own;
  float products[kMatrixKeys / 16][4] = {};
  // kWhole: there are two steps of channels, else some lanes have zeros.
  const auto take = [&](auto is_whole, int start) {
    constexpr bool kWhole = decltype(is_whole)::value;
    Vector<T> key[2][kMatrixKeys / 8], query[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int c = start + i * kStep, left = channels - own - c;
      const bool there = kWhole || left > 0;
      query[i] = there ? load<kAligned>(q + c, left) : Vector<T>{};
#pragma unroll
      for (int r = 0; r < kMatrixKeys / 8; ++r)
        key[i][r] = !there    ? Vector<T>{}
                    : kShared ? load_shared(rows[r] + c)
                              : load<kAligned>(rows[r] + c, left);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int pair = 0; pair < 4; pair += 2)
#pragma unroll
        for (int m = 0; m < kMatrixKeys / 16; ++m) {
          const Vector<T>&upper = key[i][2 * m], &lower = key[i][2 * m + 1];
          const uint32_t a[4] = {upper.word[pair], lower.word[pair], upper.word[pair + 1],
                                 lower.word[pair + 1]};
          warp_multiply_add<T>(products[m], a, query[i].word[pair], query[i].word[pair + 1]);
        }
  };
  int start = 0;
#pragma unroll 1
  for (; start + 2 * kStep <= channels; start += 2 * kStep) take(std::true_type{}, start);
  if (start < channels) take(std::false_type{}, start);
#pragma unroll
  for (int r = 0; r < kMatrixKeys / 8; ++r) dots[r] = products[r / 2][r % 2 * 2];
}

// Calls emit(n, logit) for keys_per_warp keys of head h from `first` on, those below `last`, by one thread
// each. kShared: the keys lie in shared memory. Called by whole warps. The query is read again for each of
// these calls, out of the cache.
template <bool kAligned, bool kShared, typename T, typename Emit>
__device__ void warp_logits(const Attention<T>& job, int64_t b, int64_t h, int first, int last,
                            const Emit& emit) {
  using A = accumulate_t<T>;
  const T* q = job.input.query(b, h);
  const T* keys = job.input.keys(b, h);
  const int channels = static_cast<int>(job.sizes.channels);
  const int thread = static_cast<int>(threadIdx.x % kWarp);
  if constexpr (sizeof(T) == 2) {
    float dots[kMatrixKeys / 8];
    matrix_dots<kAligned, kShared>(q, keys, job.input.k_stride_n, channels, first, last, dots);
    // The four lanes of a row have the same: each writes one of the four.
    const int r = thread % 4, n = first + thread / 4 + 8 * r;
    if (n < last) emit(n, (r == 0 ? dots[0] : r == 1 ? dots[1] : r == 2 ? dots[2] : dots[3]) * job.scale);
  } else {
    constexpr int W = kWidth<T>;
    const int lanes = job.lanes, lane = thread & (lanes - 1), group = thread / lanes, groups = kWarp / lanes;
    A dot[kKeysInFlight] = {};
    for (int c = lane * W; c < channels; c += lanes * W) {
      Vector<T> key[kKeysInFlight];
#pragma unroll
      for (int u = 0; u < kKeysInFlight; ++u) {
        const int n = min(first + group + u * groups, last - 1);  // as above
        const T* from = keys + n * job.input.k_stride_n + c;
        key[u] = kShared ? load_shared(from) : load<kAligned>(from, channels - c);
      }
      A query[W];
      widen_vector(load<kAligned>(q + c, channels - c), query);
#pragma unroll
      for (int u = 0; u < kKeysInFlight; ++u) {
        A element[W];
        widen_vector(key[u], element);
#pragma unroll
        for (int w = 0; w < W; ++w) dot[u] = multiply_add(query[w], element[w], dot[u]);
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
