#include "../evit/restore_tokens.h"

#include <optional>

#include "reorganize_tokens.h"

namespace evit::adapter {
namespace {

// The sizes of the operator between in_tokens rows, as reorganize_tokens returns them, and num_tokens rows
// with every patch; `like` is the tensor of one of them. Raises if kept or a number does not fit.
RestoreSizes check_restore(const Tensor& like, const char* name, const Tensor& kept, int64_t in_tokens,
                           int64_t num_tokens, int64_t num_prefix_tokens, bool fill_fused) {
  check_dim(kept, "kept", 2, "[B, K]");
  check_floating(like, name);
  STD_TORCH_CHECK(kept.scalar_type() == ScalarType::Long, "kept must be int64, got ",
                  torch::headeronly::toString(kept.scalar_type()));
  check_same_device(kept, "kept", like, name);
  const int64_t keep = kept.size(1);
  STD_TORCH_CHECK(kept.size(0) == like.size(0), "kept must have the batch size of ", name, ", got ",
                  shape_str(kept), " and ", shape_str(like));
  STD_TORCH_CHECK(num_prefix_tokens >= 0 && num_prefix_tokens <= num_tokens,
                  "num_prefix_tokens must be in [0, ", num_tokens, "], got ", num_prefix_tokens);
  const int64_t num_patches = num_tokens - num_prefix_tokens;
  STD_TORCH_CHECK(keep <= num_patches, "num_patches must be at least K = ", keep, ", got ", num_patches);
  const int64_t with_fused = in_tokens - num_prefix_tokens - keep;
  STD_TORCH_CHECK(with_fused == 0 || with_fused == 1, "tokens must have P + K = ", num_prefix_tokens + keep,
                  " tokens, or one more that is fused, got ", in_tokens);
  STD_TORCH_CHECK(!fill_fused || (with_fused == 1 && keep < num_patches),
                  "a fused token can fill only where it is there and a patch was dropped, got ", in_tokens,
                  " tokens and kept ", shape_str(kept), " for ", num_patches, " patches");
  return {like.size(0), num_tokens, num_prefix_tokens, keep, like.size(2), with_fused == 1};
}

Tensor restore_tokens(const Tensor& tokens_any, const Tensor& kept_any, int64_t num_patches,
                      int64_t num_prefix_tokens, bool fill_fused, const std::optional<Tensor>& fill_any) {
  check_dim(tokens_any, "tokens", 3, "[B, P + K (+ 1), C]");
  STD_TORCH_CHECK(num_prefix_tokens >= 0 && num_prefix_tokens <= tokens_any.size(1),
                  "num_prefix_tokens must be in [0, ", tokens_any.size(1), "], got ", num_prefix_tokens);
  int64_t num_tokens;
  STD_TORCH_CHECK(num_patches >= 0 && !__builtin_add_overflow(num_patches, num_prefix_tokens, &num_tokens),
                  "num_patches must be at least K, got ", num_patches);
  const RestoreSizes sizes = check_restore(tokens_any, "tokens", kept_any, tokens_any.size(1), num_tokens,
                                           num_prefix_tokens, fill_fused);
  if (fill_any) {
    check_dim(*fill_any, "fill", 3, "[B, P + num_patches, C]");
    check_same_dtype(*fill_any, "fill", tokens_any, "tokens");
    check_same_device(*fill_any, "fill", tokens_any, "tokens");
    STD_TORCH_CHECK(!fill_fused, "either the fused token or a tensor can fill, not both");
    STD_TORCH_CHECK(fill_any->size(0) == sizes.batch && fill_any->size(1) == num_tokens &&
                        fill_any->size(2) == sizes.channels,
                    "fill must have shape [B, P + num_patches, C], got ", shape_str(*fill_any),
                    " for tokens ", shape_str(tokens_any), ", P = ", num_prefix_tokens,
                    " and num_patches = ", num_patches);
  }
  const Tensor x = with_dense_rows(tokens_any);
  const Tensor kept = torch::stable::contiguous(kept_any);
  if (x.is_cpu()) check_ascending(kept, num_patches);
  const std::optional<Tensor> given = fill_any ? std::optional(with_dense_rows(*fill_any)) : std::nullopt;
  Tensor out = empty(x, {sizes.batch, num_tokens, sizes.channels}, x.scalar_type());
  dispatch(x.scalar_type(), "restore_tokens", [&](auto zero) {
    using T = decltype(zero);
    Tokens<T> fill = {nullptr, 0, 0};
    if (given)
      fill = tokens<T>(*given);
    else if (fill_fused)  // the same row at every place
      fill = {tokens<T>(x, sizes.in_tokens() - 1).data, x.stride(0), 0};
    if constexpr (kHasCuda)
      if (on_cuda(x))
        return cuda::restore_tokens<T>(sizes, tokens<T>(x), data<int64_t>(kept), fill, mutable_data<T>(out),
                                       current_stream(x));
    cpu::restore_tokens<T>(sizes, tokens<T>(x), data<int64_t>(kept), fill, mutable_data<T>(out), executor());
  });
  return out;
}

Tensor restore_tokens_backward(const Tensor& grad_any, const Tensor& kept_any, int64_t num_tokens,
                               int64_t num_prefix_tokens, bool fill_fused) {
  check_dim(grad_any, "grad", 3, "[B, P + num_patches, C]");
  STD_TORCH_CHECK(num_tokens >= 0, "num_tokens must not be negative, got ", num_tokens);
  const RestoreSizes sizes =
      check_restore(grad_any, "grad", kept_any, num_tokens, grad_any.size(1), num_prefix_tokens, fill_fused);
  const Tensor grad = with_dense_rows(grad_any);
  const Tensor kept = torch::stable::contiguous(kept_any);
  if (grad.is_cpu()) check_ascending(kept, sizes.patches());
  Tensor grad_tokens = empty(grad, {sizes.batch, num_tokens, sizes.channels}, grad.scalar_type());
  dispatch(grad.scalar_type(), "restore_tokens_backward", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kHasCuda)
      if (on_cuda(grad)) {
        const Workspace workspace(grad, cuda::restore_tokens_backward_workspace<T>(sizes, fill_fused));
        return cuda::restore_tokens_backward<T>(sizes, fill_fused, tokens<T>(grad), data<int64_t>(kept),
                                                mutable_data<T>(grad_tokens), workspace.data(),
                                                current_stream(grad));
      }
    cpu::restore_tokens_backward<T>(sizes, fill_fused, tokens<T>(grad), data<int64_t>(kept),
                                    mutable_data<T>(grad_tokens), executor());
  });
  return grad_tokens;
}

}  // namespace

EVIT_REGISTER(m) {
  m.impl("restore_tokens", TORCH_BOX(&restore_tokens));
  m.impl("restore_tokens_backward", TORCH_BOX(&restore_tokens_backward));
}

}  // namespace evit::adapter
