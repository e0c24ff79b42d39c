"""Models under their names, what is refused, and what docs/supported-models.md says of both."""

from __future__ import annotations

import math
import re

import pytest
import timm
import torch
from family_lines import (
    DOCS,
    LINES,
    SMALL,
    Line,
    attributes,
)
from timm.layers import Attention
from torch import nn

import evit_ext

pytestmark = pytest.mark.usefixtures("one_thread")

# Models under their names, and what is refused.

#: timm's models in full, but for their depth: those that the documentation names as tried.
NAMES = [
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_base_patch16_224.mae",
    "vit_small_patch16_224.dino",
    "vit_base_patch16_clip_224.openai",
    "vit_base_patch32_clip_quickgelu_224.openai",
    "vit_large_patch14_clip_224.laion2b",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_rpn_224.sw_in1k",
    "vit_base_patch16_siglip_224.webli",
    "vit_base_patch16_siglip_256.v2_webli",
    "vit_so400m_patch14_siglip_gap_224.webli",
    "vit_medium_patch16_reg4_gap_256.sbb_in12k_ft_in1k",
    "aimv2_large_patch14_224.apple_pt",
    "beit3_base_patch16_224.in22k_ft_in1k",
    "vit_small_r26_s32_224.augreg_in21k_ft_in1k",
    "vit_base_mci_224.apple_mclip",
    "vitamin_small_224.datacomp1b_clip",
    "deit_small_patch16_224.fb_in1k",
    "deit_small_distilled_patch16_224.fb_in1k",
    "deit3_base_patch16_224.fb_in22k_ft_in1k",
    "evit_lvvit_s_patch16_224.in1k",
    "eva_giant_patch14_224.clip_ft_in1k",
    "eva02_tiny_patch14_224.mim_in22k",
    "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k",
    "eva02_large_patch14_clip_224.merged2b",
    "eva02_enormous_patch14_clip_224.laion2b",
    "vit_small_patch16_rope_224.naver_in1k",
    "vit_small_patch16_rope_mixed_224.naver_in1k",
    "vit_base_patch16_rope_mixed_ape_224.naver_in1k",
    "vit_mediumd_patch16_rope_reg1_gap_256.sbb_in1k",
    "vit_pe_core_base_patch16_224.fb",
    "vit_pe_spatial_small_patch16_512.fb",
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_small_plus_patch16_dinov3.lvd1689m",
    "vit_base_patch16_dinov3_qkvb.lvd1689m",
    "vit_base_patch16_sapiens2",
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
    "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
]


@pytest.mark.parametrize("name", NAMES)
def test_models_under_their_names(name: str) -> None:
    """In full width and size, on the meta device, where nothing is computed and no memory is taken."""
    depth = {} if name == "vit_base_patch16_sapiens2" else {"depth": 4}  # told the heads of each block
    with torch.device("meta"):
        vit = timm.create_model(name, **depth).eval()
    evit_ext.remove(vit)
    plain = evit_ext.count_macs(vit)
    assert evit_ext.apply(vit, 0.7) is vit
    images = torch.empty(2, *vit.pretrained_cfg["input_size"], device="meta")
    with torch.no_grad():
        features, logits = vit.forward_features(images), vit(images)
    patches = vit.patch_embed.num_patches
    for _ in range(3):
        patches = math.ceil(0.7 * patches) + 1
    assert features.shape == (2, vit.num_prefix_tokens + patches, vit.embed_dim)
    assert logits.shape == (2, vit.num_classes or vit.embed_dim)
    assert evit_ext.count_macs(vit) < plain


