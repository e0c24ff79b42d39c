"""A rule that nobody knows but this file: it trains, records, restores, saves, exports and is counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch

import evit_ext
from evit_ext.tokens import Plan, Rule, Seen


@dataclass(frozen=True)
class EverySecond(Rule, name="every-second"):
    """Keep every second patch."""

    def num_out(self, num_patches: int, num_image_patches: int) -> int:
        return (num_patches + 1) // 2

    def plan(self, seen: Seen) -> Plan:
        kept = torch.arange(0, seen.num_patches, 2, device=seen.device)
        return Plan(kept.expand(seen.batch, -1), seen.num_patches)


def test_a_rule_is_one_class(tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2, img_size=64)
    dense_macs = evit_ext.count_macs(vit)
    evit_ext.apply(vit, drop_loc=(0, 1), rule=EverySecond())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(vit.parameters(), lr=0.1)  # trains
    for _ in range(3):
        loss = vit.train()(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert vit(images).square().mean() < loss
    with torch.no_grad(), evit_ext.record_tokens(vit.eval()) as record:  # records
        logits = vit(images)
        tokens = vit.forward_features(images)
    assert [kept[0].tolist() for kept in record.kept] == [list(range(0, 16, 2)), list(range(0, 16, 4))]
    restored = record.restore(tokens, num_prefix_tokens=1)  # restores grids
    assert torch.equal(restored[:, ::4], tokens[:, 1:]) and not restored[:, 1::2].any()
    with torch.no_grad():
        (grid,) = vit.forward_intermediates(images, [2], norm=True, intermediates_only=True, fill="zero")
    assert torch.equal(grid.flatten(2).transpose(1, 2), restored)
    evit_ext.save_pretrained(vit, tmp_path / "model")  # saves and loads
    with torch.no_grad():
        assert torch.equal(evit_ext.from_pretrained(tmp_path / "model")(images), logits)
    assert evit_ext.count_macs(vit) < 0.8 * dense_macs  # counts its MACs
    assert [layer.kept for layer in evit_ext.layer_costs(vit) if layer.kept] == [8, 4]
    pytest.importorskip("onnxscript", reason="onnxscript, which writes ONNX, is not installed")
    evit_ext.export.export_model(vit, tmp_path / "model.onnx", "onnx")  # exports, compared with the model
