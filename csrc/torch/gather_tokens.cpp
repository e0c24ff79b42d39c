#include "../evit/gather_tokens.h"

#include "token_index.h"

namespace evit::adapter {
namespace {

Tensor gather_tokens(const Tensor& x_any, const Tensor& index) {
  check_dim(x_any, "x", 3, "[B, N, C]");
  const GatherSizes sizes = check_index(x_any, index, x_any.size(1));
  const Tensor x = with_dense_rows(x_any);
  Tensor out = empty(x, {sizes.batch, sizes.indices, sizes.channels}, x.scalar_type());
  dispatch(x.scalar_type(), "gather_tokens", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kHasCuda)
      if (on_cuda(x))
        return cuda::gather_tokens<T>(sizes, tokens<T>(x), token_index(index), mutable_data<T>(out),
                                      current_stream(x));
    cpu::gather_tokens<T>(sizes, tokens<T>(x), token_index(index), mutable_data<T>(out), executor());
  });
  return out;
}

}  // namespace

EVIT_REGISTER(m) { m.impl("gather_tokens", TORCH_BOX(&gather_tokens)); }

}  // namespace evit::adapter
