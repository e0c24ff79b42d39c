// Shared by the adapters of reorganize_tokens, restore_tokens and add_reorganize_norm.
#pragma once

#include "../evit/reorganize_tokens.h"
#include "stable.h"

namespace evit::adapter {

// Raises unless x is [B, N, C], scores are [B, N] or [B, N - P] and the numbers are in range. The returned
// sizes have fuse only if there is something to fuse.
ReorganizeSizes check_reorganize(const Tensor& x, const Tensor& scores, int64_t num_keep,
                                 int64_t num_prefix_tokens, bool fuse);

// Raises unless every row of kept [B, K], which is dense and on the CPU, ascends within [0, num_patches). The
// CPU kernels look for kept tokens in one ascending pass: any other order would leave rows unwritten.
void check_ascending(const Tensor& kept, int64_t num_patches);

// Calls body(T{}, S{}) with the element types of x and of the scores, which are float or double by now.
template <typename Body>
void dispatch_pair(const Tensor& x, const Tensor& scores, const char* op, const Body& body) {
  dispatch(x.scalar_type(), op, [&](auto zero) {
    if (scores.scalar_type() == ScalarType::Double)
      body(zero, double{});
    else
      body(zero, float{});
  });
}

}  // namespace evit::adapter
