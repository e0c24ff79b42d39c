#include "../evit/mean_attention.h"

#include <tuple>

#include "stable.h"

namespace evit::adapter {
namespace {

MeanAttentionSizes check(const Tensor& q, const Tensor& k, double scale) {
  check_dim(q, "q", 4, "[B, H, M, D]");
  check_dim(k, "k", 4, "[B, H, N, D]");
  check_same_dtype(q, "q", k, "k");
  check_same_device(q, "q", k, "k");
  STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3),
                  "q [B, H, M, D] and k [B, H, N, D] must agree in B, H and D, got ", shape_str(q), " and ",
                  shape_str(k));
  STD_TORCH_CHECK(q.size(1) > 0 && q.size(2) > 0 && k.size(2) > 0 && k.size(3) > 0,
                  "q and k must have at least one head, token and channel, got ", shape_str(q), " and ",
                  shape_str(k));
  return {k.size(0), k.size(1), q.size(2), k.size(2), k.size(3), scale};
}

template <typename T>
MeanAttentionInput<T> input(const Tensor& q, const Tensor& k) {
  return {data<T>(q), q.stride(0), q.stride(1), q.stride(2),
          data<T>(k), k.stride(0), k.stride(1), k.stride(2)};
}

Tensor mean_attention(const Tensor& q_any, const Tensor& k_any, double scale) {
  const MeanAttentionSizes sizes = check(q_any, k_any, scale);
  const Tensor q = with_dense_rows(q_any), k = with_dense_rows(k_any);
  Tensor scores = empty(k, {sizes.batch, sizes.tokens}, accumulate_dtype(k.scalar_type()));
  dispatch(k.scalar_type(), "mean_attention", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kHasCuda)
      if (on_cuda(k)) {
        const Workspace workspace(k, cuda::mean_attention_workspace<T>(sizes));
        return cuda::mean_attention<T>(sizes, input<T>(q, k), mutable_data<accumulate_t<T>>(scores),
                                       workspace.data(), current_stream(k));
      }
    cpu::mean_attention<T>(sizes, input<T>(q, k), mutable_data<accumulate_t<T>>(scores), executor());
  });
  return scores;
}

std::tuple<Tensor, Tensor> mean_attention_backward(const Tensor& grad_any, const Tensor& q_any,
                                                   const Tensor& k_any, double scale) {
  const MeanAttentionSizes sizes = check(q_any, k_any, scale);
  check_dim(grad_any, "grad_scores", 2, "[B, N]");
  STD_TORCH_CHECK(grad_any.size(0) == sizes.batch && grad_any.size(1) == sizes.tokens,
                  "grad_scores must have shape [B, N] of k, got ", shape_str(grad_any), " for k ",
                  shape_str(k_any));
  check_same_device(grad_any, "grad_scores", k_any, "k");
  const Tensor q = with_dense_rows(q_any), k = with_dense_rows(k_any);
  const ScalarType dtype = k.scalar_type();
  const Tensor grad = to_dtype(grad_any, accumulate_dtype(dtype));
  Tensor grad_q = empty(q, {sizes.batch, sizes.heads, sizes.queries, sizes.channels}, dtype);
  Tensor grad_k = empty(k, {sizes.batch, sizes.heads, sizes.tokens, sizes.channels}, dtype);
  dispatch(dtype, "mean_attention_backward", [&](auto zero) {
    using T = decltype(zero);
    const auto grads = tokens<accumulate_t<T>>(grad);
    if constexpr (kHasCuda)
      if (on_cuda(k)) {
        const Workspace workspace(k, cuda::mean_attention_backward_workspace<T>(sizes));
        return cuda::mean_attention_backward<T>(sizes, input<T>(q, k), grads, mutable_data<T>(grad_q),
                                                mutable_data<T>(grad_k), workspace.data(), current_stream(k));
      }
    cpu::mean_attention_backward<T>(sizes, input<T>(q, k), grads, mutable_data<T>(grad_q),
                                    mutable_data<T>(grad_k), executor());
  });
  return {grad_q, grad_k};
}

}  // namespace

EVIT_REGISTER(m) {
  m.impl("mean_attention", TORCH_BOX(&mean_attention));
  m.impl("mean_attention_backward", TORCH_BOX(&mean_attention_backward));
}

}  // namespace evit::adapter
