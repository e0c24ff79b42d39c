"""What `evit benchmark` may measure, by name."""

#: How a model is run: as it is, compiled by torch.compile, or replayed from a CUDA graph, which needs a GPU.
MODES = ("eager", "compile", "cudagraph")
#: A forward without gradients; or forward, backward and a step of AdamW.
TASKS = ("inference", "training")
