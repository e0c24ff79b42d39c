#include "../evit/merge_tokens.h"

#include <limits>
#include <tuple>

#include "token_index.h"

namespace evit::adapter {
namespace {

MergeSizes check(const Tensor& x, const Tensor& owner, const Tensor& weights, int64_t num_out,
                 int64_t num_prefix_tokens) {
  check_dim(x, "x", 3, "[B, N, C]");
  check_dim(owner, "owner", 2, "[B, N - P]");
  check_dim(weights, "weights", 2, "[B, N - P]");
  check_floating(weights, "weights");
  const int64_t num_tokens = x.size(1), num_patches = num_tokens - num_prefix_tokens;
  STD_TORCH_CHECK(num_prefix_tokens >= 0 && num_patches >= 0, "num_prefix_tokens must be in [0, ", num_tokens,
                  "], got ", num_prefix_tokens);
  STD_TORCH_CHECK(num_out >= 0, "num_out must not be negative, got ", num_out);
  STD_TORCH_CHECK(num_out > 0 || num_patches == 0, "num_out must be at least 1 for ", num_patches,
                  " patches, got 0");
  STD_TORCH_CHECK(num_out <= std::numeric_limits<int64_t>::max() - num_prefix_tokens,
                  "num_out is too large, got ", num_out);
  for (const auto& [tensor, name] : {std::pair(&owner, "owner"), std::pair(&weights, "weights")}) {
    STD_TORCH_CHECK(tensor->size(0) == x.size(0) && tensor->size(1) == num_patches, name,
                    " must have shape [B, N - P] of x, got ", shape_str(*tensor), " for x ", shape_str(x),
                    " with P = ", num_prefix_tokens);
    check_same_device(*tensor, name, x, "x");
  }
  check_index(x, owner, num_out, "owner");
  return {x.size(0), num_tokens, num_prefix_tokens, num_out, x.size(2)};
}

std::tuple<Tensor, Tensor> merge_tokens(const Tensor& x_any, const Tensor& owner, const Tensor& weights_any,
                                        int64_t num_out, int64_t num_prefix_tokens) {
  const MergeSizes sizes = check(x_any, owner, weights_any, num_out, num_prefix_tokens);
  const Tensor x = with_dense_rows(x_any);
  const ScalarType dtype = x.scalar_type(), wide = accumulate_dtype(dtype);
  const Tensor weights = to_dtype(weights_any, wide);
  Tensor out = empty(x, {sizes.batch, sizes.out_tokens(), sizes.channels}, dtype);
  Tensor totals = empty(x, {sizes.batch, sizes.owners}, wide);
  dispatch(dtype, "merge_tokens", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    if constexpr (kHasCuda)
      if (on_cuda(x))
        return cuda::merge_tokens<T>(sizes, tokens<T>(x), token_index(owner), tokens<A>(weights),
                                     mutable_data<T>(out), mutable_data<A>(totals), current_stream(x));
    cpu::merge_tokens<T>(sizes, tokens<T>(x), token_index(owner), tokens<A>(weights), mutable_data<T>(out),
                         mutable_data<A>(totals), executor());
  });
  return {out, totals};
}

std::tuple<Tensor, Tensor> merge_tokens_backward(const Tensor& grad_any, const Tensor& grad_totals_any,
                                                 const Tensor& x_any, const Tensor& owner,
                                                 const Tensor& weights_any, int64_t num_prefix_tokens) {
  check_dim(grad_any, "grad_out", 3, "[B, P + M, C]");
  const int64_t num_out = grad_any.size(1) - num_prefix_tokens;
  const MergeSizes sizes = check(x_any, owner, weights_any, num_out, num_prefix_tokens);
  check_same_dtype(grad_any, "grad_out", x_any, "x");
  check_same_device(grad_any, "grad_out", x_any, "x");
  STD_TORCH_CHECK(grad_any.size(0) == sizes.batch && grad_any.size(2) == sizes.channels,
                  "grad_out must have shape [B, P + M, C] of x, got ", shape_str(grad_any), " for x ",
                  shape_str(x_any));
  check_dim(grad_totals_any, "grad_totals", 2, "[B, M]");
  check_same_device(grad_totals_any, "grad_totals", x_any, "x");
  STD_TORCH_CHECK(grad_totals_any.size(0) == sizes.batch && grad_totals_any.size(1) == num_out,
                  "grad_totals must have shape [B, M] of grad_out, got ", shape_str(grad_totals_any), " for ",
                  shape_str(grad_any), " with P = ", num_prefix_tokens);
  const Tensor grad = with_dense_rows(grad_any), x = with_dense_rows(x_any);
  const ScalarType dtype = x.scalar_type(), wide = accumulate_dtype(dtype);
  const Tensor weights = to_dtype(weights_any, wide), grad_totals = to_dtype(grad_totals_any, wide);
  Tensor grad_x = empty(x, {sizes.batch, sizes.tokens, sizes.channels}, dtype);
  Tensor grad_weights = empty(x, {sizes.batch, sizes.patches()}, wide);
  dispatch(dtype, "merge_tokens_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    if constexpr (kHasCuda)
      if (on_cuda(x))
        return cuda::merge_tokens_backward<T>(sizes, tokens<T>(grad), tokens<A>(grad_totals), tokens<T>(x),
                                              token_index(owner), tokens<A>(weights), mutable_data<T>(grad_x),
                                              mutable_data<A>(grad_weights), current_stream(x));
    cpu::merge_tokens_backward<T>(sizes, tokens<T>(grad), tokens<A>(grad_totals), tokens<T>(x),
                                  token_index(owner), tokens<A>(weights), mutable_data<T>(grad_x),
                                  mutable_data<A>(grad_weights), executor());
  });
  return {grad_x, to_dtype(grad_weights, weights_any.scalar_type())};
}

}  // namespace

EVIT_REGISTER(m) {
  m.impl("merge_tokens", TORCH_BOX(&merge_tokens));
  m.impl("merge_tokens_backward", TORCH_BOX(&merge_tokens_backward));
}

}  // namespace evit::adapter
