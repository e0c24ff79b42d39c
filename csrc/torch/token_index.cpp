#include "token_index.h"

namespace evit::adapter {

GatherSizes check_index(const Tensor& x, const Tensor& index, int64_t tokens, const char* name) {
  check_dim(x, "x", 3, "[B, N, C]");
  check_dim(index, name, 2, "[B, K]");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, name, " must be int64, got ",
                  torch::headeronly::toString(index.scalar_type()));
  check_same_device(index, name, x, "x");
  STD_TORCH_CHECK(index.size(0) == x.size(0), name, " must have the batch size of x, got ", shape_str(index),
                  " and ", shape_str(x));
  const GatherSizes sizes = {x.size(0), tokens, index.size(1), x.size(2)};
  // On CUDA the kernels check the index themselves: the host would have to wait for it.
  if (!x.is_cpu()) return sizes;
  // The Python functions raise an IndexError before this; compiled graphs get here directly.
  const TokenIndex view = token_index(index);
  const int64_t wrong = cpu::first_out_of_range(sizes, view);
  STD_TORCH_CHECK(wrong < 0, name, " must be in [0, ", tokens, "), got ",
                  view.at(wrong / sizes.indices, wrong % sizes.indices));
  return sizes;
}

}  // namespace evit::adapter
