// Writes the rows of a dense tensor [B, N, C], each a copy of another row, zeros, or a multiple of one row.
//
// A block writes kBlockRows rows of one sequence, a group of kGroup neighbouring threads a row, kGroupRows
// rows of a group at a time. Every element is written once.
#pragma once

#include "vectors.cuh"

namespace evit::cuda {

constexpr int kGroup = 16;
constexpr int kWriteThreads = 256;
constexpr int kGroupRows = 2;  // rows that a group has in flight
constexpr int kBlockRows = kWriteThreads / kGroup * kGroupRows;

// Blocks for the rows of one sequence. In 32 bits, as kernels divide by it: a division of 64 is a call.
inline int row_blocks(int64_t rows) { return static_cast<int>((rows + kBlockRows - 1) / kBlockRows); }

// What becomes of a row.
template <typename T>
struct Row {
  enum Kind { skip, zeros, copy, scaled };
  Kind kind;
  const T* from;           // copy: the row to copy. scaled: the row whose product with `base` is wanted.
  accumulate_t<T> weight;  // scaled: the row becomes weight * base.
};

// Writes the rows first ... first + kBlockRows - 1, those below num_rows, of `out` as describe(n) says.
// Calls finish(n, dot) for each, by one thread: dot is the product of `from` with `base` where the row is
// scaled, else 0. Called by all threads of the block.
template <bool kAligned, bool kScaled, typename T, typename Describe, typename Finish>
__device__ void write_rows(int first, int num_rows, int64_t channels, T* out, const T* base,
                           const Describe& describe, const Finish& finish) {
  using A = accumulate_t<T>;
  constexpr int W = kWidth<T>;
  const int lane = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup;
  Row<T> row[kGroupRows];
  A dot[kGroupRows] = {};
  int n[kGroupRows];
#pragma unroll
  for (int u = 0; u < kGroupRows; ++u) {
    n[u] = first + group + u * (kWriteThreads / kGroup);
    row[u] = {Row<T>::skip, nullptr, 0};
    if (n[u] < num_rows) row[u] = describe(n[u]);
  }
  for (int64_t c = lane * W; c < channels; c += kGroup * W) {
    Vector<T> value[kGroupRows] = {}, multiplier = {};
    bool scales = false;
#pragma unroll
    for (int u = 0; u < kGroupRows; ++u) {
      if (row[u].kind == Row<T>::copy || row[u].kind == Row<T>::scaled)
        value[u] = load<kAligned>(row[u].from + c, channels - c);
      if constexpr (kScaled) scales |= row[u].kind == Row<T>::scaled;
    }
    if constexpr (kScaled)
      if (scales) multiplier = load<kAligned>(base + c, channels - c);
#pragma unroll
    for (int u = 0; u < kGroupRows; ++u) {
      if (row[u].kind == Row<T>::skip) continue;
      if constexpr (kScaled)
        if (row[u].kind == Row<T>::scaled) {
          A element[W], factor[W];
          widen_vector(value[u], element);
          widen_vector(multiplier, factor);
#pragma unroll
          for (int w = 0; w < W; ++w) {
            dot[u] = multiply_add(factor[w], element[w], dot[u]);
            element[w] = row[u].weight * factor[w];
          }
          value[u] = narrow_vector<T>(element);
        }
      store<kAligned>(out + n[u] * channels + c, value[u], channels - c);
    }
  }
  if constexpr (kScaled) {
#pragma unroll
    for (int u = 0; u < kGroupRows; ++u) {
      for (int distance = 1; distance < kGroup; distance *= 2)
        dot[u] += __shfl_xor_sync(kFullWarp, dot[u], distance);
      if (lane == 0 && n[u] < num_rows) finish(n[u], dot[u]);
    }
  }
}

}  // namespace evit::cuda
