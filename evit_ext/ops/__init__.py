"""The operators: attention, scores, token gather, scatter, fusion, merging, reorganisation and its inverse.

Each is a C++ operator (``torch.ops.evit.<name>``) with shape inference for tracing, a gradient, and a twin in
:mod:`evit_ext.ops.reference` that also runs on devices without a kernel. All take float32, float16, bfloat16
and float64, any strides and any batch size including 0, and work under autocast, ``torch.compile`` and
``torch.export``. Under the transforms of ``torch.func`` and in forward-mode differentiation the reference
runs.
"""

from evit_ext.ops import reference
from evit_ext.ops.add_reorganize_norm import add_reorganize_norm
from evit_ext.ops.attention_with_scores import attention_with_scores
from evit_ext.ops.bipartite_matching import bipartite_matching
from evit_ext.ops.class_attention import class_attention
from evit_ext.ops.fuse_tokens import fuse_tokens
from evit_ext.ops.gather_tokens import gather_tokens
from evit_ext.ops.library import use_reference
from evit_ext.ops.mean_attention import mean_attention
from evit_ext.ops.merge_tokens import merge_tokens
from evit_ext.ops.reorganize_tokens import reorganize_tokens
from evit_ext.ops.restore_tokens import restore_tokens
from evit_ext.ops.scatter_tokens import scatter_tokens

__all__ = [
    "add_reorganize_norm",
    "attention_with_scores",
    "bipartite_matching",
    "class_attention",
    "fuse_tokens",
    "gather_tokens",
    "mean_attention",
    "merge_tokens",
    "reference",
    "reorganize_tokens",
    "restore_tokens",
    "scatter_tokens",
    "use_reference",
]
