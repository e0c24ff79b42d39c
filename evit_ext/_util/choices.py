"""What commands may be asked for, by name."""

#: How `evit benchmark` runs a model: as it is, compiled by torch.compile, or from a CUDA graph on a GPU.
MODES = ("eager", "compile", "cudagraph")
#: A forward without gradients; or forward, backward and a step of AdamW.
TASKS = ("inference", "training")
#: How a reduction is spread over the depth: the same share in each block, more in later or in earlier ones.
SCHEDULES = ("constant", "rising", "falling")
#: What runs a model on the CPU: PyTorch as it is, torch.compile with weights as constants, and the engines
#: that run exported files. The first is the one where none is asked for.
ENGINES = ("torch", "torch-compile", "onnxruntime", "openvino")
