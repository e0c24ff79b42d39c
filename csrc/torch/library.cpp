// The operators' schemas. Scalars are int64_t, double and bool in C++: the boxing does not check their types.
#include "stable.h"

STABLE_TORCH_LIBRARY(evit, m) {
  m.def("class_attention(Tensor q, Tensor k, float scale, Tensor? logsumexp=None) -> Tensor");
  m.def("class_attention_backward(Tensor grad_scores, Tensor q, Tensor k, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_with_scores(Tensor qkv, SymInt num_heads, float scale, Tensor? key_bias=None, bool "
      "mean=False) -> (Tensor, Tensor)");
  m.def(
      "attention_with_scores_backward(Tensor grad_out, Tensor grad_scores, Tensor qkv, SymInt num_heads, "
      "float scale, Tensor? key_bias=None, bool mean=False) -> (Tensor, Tensor)");
  m.def("mean_attention(Tensor q, Tensor k, float scale) -> Tensor");
  m.def("mean_attention_backward(Tensor grad_scores, Tensor q, Tensor k, float scale) -> (Tensor, Tensor)");
  m.def("gather_tokens(Tensor x, Tensor index) -> Tensor");
  m.def("scatter_tokens(Tensor x, Tensor index, SymInt num_tokens) -> Tensor");
  m.def(
      "merge_tokens(Tensor x, Tensor owner, Tensor weights, SymInt num_out, SymInt num_prefix_tokens)"
      " -> (Tensor, Tensor)");
  m.def(
      "merge_tokens_backward(Tensor grad_out, Tensor grad_totals, Tensor x, Tensor owner, Tensor weights,"
      " SymInt num_prefix_tokens) -> (Tensor, Tensor)");
  m.def("bipartite_matching(Tensor keys, SymInt num_out) -> (Tensor, Tensor)");
  m.def("fuse_tokens(Tensor x, Tensor weights, Tensor index) -> Tensor");
  m.def("fuse_tokens_backward(Tensor grad, Tensor x, Tensor weights, Tensor index) -> (Tensor, Tensor)");
  m.def(
      "reorganize_tokens(Tensor x, Tensor scores, SymInt num_keep, SymInt num_prefix_tokens, bool fuse)"
      " -> (Tensor, Tensor)");
  m.def(
      "reorganize_tokens_backward(Tensor grad_tokens, Tensor x, Tensor scores, Tensor kept,"
      " SymInt num_prefix_tokens) -> (Tensor, Tensor)");
  m.def(
      "restore_tokens(Tensor tokens, Tensor kept, SymInt num_patches, SymInt num_prefix_tokens,"
      " bool fill_fused, Tensor? fill=None) -> Tensor");
  m.def(
      "restore_tokens_backward(Tensor grad, Tensor kept, SymInt num_tokens, SymInt num_prefix_tokens,"
      " bool fill_fused) -> Tensor");
  m.def(
      "add_reorganize_norm(Tensor x, Tensor branch, Tensor scores, SymInt num_keep, Tensor? weight,"
      " Tensor? bias, float eps, SymInt num_prefix_tokens, bool fuse) -> (Tensor, Tensor, Tensor)");
}
