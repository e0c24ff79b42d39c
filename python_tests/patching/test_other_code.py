"""Models that other code changes: its forwards, hooks and attributes count in every block, or are refused."""

from __future__ import annotations

import copy
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import evit_ext
from evit_ext import ops
from evit_ext.tokens.stage import find_stages

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, DROP_LOC = 0.6, (2, 4, 6)


def vit(**arguments: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 8, "num_heads": 3, "num_classes": 10}
    return VisionTransformer(**{**sizes, **arguments}).eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def slow(model: Any, x: Tensor, scale: float | None = None) -> Tensor:
    """The EViT of a dense model: its modules are called one by one, and the scores are by the whole map."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for number, block in enumerate(model.blocks):
        normed = block.norm1(x)
        seen: list[Tensor] = []
        handle = block.attn.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        out = block.attn(normed)
        handle.remove()
        x = x + out
        if number in DROP_LOC:
            weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
            packed = nn.functional.linear(seen[0], weight, bias)
            q, k, _ = ops.reference.unpacked(packed, 3)
            logits = q @ k.transpose(2, 3) * (16**-0.5 if scale is None else scale)
            scores = logits.softmax(dim=-1)[:, :, 0].mean(dim=1)
            num_keep = int(np.ceil(RATE * (x.shape[1] - 1)))
            x, _ = ops.reference.reorganize_tokens(x, scores, num_keep)
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


def zeros(attention: Any) -> None:
    attention.forward = types.MethodType(lambda self, y, **named: torch.zeros_like(y), attention)


def windows(attention: Any) -> None:
    """A forward that calls the projection itself, as many libraries' do."""
    own = type(attention).forward
    attention.forward = lambda y, *args, **named: own(attention, 2 * y, *args, **named).tanh()


def half(attention: Any) -> None:
    attention.register_forward_hook(lambda module, args, out: out * 0.5)


def doubled(attention: Any) -> None:
    attention.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


class Negated(Attention):
    def forward(self, *args: Any, **named: Any) -> Tensor:
        return -super().forward(*args, **named)


def swapped(attention: Any) -> None:
    attention.__class__ = Negated


CHANGES = {"forward": zeros, "hook": half, "pre-hook": doubled, "class": swapped}


@pytest.mark.parametrize("before", [True, False], ids=["before apply", "after apply"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_attentions_count_in_every_block(change: str, gradients: bool, before: bool) -> None:
    if change == "class" and before:
        pytest.skip("refused: see test_a_swapped_class_is_refused_by_apply")
    dense, model = vit(), vit()
    for block in dense.blocks:
        CHANGES[change](block.attn)
    if before:
        model = copy.deepcopy(dense)
    evit_ext.apply(model, RATE, DROP_LOC)
    if not before:
        for block in model.blocks:
            CHANGES[change](block.attn)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(model(images()), slow(dense, images()), rtol=1e-5, atol=1e-6)
    evit_ext.remove(model)
    torch.testing.assert_close(model(images()), dense(images()))


def test_a_swapped_class_is_refused_by_apply() -> None:
    model = vit()
    swapped(model.blocks[4].attn)
    with pytest.raises(ValueError, match="the attention of block 4 is a .*Negated, which is not supported"):
        evit_ext.apply(model, RATE, DROP_LOC)


def test_queries_and_keys_are_those_of_the_changed_forward() -> None:
    """Scores come from the projection that the forward itself made, of what it made of its input."""
    model = vit()
    evit_ext.apply(model, RATE, DROP_LOC)
    windows(model.blocks[2].attn)
    seen: list[Tensor] = []
    model.blocks[2].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out))
    with evit_ext.record_tokens(model) as record:
        model(images())
    assert len(seen) == 1  # and not computed a second time
    q, k, _ = ops.reference.unpacked(seen[0], 3)
    scores = (q @ k.transpose(2, 3) / 4).softmax(dim=-1)[:, :, 0].mean(dim=1)
    torch.testing.assert_close(record.scores[0], scores[:, 1:])


