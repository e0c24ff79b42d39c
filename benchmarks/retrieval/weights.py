"""The weights of an exported DINOv2 of transformers, from its ONNX file, under timm's names.

Biases, norms and scales have their names in such a file. The weights of linear layers are transposed and have
none; each is found by the node that multiplies by it, which is named after its module.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

#: Names in transformers' DINOv2, and in timm's VisionTransformer; the first that fits counts.
RENAMED = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"layernorm\.", "norm."),
)
BACKBONE = "backbone."


def state_dict(file: Path, side: int) -> dict[str, Tensor]:
    """Return the weights for a ViT of timm without a head.

    Args:
        file: ONNX, exported from a model whose attribute `backbone` is transformers' Dinov2Model.
        side: pixels of the images; the position embedding is resized for them as transformers does it,
            bicubically and without antialiasing.
    """
    graph = onnx.load(file).graph
    tensors = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    named = {name: tensor for name, tensor in tensors.items() if name.startswith(BACKBONE)}
    for node in graph.node:
        if (
            node.op_type == "MatMul"
            and node.name.startswith("/backbone/encoder/")
            and node.input[1] in tensors
        ):
            module = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = tensors[node.input[1]].T
    found = {}
    for name, tensor in named.items():
        short = name.removeprefix(BACKBONE)
        pattern, replacement = next(pair for pair in RENAMED if re.match(pair[0], short))
        found[re.sub(pattern, replacement, short)] = tensor
    for number in sorted({name.split(".")[1] for name in found if name.startswith("blocks.")}):
        for kind in ("weight", "bias"):
            parts = [
                f"blocks.{number}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")
            ]
            found[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat([found.pop(part) for part in parts])
    patch = found["patch_embed.proj.weight"].shape[-1]
    found["pos_embed"] = _positions(graph, tensors, side // patch)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _positions(graph: onnx.GraphProto, tensors: dict[str, Tensor], rows: int) -> Tensor:
    """Return the position embedding for `rows` × `rows` patches, [1, 1 + rows², C].

    The exporter has split it in two constants: that of the class token, and those of the patches.
    """
    used = [
        name for node in graph.node if node.name.startswith("/backbone/embeddings/") for name in node.input
    ]
    nameless = [tensors[name] for name in dict.fromkeys(used) if name in tensors and "." not in name]
    (first,) = [tensor for tensor in nameless if tensor.shape[:2] == (1, 1)]
    (patches,) = [tensor for tensor in nameless if tensor.dim() == 3 and tensor.shape[1] > 1]
    grid = round(patches.shape[1] ** 0.5)
    square = patches.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(rows, rows), mode="bicubic", align_corners=False)
    return torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1)


def difference(vit: nn.Module, file: Path, images: Tensor) -> float:
    """Return by how much the class tokens after the last norm differ at most from ONNX Runtime's.

    Args:
        vit: with the file's weights.
        file: what :func:`state_dict` read.
        images: [B, 3, side, side].
    """
    import onnxruntime

    model = onnx.load(file)
    (last,) = [node.output[0] for node in model.graph.node if f"{BACKBONE}layernorm.bias" in node.input]
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (tokens,) = session.run([last], {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        return (vit(images) - torch.from_numpy(tokens)[:, 0]).abs().max().item()
