"""Which classes of transformers are supported, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_models import LINES, SIZES, TEXT, build, images, output, transformers

import evit_ext
from evit_ext.patching import families
from evit_ext.patching.block import ReorganizingBlock

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_text_model_of_clip_is_left_alone() -> None:
    config = transformers.CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    evit_ext.apply(model, 0.6)
    changed = [name for name, module in model.named_modules() if isinstance(module, ReorganizingBlock)]
    assert changed == [f"vision_model.encoder.layers.{number}" for number in (1, 2, 3)]
    tokens = torch.tensor([[0, 5, 7, 1]])
    out = model(input_ids=tokens, pixel_values=images(1))
    assert out.logits_per_image.shape == (1, 1)


def test_masks_are_refused_where_tokens_are_dropped() -> None:
    model = build("ViT")
    x, mask = images(1), torch.ones(1, 17)
    mask[0, 3] = 0
    expected = output(model, x, attention_mask=mask)
    evit_ext.apply(model, 1.0)
    assert torch.equal(output(model, x, attention_mask=mask), expected)
    evit_ext.set_keep_rate(model, 0.6)
    with pytest.raises(NotImplementedError, match="takes no attention mask"):
        output(model, x, attention_mask=mask)


def test_models_that_cannot_be_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            evit_ext.apply(model)

    every = "is not supported: it needs a token for every patch"
    refuse(
        transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SIZES, encoder_stride=8)),
        f"ViTForMaskedImageModeling {every}",
    )
    vitdet = transformers.VitDetConfig(**{**SIZES, "window_block_indices": [0]})
    refuse(transformers.VitDetBackbone(vitdet), f"VitDetBackbone {every}")
    refuse(
        transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES)),
        "ViTMAEModel is not supported: of transformers, evit_ext knows ViTModel, DeiTModel, Dinov2Model",
    )
    model = build("ViT")
    model.vit.layers[2].attention = torch.nn.Identity()
    refuse(model, "the attention of block 2 is a torch.nn.modules.linear.Identity, which is not supported")
    with pytest.raises(ValueError, match="ViTModel has no block that reorganises tokens"):
        evit_ext.set_keep_rate(build("ViT, pooled"), 0.5)
    monkeypatch.setattr(families, "MINIMUM_TRANSFORMERS", (99, 1))
    refuse(build("ViT"), "transformers [0-9.]+ is not supported: .* those of 99.1 and newer")


def documented_classes() -> list[str]:
    text = (Path(__file__).parents[3] / "docs/supported-models.md").read_text()
    section = text.split("## Hugging Face transformers")[1].split("\n## ")[0]
    rows = [row.split("|") for row in section.splitlines() if row.startswith("|")][2:]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row[2])]


@pytest.mark.parametrize("name", documented_classes())
def test_documented_classes(name: str) -> None:
    cls = getattr(transformers, name)
    if name in ("CLIPModel", "CLIPForImageClassification", "SiglipModel", "SiglipForImageClassification"):
        config = cls.config_class(vision_config=SIZES, text_config=TEXT)
    else:
        config = cls.config_class(**SIZES, **({"mlp_ratio": 2} if "Dinov2" in name else {}))
    model = evit_ext.apply(cls(config).eval(), 0.6)
    arguments = {"input_ids": torch.tensor([[0, 5, 7, 1]])} if name in ("CLIPModel", "SiglipModel") else {}
    with evit_ext.record_tokens(model) as record:
        model(pixel_values=images(1), **arguments)
    assert [kept.shape[1] for kept in record.kept] == [10, 7, 5]


def test_every_tested_class_is_documented() -> None:
    assert {line[0] for line in LINES.values()} <= set(documented_classes())