def test_a_class_forward_that_changes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model = vit(), evit_ext.apply(vit(), RATE, DROP_LOC)
    original = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, *a, **k: 0.5 * original(self, *a, **k))
    torch.testing.assert_close(model(images()), slow(dense, images()), rtol=1e-5, atol=1e-6)
    block = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a, **k: block(self, *a, **k))
    with pytest.raises(RuntimeError, match="Block.forward was replaced by other code"):
        model(images())
    evit_ext.remove(model)(images())


@pytest.mark.parametrize("fused", [True, False])
def test_scale_is_heeded_where_timm_heeds_it(fused: bool) -> None:
    dense, model = vit(), evit_ext.apply(vit(), RATE, DROP_LOC)
    for block in (*dense.blocks, *model.blocks):
        block.attn.fused_attn = fused
        block.attn.scale *= 3
    expected = slow(dense, images(), None if fused else 3 * 16**-0.5)
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-6)


def test_hooks_that_watch_an_attention_run() -> None:
    model = evit_ext.apply(vit(), RATE, DROP_LOC)
    maps: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: maps.append(tuple(out.shape)))
    model(images())
    tokens = [65, 65, 65, 41, 41, 26, 26, 17]
    assert maps == [(2, 3, number, number) for number in tokens]


def test_adapters_in_the_projection() -> None:
    """As LoRA's: a module in the place of a linear layer."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.more = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.base(x) + self.more(x)
            return out

    model = evit_ext.apply(vit(), RATE, DROP_LOC)
    merged = vit()
    for block, other in zip(model.blocks, merged.blocks, strict=True):
        torch.manual_seed(1)
        adapted = Adapted(block.attn.qkv)
        with torch.no_grad():
            other.attn.qkv.weight += adapted.more.weight
            other.attn.qkv.bias += adapted.more.bias
        block.attn.qkv = adapted
    torch.testing.assert_close(model(images()), slow(merged, images()), rtol=1e-4, atol=1e-5)


def test_second_derivatives() -> None:
    def gradient_penalty(model: Any) -> Tensor:
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        return second

    expected = gradient_penalty(lambda x: slow(dense, x)) if (dense := _unfused(vit())) else None
    with ops.use_reference():
        unfused = gradient_penalty(_unfused(evit_ext.apply(vit(), RATE, DROP_LOC)))
    torch.testing.assert_close(unfused, expected, rtol=1e-4, atol=1e-7)
    with ops.use_reference(), sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(
            gradient_penalty(evit_ext.apply(vit(), RATE, DROP_LOC)), expected, rtol=1e-4, atol=1e-7
        )
    with pytest.raises(RuntimeError, match=r"run the model inside `with evit_ext.ops.use_reference\(\):`"):
        gradient_penalty(evit_ext.apply(vit(), RATE, DROP_LOC))


def _unfused(model: Any) -> Any:
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def test_visual_prompts_are_kept() -> None:
    """Prompts between the class token and the patches, as VPT puts them there."""
    prompts = 5
    model = evit_ext.apply(vit(), RATE, [2], num_prefix_tokens=1 + prompts)
    x = torch.randn(2, 1 + prompts + 64, 48)
    with evit_ext.record_tokens(model) as record:
        out = model.blocks[2](x)
    assert out.shape[1] == 1 + prompts + 39 + 1 and record.scores[0].shape == (2, 64)
    for wrong, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="num_prefix_tokens must"):
            evit_ext.apply(vit(), RATE, num_prefix_tokens=wrong)


def test_features_of_a_hook_go_back_on_the_grid() -> None:
    model = evit_ext.apply(vit(), RATE, DROP_LOC)
    seen: dict[int, Tensor] = {}
    for number in (1, 4, 7):
        model.blocks[number].register_forward_hook(lambda module, args, out, n=number: seen.update({n: out}))
    with evit_ext.record_tokens(model) as record:
        model(images())
    grids = model.forward_intermediates(images(), [1, 4, 7], intermediates_only=True)
    for (number, tokens), stages, grid in zip(seen.items(), (0, 2, 3), grids, strict=True):
        restored = record.restore(tokens, stages, num_prefix_tokens=1)
        torch.testing.assert_close(restored, grid.flatten(2).transpose(1, 2), msg=str(number))
    empty = record.restore(seen[7], fill="nan", num_prefix_tokens=1)
    kept = record.kept[2]
    assert [int(row.isnan().all(dim=1).sum()) for row in empty] == [
        64 - int((ids >= 0).sum()) for ids in kept
    ]
    with pytest.raises(ValueError, match=r"tokens must be \[2, 26\] \[B, P \+ M\] after 2 of 3 stages, got"):
        record.restore(seen[7], 2, num_prefix_tokens=1)
    with pytest.raises(ValueError, match="fill must be 'fused', 'zero' or 'nan', got 'mean'"):
        record.restore(seen[7], fill="mean", num_prefix_tokens=1)


@pytest.mark.parametrize(
    "rate", [np.float32(0.1), np.array(0.1), torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64), 0.1]
)
def test_keep_rates_as_schedulers_give_them(rate: Any) -> None:
    model = evit_ext.set_keep_rate(evit_ext.apply(vit(), RATE), rate)
    assert {stage.keep_rate for stage in find_stages(model)} == {0.1}
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 1.5"):
        evit_ext.set_keep_rate(model, rate + 1.4)


def test_a_class_of_the_same_name_in_another_library() -> None:
    other = type("VisionTransformer", (nn.Module,), {"__module__": "other.library"})()
    with pytest.raises(ValueError, match="other.library.VisionTransformer is not supported"):
        evit_ext.apply(other)


def test_an_attention_of_another_kind_after_apply() -> None:
    model = evit_ext.apply(vit(), RATE, DROP_LOC)
    model.blocks[2].attn = nn.MultiheadAttention(48, 3)
    with pytest.raises(RuntimeError, match="the attention became a MultiheadAttention after evit_ext.apply"):
        model(images())


def test_remove_does_not_lose_a_forward() -> None:
    model = evit_ext.apply(vit(), RATE, DROP_LOC)
    own = model.blocks[2].forward
    model.blocks[2].forward = lambda *args, **named: own(*args, **named)
    model(images())
    with pytest.raises(RuntimeError, match="block 2 got a forward of its own after evit_ext.apply"):
        evit_ext.remove(model)


def test_a_norm_whose_class_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = evit_ext.apply(vit(), RATE, DROP_LOC)
    original = LayerNorm.forward
    monkeypatch.setattr(LayerNorm, "forward", lambda self, x: 2 * original(self, x))
    with torch.no_grad():
        without = model(images())
    torch.testing.assert_close(without, model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "gelu"])
def test_functions_of_pytorch_that_were_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = evit_ext.apply(vit(), RATE, DROP_LOC), []
    original = getattr(nn.functional, name)

    def replaced(*args: Any, **named: Any) -> Tensor:
        asked.append(name)
        out: Tensor = original(*args, **named)
        return out

    monkeypatch.setattr(nn.functional, name, replaced)
    with torch.no_grad():
        model(images())
    assert len(asked) == 8


def test_threads_that_share_an_attention_with_hooks() -> None:
    model = _unfused(evit_ext.apply(vit(), RATE, DROP_LOC))
    batches = [torch.randn(1, 3, 64, 64) for _ in range(4)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    wrong: list[int] = []

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(batches[number]), expected[number]):
                    wrong.append(number)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_beit_refuses_what_its_bias_cannot_follow() -> None:
    model = timm.create_model("beit_base_patch16_224", img_size=64, depth=4, embed_dim=48, num_heads=3).eval()
    evit_ext.apply(model, 0.6, (1, 2))
    half(model.blocks[0].attn)
    half(model.blocks[1].attn)  # at the first stage, all patches are there
    model(images())
    half(model.blocks[2].attn)
    with pytest.raises(RuntimeError, match="an attention of BEiT cannot run on the tokens that are left"):
        model(images())
    evit_ext.set_keep_rate(model, 1.0)
    model(images())


def test_a_mask_of_keys_for_all_images() -> None:
    """It is broadcast, as in timm's own forward, though the kernel takes one for each image."""
    model, x = evit_ext.apply(vit(), RATE, DROP_LOC), torch.randn(2, 65, 48)
    mask = torch.randn(1, 1, 1, 65)
    attention = model.blocks[0].attn
    with torch.no_grad():
        expected = Attention.forward(attention, x, attn_mask=mask)
        for given in (mask, mask.expand(2, -1, -1, -1)):
            torch.testing.assert_close(attention(x, attn_mask=given), expected)
