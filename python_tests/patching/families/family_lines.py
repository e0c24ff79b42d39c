"""The lines of docs/supported-models.md: a small model of each, with weights on which mistakes show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import evit_ext

DOCS = Path(__file__).parents[3] / "docs" / "supported-models.md"

#: Blocks and keep rates of most tests here: the first and the last block, neighbours, unequal rates.
DROP_LOC, RATES = (0, 1, 3), (0.8, 0.7, 0.45)

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        name: as in the documentation.
        family: of the package: "vit", "eva" or "beit".
        timm_name: the model that is built.
        arguments: what is given to it beside `SMALL`; None takes one of those away.
        change: what is done to the model that no argument does.
        size: height and width of the images.
    """

    name: str
    family: str
    timm_name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], None] | None = None
    size: tuple[int, int] = (32, 32)

    def build(self, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
        """Return the same model each time, in eval mode."""
        torch.manual_seed(1)
        arguments = {**SMALL, "num_classes": 5, **self.arguments, **arguments}
        vit = timm.create_model(self.timm_name, **{k: v for k, v in arguments.items() if v is not None})
        evit_ext.remove(vit)  # LV-ViT's entry point applies
        if self.change is not None:
            self.change(vit)
        redraw(vit)
        return vit.to(dtype).eval()

    def of_depth(self, depth: int) -> dict[str, Any]:
        """Return the arguments of :meth:`build` for another depth."""
        arguments: dict[str, Any] = {"depth": depth}
        if "num_kv_heads" in self.arguments:  # which are told for each block
            arguments["num_kv_heads"] = self.arguments["num_kv_heads"][:depth]
        return arguments

    def images(self, batch: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Return random images [batch, 3, height, width]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, *self.size, dtype=dtype, generator=generator)


def redraw(vit: nn.Module) -> None:
    """Draw all weights anew, so large that each of them tells on the logits.

    Of timm's own, many are zeros, or so small that they do not: bias tables, layer scales, heads, tokens.
    """
    for module in vit.modules():
        is_norm = "Norm" in type(module).__name__ or type(module).__name__.startswith("BatchNorm")
        for name, parameter in module.named_parameters(recurse=False):
            if name == "freqs":  # of rotary embeddings: angles by the pixel, which are as they should be
                continue
            if is_norm:
                nn.init.normal_(parameter, mean=float(name == "weight"), std=0.2)
            elif name.startswith("gamma"):  # layer scales
                nn.init.uniform_(parameter, 0.5, 1.0)
            elif parameter.dim() == 1:
                nn.init.normal_(parameter, std=0.3)
            elif name in (
                "relative_position_bias_table",
                "pos_embed",
                "cls_token",
                "dist_token",
                "reg_token",
            ):
                nn.init.normal_(parameter)
            else:
                nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "k_bias":
                buffer.normal_(std=0.3)
            elif name == "running_mean":
                buffer.normal_(std=0.1)
            elif name == "running_var":
                buffer.uniform_(0.5, 1.5)


def _gate(vit: Any) -> None:
    for block in vit.blocks:
        attention = block.attn
        attention.gate = nn.Linear(vit.embed_dim, attention.num_heads * attention.head_dim)


LINES = [
    Line("ViT, AugReg", "vit", "vit_tiny_patch16_224.augreg_in21k"),
    Line("DeiT", "vit", "deit_tiny_patch16_224.fb_in1k"),
    Line("DeiT, distilled", "vit", "deit_tiny_distilled_patch16_224.fb_in1k"),
    Line("DeiT III", "vit", "deit3_small_patch16_224.fb_in1k"),
    Line("MAE", "vit", "vit_base_patch16_224.mae", {"global_pool": "avg"}),
    Line("CLIP", "vit", "vit_base_patch32_clip_224.openai"),
    Line("CLIP, QuickGELU", "vit", "vit_base_patch32_clip_quickgelu_224.openai"),
    Line("DINO", "vit", "vit_small_patch16_224.dino"),
    Line("DINOv2", "vit", "vit_small_patch14_dinov2.lvd142m"),
    Line("DINOv2 with registers", "vit", "vit_small_patch14_reg4_dinov2.lvd142m"),
    Line("normalised queries and keys", "vit", "vit_tiny_patch16_224", {"qk_norm": True}),
    Line("BEiT-3", "vit", "beit3_base_patch16_224.in22k_ft_in1k"),
    Line("gated attention", "vit", "vit_tiny_patch16_224", change=_gate),
    Line("average pooling", "vit", "vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    Line("attention pooling", "vit", "vit_tiny_patch16_224", {"global_pool": "map"}),
    Line("patch dropout", "vit", "vit_tiny_patch16_224", {"patch_drop_rate": 0.3}),
    Line("other image sizes", "vit", "vit_tiny_patch16_224", {"dynamic_img_size": True}, size=(40, 56)),
    Line("norms after the branches", "vit", "vit_base_patch16_rpn_224.sw_in1k"),
    Line("SigLIP", "vit", "vit_base_patch16_siglip_224.webli"),
    Line("SigLIP, average pooling", "vit", "vit_base_patch16_siglip_gap_224.webli"),
    Line("registers without class token", "vit", "vit_medium_patch16_reg4_gap_256.sbb_in12k"),
    Line("AIMv2", "vit", "aimv2_large_patch14_224.apple_pt"),
    Line(
        "hybrid with a ResNet",
        "vit",
        "vit_tiny_r_s16_p8_224.augreg_in21k",
        {"img_size": 64, "patch_size": 4},
        size=(64, 64),
    ),
    Line("LV-ViT", "vit", "evit_lvvit_t_patch16_224", {"stem_dim": 8}),
    Line("EVA", "eva", "eva_giant_patch14_224"),
    Line("EVA-02", "eva", "eva02_tiny_patch14_224.mim_in22k"),
    Line("EVA-02, separate projections", "eva", "eva02_base_patch14_224.mim_in22k"),
    Line("EVA-02 CLIP", "eva", "eva02_base_patch16_clip_224.merged2b"),
    Line("EVA-02 CLIP, norms after the branches", "eva", "eva02_enormous_patch14_clip_224.laion2b"),
    Line("ViT with axial rotary embeddings", "eva", "vit_small_patch16_rope_224.naver_in1k"),
    Line("ViT with mixed rotary embeddings", "eva", "vit_small_patch16_rope_mixed_224.naver_in1k"),
    Line("rotary embeddings without class token", "eva", "vit_medium_patch16_rope_reg1_gap_256.sbb_in1k"),
    Line("Perception Encoder", "eva", "vit_pe_core_tiny_patch16_384.fb"),
    Line("Perception Encoder, spatial", "eva", "vit_pe_spatial_tiny_patch16_512.fb"),
    Line("DINOv3", "eva", "vit_small_patch16_dinov3.lvd1689m", size=(40, 56)),
    Line("DINOv3, SwiGLU", "eva", "vit_small_plus_patch16_dinov3.lvd1689m"),
    Line("Sapiens 2", "eva", "vit_base_patch16_sapiens2", {"num_heads": 4, "num_kv_heads": (4, 2, 2, 4)}),
    Line(
        "rotary embeddings of three sections",
        "eva",
        "eva02_tiny_patch14_224",
        {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3)},
    ),
    Line("rotary embeddings, patch dropout", "eva", "eva02_tiny_patch14_224", {"patch_drop_rate": 0.3}),
    Line(
        "mixed rotary embeddings, patch dropout",
        "eva",
        "vit_small_patch16_rope_mixed_ape_224",
        {"patch_drop_rate": 0.3},
    ),
    Line("BEiT", "beit", "beit_base_patch16_224.in22k_ft_in22k"),
    Line("BEiT v2", "beit", "beitv2_base_patch16_224.in1k_ft_in22k"),
    Line(
        "shared relative position bias",
        "beit",
        "beit_base_patch16_224",
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    Line(
        "own and shared relative position bias",
        "beit",
        "beit_base_patch16_224",
        {"use_shared_rel_pos_bias": True},
    ),
    Line("no relative position bias", "beit", "beit_base_patch16_224", {"use_rel_pos_bias": False}),
]


def of(family: str) -> list[Line]:
    """Return the lines of a family."""
    return [line for line in LINES if line.family == family]


def named(*names: str) -> Any:
    """Parametrize `line` with the lines of these names."""
    chosen = [line for name in names for line in LINES if line.name == name]
    assert len(chosen) == len(names)
    return pytest.mark.parametrize("line", chosen, ids=names)


def drops_patches(line: Line) -> bool:
    return "patch_drop_rate" in line.arguments


def tensors(out: Any) -> list[Tensor]:
    """The floating tensors of an output: LV-ViT's is several in training."""
    return [t for t in ((out,) if isinstance(out, Tensor) else out) if t.is_floating_point()]


def loss(out: Any) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors(out)]).sum()


def forward(vit: Any, x: Tensor, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return vit(x)


def attributes(vit: nn.Module) -> dict[str, Any]:
    """All that the modules of `vit` hold, hooks included, by name."""
    return {
        f"{name}.{attribute}": dict(value) if isinstance(value, dict) else value
        for name, module in vit.named_modules()
        for attribute, value in vars(module).items()
    }
