#include "../evit/fuse_tokens.h"

#include <tuple>

#include "token_index.h"

namespace evit::adapter {
namespace {

GatherSizes check(const Tensor& x, const Tensor& weights, const Tensor& index) {
  check_dim(x, "x", 3, "[B, N, C]");
  check_dim(weights, "weights", 2, "[B, N]");
  check_floating(weights, "weights");
  STD_TORCH_CHECK(weights.size(0) == x.size(0) && weights.size(1) == x.size(1),
                  "weights must have shape [B, N] of x, got ", shape_str(weights), " for x ", shape_str(x));
  check_same_device(weights, "weights", x, "x");
  return check_index(x, index, x.size(1));
}

Tensor fuse_tokens(const Tensor& x_any, const Tensor& weights_any, const Tensor& index) {
  const GatherSizes sizes = check(x_any, weights_any, index);
  const Tensor x = with_dense_rows(x_any);
  const Tensor weights = to_dtype(weights_any, accumulate_dtype(x.scalar_type()));
  Tensor out = empty(x, {sizes.batch, sizes.channels}, x.scalar_type());
  dispatch(x.scalar_type(), "fuse_tokens", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kHasCuda)
      if (on_cuda(x))
        return cuda::fuse_tokens<T>(sizes, tokens<T>(x), tokens<accumulate_t<T>>(weights), token_index(index),
                                    mutable_data<T>(out), current_stream(x));
    cpu::fuse_tokens<T>(sizes, tokens<T>(x), tokens<accumulate_t<T>>(weights), token_index(index),
                        mutable_data<T>(out), executor());
  });
  return out;
}

std::tuple<Tensor, Tensor> fuse_tokens_backward(const Tensor& grad_any, const Tensor& x_any,
                                                const Tensor& weights_any, const Tensor& index) {
  const GatherSizes sizes = check(x_any, weights_any, index);
  check_dim(grad_any, "grad", 2, "[B, C]");
  check_same_dtype(grad_any, "grad", x_any, "x");
  check_same_device(grad_any, "grad", x_any, "x");
  STD_TORCH_CHECK(grad_any.size(0) == sizes.batch && grad_any.size(1) == sizes.channels,
                  "grad must have shape [B, C] of x, got ", shape_str(grad_any), " for x ", shape_str(x_any));
  const Tensor grad = with_dense_rows(grad_any), x = with_dense_rows(x_any);
  const ScalarType dtype = x.scalar_type();
  const Tensor weights = to_dtype(weights_any, accumulate_dtype(dtype));
  Tensor grad_x = empty(x, {sizes.batch, sizes.tokens, sizes.channels}, dtype);
  Tensor grad_weights = empty(x, {sizes.batch, sizes.tokens}, accumulate_dtype(dtype));
  dispatch(dtype, "fuse_tokens_backward", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kHasCuda)
      if (on_cuda(x))
        return cuda::fuse_tokens_backward<T>(sizes, data<T>(grad), grad.stride(0), tokens<T>(x),
                                             tokens<accumulate_t<T>>(weights), token_index(index),
                                             mutable_data<T>(grad_x),
                                             mutable_data<accumulate_t<T>>(grad_weights), current_stream(x));
    cpu::fuse_tokens_backward<T>(
        sizes, data<T>(grad), grad.stride(0), tokens<T>(x), tokens<accumulate_t<T>>(weights),
        token_index(index), mutable_data<T>(grad_x), mutable_data<accumulate_t<T>>(grad_weights), executor());
  });
  return {grad_x, to_dtype(grad_weights, weights_any.scalar_type())};
}

}  // namespace

EVIT_REGISTER(m) {
  m.impl("fuse_tokens", TORCH_BOX(&fuse_tokens));
  m.impl("fuse_tokens_backward", TORCH_BOX(&fuse_tokens_backward));
}

}  // namespace evit::adapter
