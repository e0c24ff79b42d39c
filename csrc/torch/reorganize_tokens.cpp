#include "../evit/reorganize_tokens.h"

#include <tuple>

#include "stable.h"

namespace evit::adapter {
namespace {

ReorganizeSizes check(const Tensor& x, const Tensor& scores, int64_t num_keep, int64_t num_prefix_tokens,
                      bool fuse) {
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
  return {x.size(0), num_tokens, num_prefix_tokens, num_keep, x.size(2), fuse};
}

// Calls body(T{}, S{}) with the element types of x and of the scores, which are float or double by now.
template <typename Body>
void dispatch_pair(const Tensor& x, const Tensor& scores, const Body& body) {
  dispatch(x.scalar_type(), "reorganize_tokens", [&](auto zero) {
    if (scores.scalar_type() == ScalarType::Double)
      body(zero, double{});
    else
      body(zero, float{});
  });
}

// The backward kernel looks for kept tokens in one ascending pass: anything else would leave rows unwritten.
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

Tensor identity_index(const Tensor& like, int64_t batch, int64_t count) {
  Tensor index = empty(like, {batch, count}, ScalarType::Long);
  int64_t* out = mutable_data<int64_t>(index);
  for (int64_t i = 0; i < batch * count; ++i) out[i] = i % count;
  return index;
}

std::tuple<Tensor, Tensor> reorganize_tokens_cpu(const Tensor& x_any, const Tensor& scores_any,
                                                 int64_t num_keep, int64_t num_prefix_tokens, bool fuse) {
  const ReorganizeSizes sizes = check(x_any, scores_any, num_keep, num_prefix_tokens, fuse);
  if (num_keep == sizes.patches()) {
    Tensor out = empty(x_any, {sizes.batch, sizes.tokens, sizes.channels}, x_any.scalar_type());
    torch::stable::copy_(out, x_any);
    return {out, identity_index(x_any, sizes.batch, num_keep)};
  }
  const Tensor x = with_dense_rows(x_any);
  // float16 and bfloat16 scores are selected by their values in float32, which has them all.
  const Tensor scores = to_dtype(scores_any, accumulate_dtype(scores_any.scalar_type()));
  const int64_t skip = scores.size(1) - sizes.patches();
  Tensor out = empty(x, {sizes.batch, sizes.out_tokens(), sizes.channels}, x.scalar_type());
  Tensor kept = empty(x, {sizes.batch, num_keep}, ScalarType::Long);
  dispatch_pair(x, scores, [&](auto x_zero, auto scores_zero) {
    using T = decltype(x_zero);
    using S = decltype(scores_zero);
    cpu::reorganize_tokens<T, S>(sizes, tokens<T>(x), tokens<S>(scores, skip), mutable_data<T>(out),
                                 mutable_data<int64_t>(kept), executor());
  });
  return {out, kept};
}

std::tuple<Tensor, Tensor> reorganize_tokens_backward_cpu(const Tensor& grad_any, const Tensor& x_any,
                                                          const Tensor& scores_any, const Tensor& kept_any,
                                                          int64_t num_prefix_tokens) {
  check_dim(kept_any, "kept", 2, "[B, K]");
  STD_TORCH_CHECK(kept_any.scalar_type() == ScalarType::Long, "kept must be int64, got ",
                  torch::headeronly::toString(kept_any.scalar_type()));
  const ReorganizeSizes sizes = check(x_any, scores_any, kept_any.size(1), num_prefix_tokens, true);
  STD_TORCH_CHECK(sizes.keep < sizes.patches() && kept_any.size(0) == sizes.batch,
                  "kept must have shape [B, K] with K < N - P, got ", shape_str(kept_any), " for x ",
                  shape_str(x_any));
  check_dim(grad_any, "grad_tokens", 3, "[B, P + K + 1, C]");
  check_same_dtype(grad_any, "grad_tokens", x_any, "x");
  STD_TORCH_CHECK(grad_any.size(0) == sizes.batch && grad_any.size(1) == sizes.out_tokens() &&
                      grad_any.size(2) == sizes.channels,
                  "grad_tokens must have shape [B, P + K + 1, C], got ", shape_str(grad_any), " for x ",
                  shape_str(x_any), " and kept ", shape_str(kept_any));
  const Tensor grad = with_dense_rows(grad_any), x = with_dense_rows(x_any);
  const Tensor kept = torch::stable::contiguous(kept_any);
  check_ascending(kept, sizes.patches());
  const ScalarType scores_dtype = accumulate_dtype(scores_any.scalar_type());
  const Tensor scores = to_dtype(scores_any, scores_dtype);
  const int64_t width = scores.size(1), skip = width - sizes.patches();
  Tensor grad_x = empty(x, {sizes.batch, sizes.tokens, sizes.channels}, x.scalar_type());
  Tensor grad_scores = empty(x, {sizes.batch, width}, scores_dtype);
  dispatch_pair(x, scores, [&](auto x_zero, auto scores_zero) {
    using T = decltype(x_zero);
    using S = decltype(scores_zero);
    S* out = mutable_data<S>(grad_scores);
    for (int64_t b = 0; b < sizes.batch; ++b)
      for (int64_t n = 0; n < skip; ++n) out[b * width + n] = 0;  // the scores of prefix tokens do not count
    cpu::reorganize_tokens_backward<T, S>(sizes, tokens<T>(grad), tokens<T>(x), tokens<S>(scores, skip),
                                          data<int64_t>(kept), mutable_data<T>(grad_x), out + skip, width,
                                          executor());
  });
  return {grad_x, to_dtype(grad_scores, scores_any.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evit, CPU, m) {
  m.impl("reorganize_tokens", TORCH_BOX(&reorganize_tokens_cpu));
  m.impl("reorganize_tokens_backward", TORCH_BOX(&reorganize_tokens_backward_cpu));
}

}  // namespace evit::adapter
