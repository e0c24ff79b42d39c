#include "../evit/attention_with_scores.h"

#include <optional>
#include <tuple>

#include "stable.h"

namespace evit::adapter {
namespace {

// Runs the CUDA kernel, or returns false if it does not support this number of channels.
template <typename T>
bool run_on_cuda(const AttentionWithScoresSizes& sizes, Tensor qkv, const Tokens<float>& key_bias,
                 const Tensor& out, const Tensor& scores) {
  if (!cuda::attention_with_scores_available<T>(sizes, tokens<T>(qkv))) {
    // Perhaps only because rows are not aligned to 16 bytes. A dense copy aligns them if the size allows it.
    Tensor dense = empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2)}, qkv.scalar_type());
    if (!cuda::attention_with_scores_available<T>(sizes, tokens<T>(dense))) return false;
    qkv = torch::stable::copy_(dense, qkv);
  }
  const Workspace workspace(qkv, cuda::attention_with_scores_workspace(sizes));
  cuda::attention_with_scores<T>(sizes, tokens<T>(qkv), key_bias, mutable_data<T>(out),
                                 mutable_data<float>(scores), workspace.data(), current_stream(qkv));
  return true;
}

AttentionWithScoresSizes check(const Tensor& qkv, int64_t num_heads, double scale, bool mean) {
  check_dim(qkv, "qkv", 3, "[B, N, 3 * C]");
  const int64_t width = qkv.size(2) / 3;
  STD_TORCH_CHECK(num_heads > 0, "num_heads must be at least 1, got ", num_heads);
  STD_TORCH_CHECK(qkv.size(2) > 0 && qkv.size(2) % 3 == 0 && width % num_heads == 0,
                  "qkv must have 3 * num_heads * D channels with num_heads = ", num_heads,
                  " and D at least 1, got ", shape_str(qkv));
  check_floating(qkv, "qkv");
  return {qkv.size(0), qkv.size(1), num_heads, width / num_heads, scale, mean};
}

// The bias in the type in which the logits are.
std::optional<Tensor> check_bias(const std::optional<Tensor>& key_bias, const Tensor& qkv) {
  if (!key_bias.has_value()) return std::nullopt;
  check_dim(*key_bias, "key_bias", 2, "[B, N]");
  STD_TORCH_CHECK(key_bias->size(0) == qkv.size(0) && key_bias->size(1) == qkv.size(1),
                  "key_bias must have shape [B, N] of qkv [B, N, 3 * C], got ", shape_str(*key_bias), " and ",
                  shape_str(qkv));
  check_floating(*key_bias, "key_bias");
  check_same_device(*key_bias, "key_bias", qkv, "qkv");
  return to_dtype(*key_bias, accumulate_dtype(qkv.scalar_type()));
}

// What the kernels take: null if there is no bias.
template <typename A>
Tokens<A> biases(const std::optional<Tensor>& key_bias) {
  return key_bias.has_value() ? tokens<A>(*key_bias) : Tokens<A>{};
}

std::tuple<Tensor, Tensor> attention_with_scores(const Tensor& qkv_any, int64_t num_heads, double scale,
                                                 const std::optional<Tensor>& key_bias_any, bool mean) {
  const AttentionWithScoresSizes sizes = check(qkv_any, num_heads, scale, mean);
  const std::optional<Tensor> key_bias = check_bias(key_bias_any, qkv_any);
  const ScalarType dtype = qkv_any.scalar_type();
  const Tensor qkv = with_dense_rows(qkv_any);
  Tensor out = empty(qkv, {sizes.batch, sizes.tokens, sizes.heads * sizes.channels}, dtype);
  Tensor scores = empty(qkv, {sizes.batch, sizes.tokens}, accumulate_dtype(dtype));
  dispatch(dtype, "attention_with_scores", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kHasCuda && sizeof(T) == 2)
      if (on_cuda(qkv) && run_on_cuda<T>(sizes, qkv, biases<float>(key_bias), out, scores)) return;
    STD_TORCH_CHECK(qkv.is_cpu(),
                    "attention_with_scores on CUDA takes float16 and bfloat16 with 32, 64 or 128 channels a "
                    "head, got ",
                    torch::headeronly::toString(dtype), " with ", sizes.channels);
    using A = accumulate_t<T>;
    cpu::attention_with_scores<T>(sizes, tokens<T>(qkv), biases<A>(key_bias), mutable_data<T>(out),
                                  mutable_data<A>(scores), executor());
  });
  return {out, scores};
}

// The second result has no element if there is no bias, else the shape and the type of the bias.
std::tuple<Tensor, Tensor> attention_with_scores_backward(
    const Tensor& grad_out_any, const Tensor& grad_scores_any, const Tensor& qkv_any, int64_t num_heads,
    double scale, const std::optional<Tensor>& key_bias_any, bool mean) {
  const AttentionWithScoresSizes sizes = check(qkv_any, num_heads, scale, mean);
  const int64_t width = sizes.heads * sizes.channels;
  check_dim(grad_out_any, "grad_out", 3, "[B, N, C]");
  check_dim(grad_scores_any, "grad_scores", 2, "[B, N]");
  STD_TORCH_CHECK(grad_out_any.size(0) == sizes.batch && grad_out_any.size(1) == sizes.tokens &&
                      grad_out_any.size(2) == width && grad_scores_any.size(0) == sizes.batch &&
                      grad_scores_any.size(1) == sizes.tokens,
                  "grad_out [B, N, C] and grad_scores [B, N] must agree with qkv [B, N, 3 * C], got ",
                  shape_str(grad_out_any), ", ", shape_str(grad_scores_any), " and ", shape_str(qkv_any));
  check_same_device(grad_out_any, "grad_out", qkv_any, "qkv");
  check_same_device(grad_scores_any, "grad_scores", qkv_any, "qkv");
  const std::optional<Tensor> key_bias = check_bias(key_bias_any, qkv_any);
  STD_TORCH_CHECK(qkv_any.is_cpu(),
                  "attention_with_scores_backward has a kernel for the CPU alone: elsewhere "
                  "evit_ext.ops.attention_with_scores is differentiated as the operators that it runs");
  const ScalarType dtype = qkv_any.scalar_type();
  const Tensor qkv = with_dense_rows(qkv_any);
  // In this order: a conversion need not leave the last dimension dense.
  const Tensor grad_out = with_dense_rows(to_dtype(grad_out_any, dtype));
  const Tensor grad_scores = to_dtype(grad_scores_any, accumulate_dtype(dtype));
  Tensor grad_qkv = empty(qkv, {sizes.batch, sizes.tokens, 3 * width}, dtype);
  Tensor grad_key_bias =
      empty(qkv, {sizes.batch, key_bias.has_value() ? sizes.tokens : 0}, accumulate_dtype(dtype));
  dispatch(dtype, "attention_with_scores_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    cpu::attention_with_scores_backward<T>(
        sizes, tokens<T>(qkv), biases<A>(key_bias), tokens<T>(grad_out),
        {data<A>(grad_scores), grad_scores.stride(0), grad_scores.stride(1)}, mutable_data<T>(grad_qkv),
        mutable_data<A>(grad_key_bias), executor());
  });
  if (key_bias.has_value()) grad_key_bias = to_dtype(grad_key_bias, key_bias_any->scalar_type());
  return {grad_qkv, grad_key_bias};
}

}  // namespace

EVIT_REGISTER(m) {
  m.impl("attention_with_scores", TORCH_BOX(&attention_with_scores));
  m.impl("attention_with_scores_backward", TORCH_BOX(&attention_with_scores_backward));
}

}  // namespace evit::adapter
