"""What may be chosen by name, for those who must not import torch."""

#: How `evit benchmark` runs a model: as it is, compiled by torch.compile, or from a CUDA graph on a GPU.
MODES = ("eager", "compile", "cudagraph")
#: A forward without gradients; or forward, backward and a step of AdamW.
TASKS = ("inference", "training")
#: How a reduction is spread over the depth: the same share in each block, more in later or in earlier ones.
SCHEDULES = ("constant", "rising", "falling")
