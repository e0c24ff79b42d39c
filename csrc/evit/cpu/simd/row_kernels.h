// The inner loops of the CPU operators, one table of functions per element type and instruction level.
//
// The same source (row_kernels.inc) is compiled once per level; the first operator call chooses the best
// level that the processor supports. All levels sum in the same order over 16 lanes, so their results differ
// only where one has a fused multiply-add and another does not.
#pragma once

#include "../../types.h"
#include "simd_level.h"

namespace evit::cpu {

// Buffers that the loops process up to their padded end are this many elements longer than needed.
constexpr int64_t simd_padding = 16;
constexpr int64_t padded(int64_t size) { return (size + simd_padding - 1) / simd_padding * simd_padding; }

// Rows are `rows + index[i] * stride`, or `rows + i * stride` where index is null.
template <typename T>
struct RowKernels {
  using A = accumulate_t<T>;

  // out[i] = sum_c a[c] * row_i[c]; a is padded with zeros.
  void (*dot_rows)(const A* a, const T* rows, int64_t stride, const int64_t* index, int64_t count,
                   int64_t channels, A* out);
  // sum[c] += sum_i weights[i] * row_i[c], rows in order; sum is padded.
  void (*add_rows)(const A* weights, const T* rows, int64_t stride, const int64_t* index, int64_t count,
                   int64_t channels, A* sum);
  // row_i[c] = weights[i] * a[c]; a is padded.
  void (*outer_rows)(const A* weights, const A* a, T* rows, int64_t stride, const int64_t* index,
                     int64_t count, int64_t channels);
  // out[c] = in[c], converted; the accumulator side is padded.
  void (*load_row)(const T* in, int64_t channels, A* out);
  void (*store_row)(const A* in, int64_t channels, T* out);
  // In place: softmax(values * scale); values is padded, the padding is overwritten.
  void (*softmax)(A* values, int64_t count, A scale);
  // In place: exp(values * scale - shift); values is padded, the padding is overwritten.
  void (*exp_row)(A* values, int64_t count, A scale, A shift);
  // out[c] = a[c] + b[c], rounded.
  void (*add_row)(const T* a, const T* b, int64_t channels, T* out);
  // sum[c] += sum_i weights[i] * (a_i[c] + b_i[c]), with the inner sum rounded to T, rows in order; sum is
  // padded.
  void (*add_row_sums)(const A* weights, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                       const int64_t* index, int64_t count, int64_t channels, A* sum);
  // out[c] = (in[c] - mean) / sqrt(variance + eps) * weight[c] + bias[c]; weight and bias are padded.
  void (*norm_row)(const T* in, int64_t channels, const A* weight, const A* bias, A eps, T* out);
};

template <typename T>
const RowKernels<T>& row_kernels(SimdLevel level);

template <typename T>
const RowKernels<T>& row_kernels() {
  return row_kernels<T>(simd_level());
}

}  // namespace evit::cpu