#: What is refused: the model, and what the error says.
REFUSED = {
    "vit_base_patch16_xp_224": "ParallelScalingBlock, .* side by side, so no tokens can be dropped between",
    "vit_dpwee_patch16_reg1_gap_256": "DiffParallelScalingBlock, .* side by side",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock, .* several attentions, and so no one score",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention, .* difference of two softmaxes, which is no score",
    "vit_relpos_small_patch16_224": "RelPosBlock, .* relative position embedding is not known",
    "vit_relpos_small_patch16_rpn_224": "ResPostRelPosBlock, .* relative position embedding is not known",
    "naflexvit_base_patch16_gap": "NaFlexVit .* padded and masked sequences of patches",
    "swin_tiny_patch4_window7_224": "SwinTransformer is not supported: expected .* its blocks in .blocks",
    "cait_xxs24_224": "LayerScaleBlock, .* no class token in it",
    "xcit_nano_12_p16_224": "XCABlock, .* between channels",
    "tnt_s_patch16_224": "timm.models.tnt.Block, which is not supported: expected timm.models.vision_tran",
    "convit_tiny": "timm.models.convit.Block, which is not supported: expected timm.models.vision_transf",
    "hiera_tiny_224": "Hiera .* does not tell the number of its prefix tokens",
    "samvit_base_patch16": "VisionTransformerSAM .* does not tell the number of its prefix tokens",
    "crossvit_9_240": "CrossVit .* does not tell the number of its prefix tokens",
    "twins_pcpvt_small": "Twins .* does not tell the number of its prefix tokens",
    "mvitv2_tiny": "MultiScaleVit is not supported: expected .* its blocks in .blocks",
    "pit_s_224": "PoolingVisionTransformer is not supported: expected .* its blocks in .blocks",
    "volo_d1_224": "VOLO is not supported: expected .* its blocks in .blocks",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with torch.device("meta"):
        vit = timm.create_model(name)
    before = attributes(vit)
    with pytest.raises(ValueError, match=REFUSED[name]):
        evit_ext.apply(vit)
    after = attributes(vit)
    assert list(after) == list(before)
    assert all(value is before[name] or value == before[name] for name, value in after.items())


class _OwnAttention(Attention):
    pass


def test_refused_in_one_block(line: Line) -> None:
    """A subclass is free to compute something else. The model is left as it was."""
    vit = line.build()
    vit.blocks[3].attn = _OwnAttention(32, 2)
    blocks = list(vit.blocks)
    with pytest.raises(ValueError, match="the attention of block 3 is a .*_OwnAttention, which is not supp"):
        evit_ext.apply(vit)
    assert all(a is b for a, b in zip(vit.blocks, blocks, strict=True))
    vit.blocks[3] = nn.Identity()
    with pytest.raises(ValueError, match="block 3 is a torch.nn.modules.linear.Identity, which is not supp"):
        evit_ext.apply(vit)


def test_family_by_its_blocks() -> None:
    """Blocks of an Eva or a Beit are told positions by their model, which must be one."""
    for timm_name, family in (("eva02_tiny_patch14_224", "Eva"), ("beit_base_patch16_224", "Beit")):
        other = nn.Module()
        other.blocks = timm.create_model(timm_name, **SMALL).blocks
        other.num_prefix_tokens = 1
        with pytest.raises(ValueError, match=f"it has the blocks of timm's {family}, but is none"):
            evit_ext.apply(other)


# The documentation.


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading of the documentation, without code marks."""
    section = re.split(r"^## ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(heading))
    cells = [
        [cell.strip().replace("`", "") for cell in row.strip("|").split("|")]
        for row in text.splitlines()
        if row.startswith("|")
    ]
    return cells[2:]


def test_documentation_has_the_lines_that_are_tested() -> None:
    table = rows("timm")
    assert [row[0] for row in table] == [line.name for line in LINES]
    for line, (_, names, ranked_by, _) in zip(LINES, table, strict=True):
        has_class_token = getattr(line.build(), "cls_token", None) is not None
        assert ranked_by == ("class token" if has_class_token else "mean attention"), line.name
        assert line.timm_name.split(".")[0] in names.split(", "), line.name
        assert all(timm.is_model(name) for name in names.split(", ")), line.name


def test_documentation_has_what_is_refused() -> None:
    assert [row[0] for row in rows("Not supported")] == list(REFUSED)


def test_documentation_has_the_names_that_were_tried() -> None:
    text = DOCS.read_text(encoding="utf-8").split("## Names")[1].split("## ")[0]
    assert re.findall(r"^(\w\S+)$", text, flags=re.MULTILINE) == NAMES
