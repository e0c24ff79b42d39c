// Checks shared by the operators that take an index: gather_tokens, scatter_tokens, fuse_tokens,
// merge_tokens.
#pragma once

#include "../evit/gather_tokens.h"
#include "stable.h"

namespace evit::adapter {

// Sizes of an operator between x [B, rows, C] and index [B, K] into `tokens` tokens. Raises if shapes, dtypes
// or devices do not match or, on the CPU, an index is out of range; it calls the index by `name`.
GatherSizes check_index(const Tensor& x, const Tensor& index, int64_t tokens, const char* name = "index");

inline TokenIndex token_index(const Tensor& index) {
  return {data<int64_t>(index), index.stride(0), index.stride(1)};
}

}  // namespace evit::adapter
