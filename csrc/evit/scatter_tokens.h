// scatter_tokens: out[b, index[b, i]] += x[b, i] on zeros.
//
// x [B, K, C] with a dense last dimension; index [B, K], any strides, every value in [0, N) (checked by the
// caller); out [B, N, C], dense, every element written. Any size may be 0. Rows with equal indices are summed
// in the accumulation type, in ascending order of i, and rounded once: deterministic. Differentiable in x:
// the gradient is gather_tokens.
#pragma once

#include "gather_tokens.h"

namespace evit::cpu {

template <typename T>
void scatter_tokens(const GatherSizes& sizes, const Tokens<T>& x, const TokenIndex& index, T* out,
                    const Executor& executor);

}  // namespace evit::cpu

namespace evit::cuda {

// Like the CPU version, but an index out of range is a device-side assertion.
template <typename T>
void scatter_tokens(const GatherSizes& sizes, const Tokens<T>& x, const TokenIndex& index, T* out,
                    const Stream& stream);

}  // namespace evit::cuda
