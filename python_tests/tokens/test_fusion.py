"""Where EViT's inattentive tokens go, beside the paper's sum: against loops, in models, files, exports."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import evit_ext
from evit_ext.tokens import EViT, Plan, Seen, make_rule
from evit_ext.tokens.stage import find_stages

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(prefix: int = 2, num_patches: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens [B, N, C] and scores [B, N], with gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, prefix + num_patches, 4, dtype=torch.float64, generator=generator)
    scores = torch.rand(3, prefix + num_patches, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), scores.requires_grad_()


def planned(fusion: str, x: Tensor, scores: Tensor, prefix: int = 2) -> Plan:
    rule = EViT(0.5, fusion=fusion)
    num_patches = x.shape[1] - prefix
    plan = rule.plan(Seen(x, None, prefix, num_patches, None, scores))
    assert plan.num_out == rule.num_out(num_patches, None)
    return plan


def slow(fusion: str, x: Tensor, scores: Tensor, prefix: int = 2) -> tuple[Tensor, list[list[int]]]:
    """The tokens that leave, and of each image the owners."""
    images, owners = [], []
    for b in range(len(x)):
        patches, own = x[b, prefix:], scores[b, prefix:]
        keep = math.ceil(0.5 * len(patches))
        order = sorted(range(len(patches)), key=lambda j: (-own[j].item(), j))
        kept, others = sorted(order[:keep]), order[keep:]
        if fusion == "normalized":
            made = sum(own[j] * patches[j] for j in others) / sum(own[j] for j in others)
            images.append(torch.cat([x[b, :prefix], patches[kept], made[None]]))
            owners.append([kept.index(j) if j in kept else keep for j in range(len(patches))])
            continue
        into: dict[int, list[tuple[Tensor, int]]] = {
            i: [(torch.ones((), dtype=torch.float64), i)] for i in kept
        }
        owner = {i: place for place, i in enumerate(kept)}
        for j in others:
            cosines = [patches[i] @ patches[j] / patches[i].norm() / patches[j].norm() for i in kept]
            best = max(range(keep), key=lambda place: cosines[place].item())
            into[kept[best]].append((cosines[best], j))
            owner[j] = best
        rows = [
            sum(c.exp() * patches[j] for c, j in into[i]) / sum(c.exp() for c, _ in into[i]) for i in kept
        ]
        images.append(torch.cat([x[b, :prefix], torch.stack(rows)]))
        owners.append([owner[j] for j in range(len(patches))])
    return torch.stack(images), owners


@pytest.mark.parametrize("fusion", ["normalized", "squeezed"])
def test_against_loops(fusion: str) -> None:
    x, scores = drawn()
    found, (expected, owners) = planned(fusion, x, scores).apply(x, 2), slow(fusion, x, scores)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert planned(fusion, x, scores).owner.tolist() == owners
    weights = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (x, scores), allow_unused=True),
        torch.autograd.grad((expected * weights).sum(), (x, scores), allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("fusion", ["normalized", "squeezed"])
def test_gradients(fusion: str) -> None:
    x, scores = drawn(1, 6)
    assert torch.autograd.gradcheck(lambda x, s: planned(fusion, x, s, 1).apply(x, 1), (x, scores))


@pytest.mark.parametrize("fusion", ["normalized", "squeezed"])
def test_models(fusion: str, small_vit: Any, tmp_path: Any) -> None:
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    rule = EViT(0.5, fusion=fusion)
    vit = evit_ext.apply(small_vit(dtype=torch.float64), rule=rule)
    with evit_ext.record_tokens(vit) as record:
        logits = vit(x)
    logits.square().sum().backward()
    with torch.no_grad():  # another operator, perhaps
        torch.testing.assert_close(vit(x), logits, rtol=1e-12, atol=1e-12)
    assert [kept.shape[1] for kept in record.kept] == ([8, 4, 2] if fusion == "squeezed" else [8, 5, 3])
    grids = vit.forward_intermediates(x, [3], norm=True, intermediates_only=True)
    places = record.trail.places(3)
    assert places is not None and places.min() >= 0
    tokens = vit.forward_features(x)[:, 1:]
    expected = tokens.gather(1, places.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
    torch.testing.assert_close(grids[0].flatten(2).transpose(1, 2), expected, rtol=1e-12, atol=1e-12)
    whole = evit_ext.apply(small_vit(dtype=torch.float64), rule=EViT(1.0, fusion=fusion))
    assert torch.equal(whole(x), evit_ext.remove(copy.deepcopy(whole))(x))


@pytest.mark.parametrize("fusion", ["normalized", "squeezed"])
@torch.no_grad()
def test_proportional_against_loops(fusion: str) -> None:
    """The blocks that follow add the logarithm of the sizes to their logits, and the scores heed it too."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"depth": 4, "embed_dim": 24, "num_heads": 2, "img_size": 64}
    vit = timm.create_model("deit_tiny_patch16_224", **arguments).double().eval()
    for parameter in vit.parameters():
        parameter.mul_(4)  # else no token is much like another, nor any attention unlike
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    x = vit._pos_embed(vit.patch_embed(images))
    groups = [[[patch] for patch in range(16)] for _ in images]
    for number, block in enumerate(vit.blocks):
        logs = [[0.0] + [math.log(len(group)) for group in image] for image in groups]
        bias = torch.tensor(logs, dtype=torch.float64)[:, None, None]
        if number not in (1, 2):
            x = block(x, attn_mask=bias)
            continue
        normed = block.norm1(x)
        q, k, _ = block.attn.qkv(normed).unflatten(2, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        scores = (q[:, :, :1] @ k.transpose(2, 3) * 12**-0.5 + bias).softmax(3)[:, :, 0].mean(1)
        x, owners = slow(fusion, x + block.attn(normed, attn_mask=bias), scores, prefix=1)
        x = x + block.mlp(block.norm2(x))
        into: list[list[list[int]]] = [[[] for _ in range(max(own) + 1)] for own in owners]
        for image, own in enumerate(owners):
            for token, owner in enumerate(own):
                into[image][owner] += groups[image][token]
        groups = into
    expected = vit.forward_head(vit.norm(x))
    plain = evit_ext.apply(copy.deepcopy(vit), rule=EViT(0.5, fusion=fusion), drop_loc=(1, 2))(images)
    evit_ext.apply(vit, rule=EViT(0.5, fusion=fusion, proportional=True), drop_loc=(1, 2))
    torch.testing.assert_close(vit(images), expected, rtol=1e-11, atol=1e-12)
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("fusion", ["normalized", "squeezed"])
def test_saved_and_exported(fusion: str, tmp_path: Any) -> None:
    arguments: dict[str, Any] = {"depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": 64}
    vit = timm.create_model("deit_tiny_patch16_224", **arguments).eval()
    evit_ext.apply(vit, rule=EViT(0.5, fusion=fusion))
    evit_ext.save_pretrained(vit, tmp_path / "model")
    loaded = evit_ext.from_pretrained(tmp_path / "model")
    assert {stage.rule for stage in find_stages(loaded)} == {EViT(0.5, fusion=fusion)}
    pytest.importorskip("onnxscript", reason="onnxscript, which writes ONNX, is not installed")
    assert evit_ext.export.export_model(vit, tmp_path / "model.onnx", "onnx").max_difference < 1e-5


def test_settings() -> None:
    assert EViT(0.7).settings() == {"keep_rate": 0.7, "fuse_token": True}
    assert repr(EViT(0.7)) == "EViT(keep_rate=0.7, fuse_token=True)"
    rule = EViT(0.7, fusion="squeezed")
    assert make_rule("evit", rule.settings()) == rule and eval(repr(rule)) == rule
    assert rule.with_keep_rate(0.5) == EViT(0.5, fusion="squeezed")
    weighed = EViT(0.7, fusion="squeezed", proportional=True)
    assert make_rule("evit", weighed.settings()) == weighed and eval(repr(weighed)) == weighed
    assert weighed.wants() == {"scores", "sizes"} and rule.wants() == {"scores"}
    with pytest.raises(TypeError, match="proportional must be True or False, got 1"):
        EViT(0.7, proportional=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with fuse_token=False each stands for one"):
        EViT(0.7, fuse_token=False, proportional=True)
    with pytest.raises(ValueError, match="fusion must be one of 'sum', 'normalized', 'squeezed', got 'mean'"):
        EViT(0.7, fusion="mean")
    with pytest.raises(ValueError, match="fusion 'squeezed' fuses tokens, and fuse_token=False drops them"):
        EViT(0.7, fuse_token=False, fusion="squeezed")
