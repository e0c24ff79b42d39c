"""The network of the demo: a DeiT that learns from few scans."""

from __future__ import annotations

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer

from evit_ext.data import ClutteredDigits


def build_deit(
    canvas_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int
) -> VisionTransformer:
    """Return a DeiT (class token, learned position embedding) in timm's code, for cluttered digits.

    The position embedding starts from sines and cosines instead of noise: with 1,442 scans there is little to
    learn from that two patches are neighbours.
    """
    model = VisionTransformer(
        img_size=canvas_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        num_classes=ClutteredDigits.num_classes,
    )
    grid = canvas_size // patch_size
    with torch.no_grad():
        waves = build_sincos2d_pos_embed([grid, grid], embed_dim, temperature=100.0)
        position = model.pos_embed
        assert position is not None
        position[:, model.num_prefix_tokens :] = 0.5 * waves
    return model
