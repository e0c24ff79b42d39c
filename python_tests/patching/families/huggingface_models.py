"""Small models of transformers, for the lines of the table in the documentation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {**SIZES, "vocab_size": 50, "eos_token_id": 1, "bos_token_id": 0}

#: For each line of the table in the documentation: the class, its configuration, the number of prefix tokens
#: and whether there is a class token.
LINES: dict[str, tuple[str, str, dict[str, Any], int, bool]] = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {}, 1, True),
    "ViT, pooled": ("ViTModel", "ViTConfig", {"qkv_bias": False}, 1, True),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", {}, 2, True),
    "DeiT, with its teacher's head": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}, 2, True),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", {"mlp_ratio": 2}, 1, True),
    "DINOv2, SwiGLU": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2, "use_swiglu_ffn": True}, 1, True),
    "DINOv2 with registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {"mlp_ratio": 2, "num_register_tokens": 3},
        4,
        True,
    ),
    "CLIP vision": ("CLIPVisionModel", "CLIPVisionConfig", {}, 1, True),
    "CLIP vision, projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {}, 1, True),
    "CLIP, image classification": ("CLIPForImageClassification", "CLIPConfig", {}, 1, True),
    "SigLIP vision": ("SiglipVisionModel", "SiglipVisionConfig", {}, 0, False),
}


def build(line: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A small model of a line, with weights large enough that every token tells on the output."""
    model_name, config_name, arguments, _, _ = LINES[line]
    if config_name == "CLIPConfig":
        config = transformers.CLIPConfig(vision_config={**SIZES, **more}, text_config=TEXT, projection_dim=12)
    else:
        config = getattr(transformers, config_name)(**{**SIZES, **arguments, **more})
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                mean = 0.6 if "lambda" in name else mean  # LayerScale
                parameter.normal_(mean, 0.1, generator=generator)
            else:
                fan_in = parameter[0].numel() if parameter.shape[0] > 1 else 4
                parameter.normal_(0, 1.5 * fan_in**-0.5, generator=generator)
    return model.to(dtype).eval()


def images(batch: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)


def output(model: Any, x: Tensor, **arguments: Any) -> Tensor:
    """What a user of the model looks at."""
    return result(model(pixel_values=x, **arguments))


def result(out: Any) -> Tensor:
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        value = getattr(out, name, None)
        if value is not None:
            return value
    raise AssertionError(type(out))
