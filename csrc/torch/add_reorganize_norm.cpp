#include "../evit/add_reorganize_norm.h"

#include <optional>
#include <tuple>

#include "reorganize_tokens.h"

namespace evit::adapter {
namespace {

// The LayerNorm's weight or bias, dense; raises unless it is [C] in the dtype of x.
std::optional<Tensor> parameter(const std::optional<Tensor>& given, const char* name, const Tensor& x) {
  if (!given.has_value()) return std::nullopt;
  check_dim(*given, name, 1, "[C]");
  check_same_dtype(*given, name, x, "x");
  check_same_device(*given, name, x, "x");
  STD_TORCH_CHECK(given->size(0) == x.size(2), name, " must have shape [C] of x, got ", shape_str(*given),
                  " for x ", shape_str(x));
  return with_dense_rows(*given);
}

std::tuple<Tensor, Tensor, Tensor> add_reorganize_norm(const Tensor& x_any, const Tensor& branch_any,
                                                       const Tensor& scores_any, int64_t num_keep,
                                                       const std::optional<Tensor>& weight_any,
                                                       const std::optional<Tensor>& bias_any, double eps,
                                                       int64_t num_prefix_tokens, bool fuse) {
  const ReorganizeSizes sizes = check_reorganize(x_any, scores_any, num_keep, num_prefix_tokens, fuse);
  STD_TORCH_CHECK(sizes.channels >= 1, "x must have at least one channel, got ", shape_str(x_any));
  check_dim(branch_any, "branch", 3, "[B, N, C]");
  check_same_dtype(branch_any, "branch", x_any, "x");
  check_same_device(branch_any, "branch", x_any, "x");
  STD_TORCH_CHECK(branch_any.size(0) == sizes.batch && branch_any.size(1) == sizes.tokens &&
                      branch_any.size(2) == sizes.channels,
                  "branch must have the shape of x, got ", shape_str(branch_any), " for x ",
                  shape_str(x_any));
  const std::optional<Tensor> weight = parameter(weight_any, "weight", x_any);
  const std::optional<Tensor> bias = parameter(bias_any, "bias", x_any);
  const Tensor x = with_dense_rows(x_any), branch = with_dense_rows(branch_any);
  // float16 and bfloat16 scores are selected as float32, which represents all their values.
  const Tensor scores = to_dtype(scores_any, accumulate_dtype(scores_any.scalar_type()));
  const int64_t skip = scores.size(1) - sizes.patches();
  Tensor out = empty(x, {sizes.batch, sizes.out_tokens(), sizes.channels}, x.scalar_type());
  Tensor normed = empty(x, {sizes.batch, sizes.out_tokens(), sizes.channels}, x.scalar_type());
  Tensor kept = empty(x, {sizes.batch, num_keep}, ScalarType::Long);
  dispatch_pair(x, scores, "add_reorganize_norm", [&](auto x_zero, auto scores_zero) {
    using T = decltype(x_zero);
    using S = decltype(scores_zero);
    const LayerNorm<T> norm = {weight ? data<T>(*weight) : nullptr, bias ? data<T>(*bias) : nullptr, eps};
    if constexpr (kHasCuda)
      if (on_cuda(x)) {
        const Workspace workspace(x, cuda::reorganize_tokens_workspace<T, S>(sizes));
        return cuda::add_reorganize_norm<T, S>(
            sizes, tokens<T>(x), tokens<T>(branch), tokens<S>(scores, skip), norm, mutable_data<T>(out),
            mutable_data<T>(normed), mutable_data<int64_t>(kept), workspace.data(), current_stream(x));
      }
    cpu::add_reorganize_norm<T, S>(sizes, tokens<T>(x), tokens<T>(branch), tokens<S>(scores, skip), norm,
                                   mutable_data<T>(out), mutable_data<T>(normed), mutable_data<int64_t>(kept),
                                   executor());
  });
  return {out, normed, kept};
}

}  // namespace

EVIT_REGISTER(m) { m.impl("add_reorganize_norm", TORCH_BOX(&add_reorganize_norm)); }

}  // namespace evit::adapter
