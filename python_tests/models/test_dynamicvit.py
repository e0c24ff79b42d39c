"""DynamicViT: names, keys and numbers of the published one, what it computes in inference and in training."""

from __future__ import annotations

import copy
import math
import pickle
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from slow_dynamicvit import slow_dynamicvit
from small_dynamicvit import MICRO, images, micro

import evit_ext
from evit_ext import count_macs, models
from evit_ext.models.dynamicvit import DynamicViT

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ("tiny", "small", "base")

#: What a predictor has in the published state dict, for C channels.
PREDICTOR = {
    "in_conv.0.weight": lambda c: (c,),
    "in_conv.0.bias": lambda c: (c,),
    "in_conv.1.weight": lambda c: (c, c),
    "in_conv.1.bias": lambda c: (c,),
    "out_conv.0.weight": lambda c: (c // 2, c),
    "out_conv.0.bias": lambda c: (c // 2,),
    "out_conv.2.weight": lambda c: (c // 4, c // 2),
    "out_conv.2.bias": lambda c: (c // 4,),
    "out_conv.4.weight": lambda c: (2, c // 4),
    "out_conv.4.bias": lambda c: (2,),
}


# --- the published model


def test_golden(golden: Any, weights: ModuleType, device: torch.device) -> None:
    """Measured was a difference of 8e-15 in the largest logit, 3.8."""
    model = weights.fill(models.dynamicvit_small(keep_rate=0.7, weight_init="skip").double())
    with torch.no_grad():
        logits = model.eval().to(device)(weights.images(2, 224).to(device)).cpu()
    expected = golden("dynamicvit_small_k0.7")["logits"]
    assert (logits - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("size", SIZES)
def test_state_dict_keys(size: str) -> None:
    ours = getattr(models, f"dynamicvit_{size}")(weight_init="skip")
    timms = timm.create_model(f"deit_{size}_patch16_224", weight_init="skip")
    expected = {key: tuple(value.shape) for key, value in timms.state_dict().items()}
    for stage in range(3):
        for key, shape in PREDICTOR.items():
            expected[f"score_predictor.{stage}.{key}"] = shape(ours.embed_dim)
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == expected


# GMACs in the model zoo and, for keep rates 0.8 and 0.9, in the paper's table 1.
@pytest.mark.parametrize(
    ("size", "keep_rate", "published", "counted"),
    [
        ("small", 0.9, "4.0", "4.04"),
        ("small", 0.8, "3.4", "3.46"),
        ("small", 0.7, "2.9", "2.98"),
        ("base", 0.7, "11.4", "11.48"),
    ],
)
def test_published_macs(size: str, keep_rate: float, published: str, counted: str) -> None:
    """The published figures are ours with all digits but one cut off.

    Rounded, they are ours without the patch embedding; how they were counted is not published.
    """
    with torch.device("meta"):
        model = getattr(models, f"dynamicvit_{size}")(keep_rate, weight_init="skip").eval()
    macs = count_macs(model)
    assert f"{macs / 1e9:.2f}" == counted
    assert f"{math.floor(macs / 1e8) / 10:.1f}" == published
    assert f"{(macs - 196 * 768 * model.embed_dim) / 1e9:.1f}" == published


@pytest.mark.parametrize(("size", "millions"), [("tiny", "5.9"), ("small", "22.8"), ("base", "89.5")])
def test_published_parameters(size: str, millions: str) -> None:
    """22.8 is published; the others are that count's."""
    with torch.device("meta"):
        model = getattr(models, f"dynamicvit_{size}")(weight_init="skip")
    assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}" == millions


def test_published_number_of_patches() -> None:
    model = models.dynamicvit_tiny(keep_rate=0.7, weight_init="skip").eval()
    with evit_ext.record_tokens(model) as record, torch.no_grad():
        model(images(224, 224, batch=1))
    assert [kept.shape[1] for kept in record.kept] == [137, 96, 67]
    assert model.keep_ratios == (0.7, 0.7**2, 0.7**3)


# --- names and arguments


@pytest.mark.parametrize("size", SIZES)
def test_registry_gives_the_same_model(size: str) -> None:
    name = f"dynamicvit_deit_{size}_patch16_224"
    assert timm.is_model(name)
    arguments = {**MICRO, "num_classes": 3, "keep_rate": 0.4, "drop_loc": (0, 2)}
    torch.manual_seed(1)
    ours = getattr(models, f"dynamicvit_{size}")(**arguments).eval()
    torch.manual_seed(1)
    registered = timm.create_model(name, **arguments).eval()
    assert isinstance(registered, DynamicViT)
    assert torch.equal(ours(images()), registered(images()))
    assert (registered.keep_rate, registered.drop_loc) == (0.4, (0, 2))


def test_defaults_are_the_papers() -> None:
    tiny, small, base = (getattr(models, f"dynamicvit_{size}")(weight_init="skip") for size in SIZES)
    registered = timm.create_model("dynamicvit_deit_small_patch16_224", weight_init="skip")
    for model in (small, registered):
        assert (model.keep_rate, model.drop_loc) == (0.7, (3, 6, 9))
        assert (model.num_classes, model.patch_embed.img_size) == (1000, (224, 224))
        assert (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads) == (12, 384, 6)
    assert (tiny.embed_dim, tiny.blocks[0].attn.num_heads) == (192, 3)
    assert (base.embed_dim, base.blocks[0].attn.num_heads) == (768, 12)


def test_initial_weights() -> None:
    predictor = models.dynamicvit_tiny().stages()[0]
    for layer in (predictor.in_conv[1], predictor.out_conv[0], predictor.out_conv[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and not layer.bias.any()


def test_timm_arguments_pass_through() -> None:
    assert micro(num_classes=0)(images()).shape == (3, 24)
    assert micro(in_chans=1)(images()[:, :1]).shape == (3, 5)
    assert micro(depth=8).drop_loc == (2, 4, 6)
    assert micro(reg_tokens=2).num_prefix_tokens == 3
    with pytest.raises(TypeError, match="no_such_argument"):
        micro(no_such_argument=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_rate": 2}, r"keep_rate must be in \(0, 1\], got 2"),
        ({"keep_rate": (0.5, 0.6)}, "one number or 3, one for each reorganising block, got 2"),
        ({"drop_loc": (1, 4)}, r"drop_loc must be in \[0, 4\)"),
        ({"global_pool": "avg"}, "global_pool must be 'token'"),
        ({"patch_drop_rate": 0.1}, "patch_drop_rate must be 0"),
        ({"features_only": True}, "features_only needs a token for every patch"),
        (
            {"block_fn": timm.models.vision_transformer.ResPostBlock},
            "block 0 is a ResPostBlock with a Attention, which is not supported",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro(**arguments)


def test_arguments_are_checked_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was built")

    monkeypatch.setattr("evit_ext.models.deit.build_model_with_cfg", fetch)
    for wrong in ({"keep_rate": 2.0}, {"drop_loc": (3, 12)}, {"keep_rate": (0.5, 0.6)}):
        with pytest.raises(ValueError):
            models.dynamicvit_tiny(pretrained=True, **wrong)


def test_is_no_evit() -> None:
    with pytest.raises(ValueError, match="it drops tokens itself, by the rule dynamicvit"):
        evit_ext.apply(micro())
    with pytest.raises(ValueError, match="no block that evit_ext.apply replaced"):
        evit_ext.prepack(micro())
    with pytest.raises(NotImplementedError, match="no intermediate features"):
        micro().forward_intermediates(images())
    for mask in ({"attn_mask": torch.ones(17, 17, dtype=torch.bool)}, {"is_causal": True}):
        with pytest.raises(NotImplementedError, match="takes no attn_mask and no is_causal"):
            micro()(images(), **mask)


# --- weights


def test_published_checkpoints_load(tmp_path: Path) -> None:
    model = micro()
    torch.save({"model": model.state_dict(), "epoch": 29}, tmp_path / "checkpoint.pth")
    loaded = models.dynamicvit_tiny(
        **MICRO, drop_loc=None, num_classes=5, checkpoint_path=tmp_path / "checkpoint.pth"
    ).eval()
    assert torch.equal(loaded(images()), model(images()))


def test_state_dict_round_trip() -> None:
    model, other = micro(1), micro(2)
    assert not torch.equal(other(images()), model(images()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))


def test_copies() -> None:
    model = micro()
    with evit_ext.record_tokens(model) as record:
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in copies:
            assert torch.equal(other(images()), model(images()))
            assert all(stage.recorders == () for stage in other.stages())
    assert len(record.kept) == 3
    assert all(stage.recorders == () for stage in model.stages())


def test_pretrained_from_a_file(tmp_path: Path) -> None:
    """DeiT's weights, the way that the hub's take; the predictors keep their initial weights."""
    source = timm.create_model("deit_tiny_patch16_224", **{**MICRO, "num_classes": 1000})
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    torch.manual_seed(3)
    model = models.dynamicvit_tiny(
        **MICRO,
        drop_loc=None,
        num_classes=5,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")},
    )
    torch.manual_seed(3)
    fresh = models.dynamicvit_tiny(**MICRO, drop_loc=None, num_classes=5)
    for key, value in model.state_dict().items():
        if key.startswith("score_predictor."):
            assert torch.equal(value, fresh.state_dict()[key])
        elif not key.startswith("head."):
            assert torch.equal(value, source.state_dict()[key])


# --- inference


@pytest.mark.parametrize("keep_rate", [0.9, 0.7, 0.5, (0.5, 1.0, 0.25)])
@pytest.mark.parametrize("arguments", [{}, {"reg_tokens": 2}, {"init_values": 0.5}])
def test_inference_agrees_with_the_oracle(
    keep_rate: Any, arguments: dict[str, Any], device: torch.device
) -> None:
    model = micro(keep_rate=keep_rate, **arguments).double().to(device)
    x = images(dtype=torch.float64).to(device)
    with evit_ext.record_tokens(model) as record:
        logits = model(x)
    expected, kept, scores = slow_dynamicvit(model, x, model.keep_ratios, (1, 2, 3))
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(record.kept, kept, strict=True):
        assert torch.equal(ours, theirs.sort(dim=1).values)
    for ours, theirs in zip(record.scores, scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_order_of_the_tokens_does_not_matter() -> None:
    """The published code orders the tokens by score, ours are in the order of the patches."""
    model = micro().double()
    x = model._embed(images(dtype=torch.float64))
    shuffled = torch.cat([x[:, :1], x[:, 1:][:, torch.randperm(16)]], dim=1)
    model._embed = lambda tokens: tokens
    torch.testing.assert_close(model(shuffled), model(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("compiled", [False, True])
def test_set_keep_rate(compiled: bool) -> None:
    """The function that changes an EViT's keep rate changes a DynamicViT's, too."""
    model = micro(keep_rate=0.9)
    given: Any = torch.compile(model, backend="eager") if compiled else model
    assert evit_ext.set_keep_rate(given, 0.5) is given
    assert (model.keep_rate, model.keep_ratios) == (0.5, pytest.approx((0.5, 0.25, 0.125)))
    evit_ext.set_keep_rate(given, [1, 0.5, 0.5])
    assert model.keep_rate == (1.0, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 2"):
        evit_ext.set_keep_rate(given, 2)
    assert model.keep_rate == (1.0, 0.5, 0.5)


def test_keep_rates() -> None:
    model = micro()
    for keep_rate, ratios, left in [
        (0.5, (0.5, 0.25, 0.125), [8, 4, 2]),
        ((0.5, 1.0, 0.5), (0.5, 0.5, 0.25), [8, 8, 4]),
        (0.2, (0.2, 0.2**2, 0.2**3), [3, 1, 1]),
        (1.0, (1.0, 1.0, 1.0), [16, 16, 16]),
    ]:
        model.keep_rate = keep_rate
        assert model.keep_ratios == pytest.approx(ratios)
        with evit_ext.record_tokens(model) as record:
            model(images())
        assert [kept.shape[1] for kept in record.kept] == left
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 0"):
        model.keep_rate = 0
    assert model.keep_rate == 1.0
    plain = timm.create_model("deit_tiny_patch16_224", **MICRO, num_classes=5).eval()
    state = {key: value for key, value in model.state_dict().items() if "predictor" not in key}
    plain.load_state_dict(state)
    assert torch.equal(model(images()), plain(images()))


@pytest.mark.parametrize(("height", "width"), [(48, 48), (24, 24), (32, 56)])
def test_images_of_any_size(height: int, width: int) -> None:
    model = micro(keep_rate=0.6).double()
    x = images(height, width, dtype=torch.float64)
    with evit_ext.record_tokens(model) as record:
        logits = model(x)
    expected, _, _ = slow_dynamicvit(model, x, model.keep_ratios, (1, 2, 3))
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-12)
    assert record.kept[0].shape[1] == int(0.6 * (height // 8) * (width // 8))


def test_gradients_in_eval_mode() -> None:
    model = micro()
    model(images()).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all((grad is None) == name.startswith("score_predictor") for name, grad in expected.items())
    model.zero_grad()
    model.set_grad_checkpointing()
    model(images()).sum().backward()
    for name, parameter in model.named_parameters():
        if expected[name] is not None:
            assert torch.equal(parameter.grad, expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype: torch.dtype, device: torch.device) -> None:
    model = micro(keep_rate=0.5).to(device)
    with torch.autocast(device.type, dtype=dtype), torch.no_grad():
        assert torch.isfinite(model(images().to(device))).all()
    assert torch.isfinite(model.to(dtype)(images(dtype=dtype).to(device))).all()


def test_compile_at_two_sizes_and_keep_rates() -> None:
    model = micro()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size, keep_rate in ((32, 0.7), (48, 0.7), (48, 0.5)):
        model.keep_rate = keep_rate
        with torch.no_grad():
            torch.testing.assert_close(compiled(images(size, size)), model(images(size, size)))


def test_groups_of_parameters() -> None:
    groups = micro().group_matcher()
    assert any(re.match(pattern, "score_predictor.0.in_conv.0.weight") for pattern, _ in groups["blocks"])
