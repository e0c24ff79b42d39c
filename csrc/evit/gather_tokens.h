// gather_tokens: out[b, i] = x[b, index[b, i]].
//
// x [B, N, C] with a dense last dimension; index [B, K], any strides, every value in [0, N) (checked by the
// caller, see first_out_of_range); out [B, K, C], dense. Any size may be 0. Repetitions are allowed.
// Differentiable in x: the gradient is scatter_tokens. out never aliases x.
#pragma once

#include "executor.h"
#include "stream.h"
#include "types.h"

namespace evit {

struct TokenIndex {
  const int64_t* data;
  int64_t stride_b;
  int64_t stride_i;

  EVIT_HOST_DEVICE int64_t at(int64_t b, int64_t i) const { return data[b * stride_b + i * stride_i]; }
};

struct GatherSizes {
  int64_t batch;     // B
  int64_t tokens;    // N, rows of the larger tensor
  int64_t indices;   // K, rows of the smaller one
  int64_t channels;  // C
};

namespace cpu {

// Returns the position (b * K + i) of the first index outside [0, N), or -1.
int64_t first_out_of_range(const GatherSizes& sizes, const TokenIndex& index);

template <typename T>
void gather_tokens(const GatherSizes& sizes, const Tokens<T>& x, const TokenIndex& index, T* out,
                   const Executor& executor);

}  // namespace cpu

namespace cuda {

// Like the CPU version, but the kernel itself checks the index, which stays on the device: an index out of
// range is a device-side assertion.
template <typename T>
void gather_tokens(const GatherSizes& sizes, const Tokens<T>& x, const TokenIndex& index, T* out,
                   const Stream& stream);

}  // namespace cuda
}  // namespace evit
