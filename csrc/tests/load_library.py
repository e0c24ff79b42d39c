"""Load libevit without the Python module and run its operators, as a C++ program would."""

import sys

import torch

torch.ops.load_library(sys.argv[1])
assert "evit_ext" not in sys.modules
x, scores = torch.randn(2, 9, 5), torch.rand(2, 9)
tokens, kept = torch.ops.evit.reorganize_tokens(x, scores, 3, 1, True)
assert torch.equal(kept, scores[:, 1:].topk(3).indices.sort().values)
assert torch.equal(tokens[:, 1:4], torch.ops.evit.gather_tokens(x, kept + 1))
if sys.argv[2:] == ["cuda"]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("evit::reorganize_tokens", "CUDA")
print("libevit: operators registered and run without Python code of ours")
