#include "../evit/bipartite_matching.h"

#include <tuple>

#include "stable.h"

namespace evit::adapter {
namespace {

std::tuple<Tensor, Tensor> bipartite_matching(const Tensor& keys_any, int64_t num_out) {
  check_dim(keys_any, "keys", 4, "[B, H, N, D]");
  const Tensor keys = with_dense_rows(keys_any);
  const MatchingSizes sizes = {keys.size(0), keys.size(1), keys.size(2), keys.size(3), num_out};
  STD_TORCH_CHECK(sizes.heads > 0 && sizes.channels > 0, "keys must have at least one head and channel, got ",
                  shape_str(keys));
  STD_TORCH_CHECK(num_out >= sizes.in_a() && num_out < sizes.tokens, "num_out must be in [", sizes.in_a(),
                  ", ", sizes.tokens, ") for ", sizes.tokens, " tokens, got ", num_out);
  Tensor kept = empty(keys, {sizes.batch, num_out}, ScalarType::Long);
  Tensor owner = empty(keys, {sizes.batch, sizes.tokens}, ScalarType::Long);
  dispatch(keys.scalar_type(), "bipartite_matching", [&](auto zero) {
    using T = decltype(zero);
    const Keys<T> view = {data<T>(keys), keys.stride(0), keys.stride(1), keys.stride(2)};
    if constexpr (kHasCuda)
      if (on_cuda(keys)) {
        const Workspace workspace(keys, cuda::bipartite_matching_workspace<T>(sizes));
        return cuda::bipartite_matching<T>(sizes, view, mutable_data<int64_t>(kept),
                                           mutable_data<int64_t>(owner), workspace.data(),
                                           current_stream(keys));
      }
    cpu::bipartite_matching<T>(sizes, view, mutable_data<int64_t>(kept), mutable_data<int64_t>(owner),
                               executor());
  });
  return {kept, owner};
}

}  // namespace

EVIT_REGISTER(m) { m.impl("bipartite_matching", TORCH_BOX(&bipartite_matching)); }

}  // namespace evit::adapter
