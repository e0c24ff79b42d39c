#include "../evit/attention_with_scores.h"

#include <tuple>

#include "stable.h"

namespace evit::adapter {
namespace {

// Runs the CUDA kernel, or returns false where it does not take this many channels.
template <typename T>
bool run_on_cuda(const AttentionWithScoresSizes& sizes, Tensor qkv, const Tensor& out, const Tensor& scores) {
  if (!cuda::attention_with_scores_available<T>(sizes, tokens<T>(qkv))) {
    // It may be that rows are not aligned to 16 bytes: those of a dense copy are, if any number of channels
    // is.
    Tensor dense = empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2)}, qkv.scalar_type());
    if (!cuda::attention_with_scores_available<T>(sizes, tokens<T>(dense))) return false;
    qkv = torch::stable::copy_(dense, qkv);
  }
  const Workspace workspace(qkv, cuda::attention_with_scores_workspace(sizes));
  cuda::attention_with_scores<T>(sizes, tokens<T>(qkv), mutable_data<T>(out), mutable_data<float>(scores),
                                 workspace.data(), current_stream(qkv));
  return true;
}

std::tuple<Tensor, Tensor> attention_with_scores(const Tensor& qkv_any, int64_t num_heads, double scale) {
  check_dim(qkv_any, "qkv", 3, "[B, N, 3 * C]");
  const int64_t batch = qkv_any.size(0), tokens = qkv_any.size(1), width = qkv_any.size(2) / 3;
  STD_TORCH_CHECK(num_heads > 0, "num_heads must be at least 1, got ", num_heads);
  STD_TORCH_CHECK(qkv_any.size(2) > 0 && qkv_any.size(2) % 3 == 0 && width % num_heads == 0,
                  "qkv must have 3 * num_heads * D channels with num_heads = ", num_heads,
                  " and D at least 1, got ", shape_str(qkv_any));
  const ScalarType dtype = qkv_any.scalar_type();
  check_floating(qkv_any, "qkv");
  const AttentionWithScoresSizes sizes = {batch, tokens, num_heads, width / num_heads, scale};
  const Tensor qkv = with_dense_rows(qkv_any);
  Tensor out = empty(qkv, {batch, tokens, width}, dtype);
  Tensor scores = empty(qkv, {batch, tokens}, accumulate_dtype(dtype));
  dispatch(dtype, "attention_with_scores", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kHasCuda && sizeof(T) == 2)
      if (on_cuda(qkv) && run_on_cuda<T>(sizes, qkv, out, scores)) return;
    STD_TORCH_CHECK(qkv.is_cpu(),
                    "attention_with_scores on CUDA takes float16 and bfloat16 with 32, 64 or 128 channels a "
                    "head, got ",
                    torch::headeronly::toString(dtype), " with ", sizes.channels);
    cpu::attention_with_scores<T>(sizes, evit::adapter::tokens<T>(qkv), mutable_data<T>(out),
                                  mutable_data<accumulate_t<T>>(scores), executor());
  });
  return {out, scores};
}

}  // namespace

EVIT_REGISTER(m) { m.impl("attention_with_scores", TORCH_BOX(&attention_with_scores)); }

}  // namespace evit::adapter
