#include "../evit/class_attention.h"

#include <optional>
#include <tuple>

#include "stable.h"

namespace evit::adapter {
namespace {

ClassAttentionSizes check(const Tensor& q, const Tensor& k, double scale) {
  check_dim(q, "q", 3, "[B, H, D]");
  check_dim(k, "k", 4, "[B, H, N, D]");
  check_same_dtype(q, "q", k, "k");
  check_same_device(q, "q", k, "k");
  STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(2) == k.size(3),
                  "q [B, H, D] and k [B, H, N, D] must agree in B, H and D, got ", shape_str(q), " and ",
                  shape_str(k));
  STD_TORCH_CHECK(k.size(1) > 0 && k.size(2) > 0 && k.size(3) > 0,
                  "k must have at least one head, token and channel, got ", shape_str(k));
  return {k.size(0), k.size(1), k.size(2), k.size(3), scale};
}

template <typename T>
ClassAttentionInput<T> input(const Tensor& q, const Tensor& k) {
  return {data<T>(q), q.stride(0), q.stride(1), data<T>(k), k.stride(0), k.stride(1), k.stride(2)};
}

void check_logsumexp(const Tensor& logsumexp, const Tensor& k) {
  check_dim(logsumexp, "logsumexp", 2, "[B, H]");
  STD_TORCH_CHECK(logsumexp.size(0) == k.size(0) && logsumexp.size(1) == k.size(1),
                  "logsumexp must have shape [B, H] of k, got ", shape_str(logsumexp), " for k ",
                  shape_str(k));
  check_same_device(logsumexp, "logsumexp", k, "k");
  const ScalarType dtype = accumulate_dtype(k.scalar_type());
  STD_TORCH_CHECK(logsumexp.scalar_type() == dtype, "logsumexp must be ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(logsumexp.scalar_type()));
}

Tensor class_attention(const Tensor& q_any, const Tensor& k_any, double scale,
                       const std::optional<Tensor>& logsumexp) {
  const ClassAttentionSizes sizes = check(q_any, k_any, scale);
  if (logsumexp.has_value()) check_logsumexp(*logsumexp, k_any);
  const Tensor q = with_dense_rows(q_any), k = with_dense_rows(k_any);
  Tensor scores = empty(k, {sizes.batch, sizes.tokens}, accumulate_dtype(k.scalar_type()));
  dispatch(k.scalar_type(), "class_attention", [&](auto zero) {
    using T = decltype(zero);
    ClassAttentionInput<T> in = input<T>(q, k);
    if (logsumexp.has_value()) {
      in.logsumexp = data<accumulate_t<T>>(*logsumexp);
      in.logsumexp_stride_b = logsumexp->stride(0);
      in.logsumexp_stride_h = logsumexp->stride(1);
    }
    if constexpr (kHasCuda)
      if (on_cuda(k)) {
        const Workspace workspace(k, cuda::class_attention_workspace<T>(sizes, logsumexp.has_value()));
        return cuda::class_attention<T>(sizes, in, mutable_data<accumulate_t<T>>(scores), workspace.data(),
                                        current_stream(k));
      }
    cpu::class_attention<T>(sizes, in, mutable_data<accumulate_t<T>>(scores), executor());
  });
  return scores;
}

std::tuple<Tensor, Tensor> class_attention_backward(const Tensor& grad_any, const Tensor& q_any,
                                                    const Tensor& k_any, double scale) {
  const ClassAttentionSizes sizes = check(q_any, k_any, scale);
  check_dim(grad_any, "grad_scores", 2, "[B, N]");
  STD_TORCH_CHECK(grad_any.size(0) == sizes.batch && grad_any.size(1) == sizes.tokens,
                  "grad_scores must have shape [B, N] of k, got ", shape_str(grad_any), " for k ",
                  shape_str(k_any));
  check_same_device(grad_any, "grad_scores", k_any, "k");
  const Tensor q = with_dense_rows(q_any), k = with_dense_rows(k_any);
  const ScalarType dtype = k.scalar_type();
  const Tensor grad = to_dtype(grad_any, accumulate_dtype(dtype));
  Tensor grad_q = empty(q, {sizes.batch, sizes.heads, sizes.channels}, dtype);
  Tensor grad_k = empty(k, {sizes.batch, sizes.heads, sizes.tokens, sizes.channels}, dtype);
  dispatch(dtype, "class_attention_backward", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kHasCuda)
      if (on_cuda(k)) {
        const Workspace workspace(k, cuda::class_attention_backward_workspace<T>(sizes));
        return cuda::class_attention_backward<T>(
            sizes, input<T>(q, k), data<accumulate_t<T>>(grad), grad.stride(0), grad.stride(1),
            mutable_data<T>(grad_q), mutable_data<T>(grad_k), workspace.data(), current_stream(k));
      }
    cpu::class_attention_backward<T>(sizes, input<T>(q, k), data<accumulate_t<T>>(grad), grad.stride(0),
                                     grad.stride(1), mutable_data<T>(grad_q), mutable_data<T>(grad_k),
                                     executor());
  });
  return {grad_q, grad_k};
}

}  // namespace

EVIT_REGISTER(m) {
  m.impl("class_attention", TORCH_BOX(&class_attention));
  m.impl("class_attention_backward", TORCH_BOX(&class_attention_backward));
}

}  // namespace evit::adapter
