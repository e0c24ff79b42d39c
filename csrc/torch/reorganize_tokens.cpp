#include "reorganize_tokens.h"

#include <tuple>

namespace evit::adapter {

ReorganizeSizes check_reorganize(const Tensor& x, const Tensor& scores, int64_t num_keep,
                                 int64_t num_prefix_tokens, bool fuse) {
  check_dim(x, "x", 3, "[B, N, C]");
  check_dim(scores, "scores", 2, "[B, N] or [B, N - P]");
  check_floating(x, "x");
  check_floating(scores, "scores");
  const int64_t num_tokens = x.size(1);
  STD_TORCH_CHECK(num_prefix_tokens >= 0 && num_prefix_tokens < num_tokens,
                  "num_prefix_tokens must be in [0, ", num_tokens, "), got ", num_prefix_tokens);
  const int64_t num_patches = num_tokens - num_prefix_tokens;
  STD_TORCH_CHECK(num_keep >= 1 && num_keep <= num_patches, "num_keep must be in [1, ", num_patches,
                  "], got ", num_keep);
  STD_TORCH_CHECK(
      scores.size(0) == x.size(0) && (scores.size(1) == num_tokens || scores.size(1) == num_patches),
      "scores must have shape [B, N] or [B, N - P] of x, got ", shape_str(scores), " for x ", shape_str(x),
      " with P = ", num_prefix_tokens);
  check_same_device(scores, "scores", x, "x");
  // If every patch is kept there is nothing to fuse.
  return {x.size(0), num_tokens, num_prefix_tokens, num_keep, x.size(2), fuse && num_keep < num_patches};
}

void check_ascending(const Tensor& kept, int64_t num_patches) {
  const int64_t* value = data<int64_t>(kept);
  for (int64_t b = 0; b < kept.size(0); ++b) {
    int64_t last = -1;
    for (int64_t i = 0; i < kept.size(1); ++i, ++value) {
      STD_TORCH_CHECK(*value > last && *value < num_patches, "kept must be ascending and in [0, ",
                      num_patches, "), got ", *value, " after ", last);
      last = *value;
    }
  }
}

namespace {

std::tuple<Tensor, Tensor> reorganize_tokens(const Tensor& x_any, const Tensor& scores_any, int64_t num_keep,
                                             int64_t num_prefix_tokens, bool fuse) {
  const ReorganizeSizes sizes = check_reorganize(x_any, scores_any, num_keep, num_prefix_tokens, fuse);
  const Tensor x = with_dense_rows(x_any);
  // float16 and bfloat16 scores are selected as float32, which represents all their values.
  const Tensor scores = to_dtype(scores_any, accumulate_dtype(scores_any.scalar_type()));
  const int64_t skip = scores.size(1) - sizes.patches();
  Tensor out = empty(x, {sizes.batch, sizes.out_tokens(), sizes.channels}, x.scalar_type());
  Tensor kept = empty(x, {sizes.batch, num_keep}, ScalarType::Long);
  dispatch_pair(x, scores, "reorganize_tokens", [&](auto x_zero, auto scores_zero) {
    using T = decltype(x_zero);
    using S = decltype(scores_zero);
    if constexpr (kHasCuda)
      if (on_cuda(x)) {
        const Workspace workspace(x, cuda::reorganize_tokens_workspace<T, S>(sizes));
        return cuda::reorganize_tokens<T, S>(sizes, tokens<T>(x), tokens<S>(scores, skip),
                                             mutable_data<T>(out), mutable_data<int64_t>(kept),
                                             workspace.data(), current_stream(x));
      }
    cpu::reorganize_tokens<T, S>(sizes, tokens<T>(x), tokens<S>(scores, skip), mutable_data<T>(out),
                                 mutable_data<int64_t>(kept), executor());
  });
  return {out, kept};
}

std::tuple<Tensor, Tensor> reorganize_tokens_backward(const Tensor& grad_any, const Tensor& x_any,
                                                      const Tensor& scores_any, const Tensor& kept_any,
                                                      int64_t num_prefix_tokens) {
  check_dim(kept_any, "kept", 2, "[B, K]");
  STD_TORCH_CHECK(kept_any.scalar_type() == ScalarType::Long, "kept must be int64, got ",
                  torch::headeronly::toString(kept_any.scalar_type()));
  const ReorganizeSizes sizes =
      check_reorganize(x_any, scores_any, kept_any.size(1), num_prefix_tokens, true);
  STD_TORCH_CHECK(sizes.keep < sizes.patches() && kept_any.size(0) == sizes.batch,
                  "kept must have shape [B, K] with K < N - P, got ", shape_str(kept_any), " for x ",
                  shape_str(x_any));
  check_dim(grad_any, "grad_tokens", 3, "[B, P + K + 1, C]");
  check_same_dtype(grad_any, "grad_tokens", x_any, "x");
  STD_TORCH_CHECK(grad_any.size(0) == sizes.batch && grad_any.size(1) == sizes.out_tokens() &&
                      grad_any.size(2) == sizes.channels,
                  "grad_tokens must have shape [B, P + K + 1, C], got ", shape_str(grad_any), " for x ",
                  shape_str(x_any), " and kept ", shape_str(kept_any));
  check_same_device(grad_any, "grad_tokens", x_any, "x");
  check_same_device(kept_any, "kept", x_any, "x");
  const Tensor grad = with_dense_rows(grad_any), x = with_dense_rows(x_any);
  const Tensor kept = torch::stable::contiguous(kept_any);
  if (x.is_cpu()) check_ascending(kept, sizes.patches());
  const Tensor scores = to_dtype(scores_any, accumulate_dtype(x.scalar_type()));
  const int64_t width = scores.size(1), skip = width - sizes.patches();
  Tensor grad_x = empty(x, {sizes.batch, sizes.tokens, sizes.channels}, x.scalar_type());
  Tensor grad_scores = empty(x, {sizes.batch, width}, scores.scalar_type());
  dispatch(x.scalar_type(), "reorganize_tokens_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    if constexpr (kHasCuda)
      if (on_cuda(x))
        return cuda::reorganize_tokens_backward<T>(
            sizes, tokens<T>(grad), tokens<T>(x), tokens<A>(scores, skip), data<int64_t>(kept),
            mutable_data<T>(grad_x), mutable_data<A>(grad_scores), skip, current_stream(x));
    cpu::reorganize_tokens_backward<T>(sizes, tokens<T>(grad), tokens<T>(x), tokens<A>(scores, skip),
                                       data<int64_t>(kept), mutable_data<T>(grad_x),
                                       mutable_data<A>(grad_scores), skip, executor());
  });
  return {grad_x, to_dtype(grad_scores, scores_any.scalar_type())};
}

}  // namespace

EVIT_REGISTER(m) {
  m.impl("reorganize_tokens", TORCH_BOX(&reorganize_tokens));
  m.impl("reorganize_tokens_backward", TORCH_BOX(&reorganize_tokens_backward));
}

}  // namespace evit::adapter
