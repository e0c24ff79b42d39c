#include "../evit/attention_with_scores.h"

#include <tuple>

#include "stable.h"

namespace evit::adapter {
namespace {

std::tuple<Tensor, Tensor> attention_with_scores(const Tensor& qkv_any, int64_t num_heads, double scale) {
  check_dim(qkv_any, "qkv", 3, "[B, N, 3 * C]");
  const int64_t batch = qkv_any.size(0), tokens = qkv_any.size(1), width = qkv_any.size(2) / 3;
  STD_TORCH_CHECK(num_heads > 0, "num_heads must be at least 1, got ", num_heads);
  STD_TORCH_CHECK(qkv_any.size(2) > 0 && qkv_any.size(2) % 3 == 0 && width % num_heads == 0,
                  "qkv must have 3 * num_heads * D channels with num_heads = ", num_heads,
                  " and D at least 1, got ", shape_str(qkv_any));
  STD_TORCH_CHECK(qkv_any.is_cpu(), "attention_with_scores runs on the CPU");
  const Tensor qkv = with_dense_rows(qkv_any);
  const ScalarType dtype = qkv.scalar_type();
  check_floating(qkv, "qkv");
  Tensor out = empty(qkv, {batch, tokens, width}, dtype);
  Tensor scores = empty(qkv, {batch, tokens}, accumulate_dtype(dtype));
  dispatch(dtype, "attention_with_scores", [&](auto zero) {
    using T = decltype(zero);
    cpu::attention_with_scores<T>({batch, tokens, num_heads, width / num_heads, scale},
                                  evit::adapter::tokens<T>(qkv), mutable_data<T>(out),
                                  mutable_data<accumulate_t<T>>(scores), executor());
  });
  return {out, scores};
}

}  // namespace

// An operator for the CPU alone: a GPU's attention kernels are PyTorch's.
STABLE_TORCH_LIBRARY_IMPL(evit, CPU, m) {
  m.impl("attention_with_scores", TORCH_BOX(&attention_with_scores));
}

}  // namespace evit::adapter
