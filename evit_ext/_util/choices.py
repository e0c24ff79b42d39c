"""What commands may be asked for, by name."""

#: How a model is run: as it is, compiled by torch.compile, or replayed from a CUDA graph, which needs a GPU.
MODES = ("eager", "compile", "cudagraph")
#: A forward without gradients; or forward, backward and a step of AdamW.
TASKS = ("inference", "training")
#: What runs a model on the CPU: PyTorch as it is, torch.compile with weights as constants, and the engines
#: that run exported files. The first is the one where none is asked for.
ENGINES = ("torch", "torch-compile", "onnxruntime", "openvino")
