#include "../evit/scatter_tokens.h"

#include "token_index.h"

namespace evit::adapter {
namespace {

Tensor scatter_tokens(const Tensor& x_any, const Tensor& index, int64_t num_tokens) {
  STD_TORCH_CHECK(num_tokens >= 0, "num_tokens must not be negative, got ", num_tokens);
  const GatherSizes sizes = check_index(x_any, index, num_tokens);
  STD_TORCH_CHECK(x_any.size(1) == sizes.indices, "x [B, K, C] and index [B, K] must agree in K, got ",
                  shape_str(x_any), " and ", shape_str(index));
  const Tensor x = with_dense_rows(x_any);
  Tensor out = empty(x, {sizes.batch, num_tokens, sizes.channels}, x.scalar_type());
  dispatch(x.scalar_type(), "scatter_tokens", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kHasCuda)
      if (on_cuda(x))
        return cuda::scatter_tokens<T>(sizes, tokens<T>(x), token_index(index), mutable_data<T>(out),
                                       current_stream(x));
    cpu::scatter_tokens<T>(sizes, tokens<T>(x), token_index(index), mutable_data<T>(out), executor());
  });
  return out;
}

}  // namespace

EVIT_REGISTER(m) { m.impl("scatter_tokens", TORCH_BOX(&scatter_tokens)); }

}  // namespace evit::adapter
