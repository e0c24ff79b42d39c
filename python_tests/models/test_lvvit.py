"""LV-ViT with token reorganisation, against a slow one; its heads, names, keys and sizes.

What it does in training is in test_lvvit_training.py; that it computes at keep rate 1 what the published code
computes is in test_golden.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
from slow_evit import slow_lvvit
from small_lvvit import MICRO, images, micro
from timm.models.vision_transformer import Block

import evit_ext
from evit_ext import models
from evit_ext.models.lvvit import LVViT, ResidualScale
from evit_ext.patching.block import ReorganizingBlock

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"tiny": "t", "small": "s", "medium": "m", "large": "l"}


# --- names, sizes, keys, arguments


def test_sizes_are_the_published_ones() -> None:
    """Channels, blocks, heads, scaling and stem; and the published number of parameters, in millions."""
    published = {
        "tiny": (240, 12, 4, 1.0, 64, 224, "8.53"),
        "small": (384, 16, 6, 2.0, 64, 224, "26.15"),
        "medium": (512, 20, 8, 2.0, 64, 224, "55.83"),
        "large": (768, 24, 12, 3.0, 128, 448, "150.47"),
    }
    for size, (width, depth, heads, skip_lam, stem, img_size, millions) in published.items():
        model = getattr(models, f"lvvit_{size}")(weight_init="skip", img_size=img_size)
        block = model.blocks[0]
        assert (model.embed_dim, len(model.blocks), block.attn.num_heads) == (width, depth, heads)
        assert block.mlp.fc1.out_features == 3 * width and block.attn.qkv.bias is None
        assert getattr(block.ls1, "skip_lam", 1.0) == getattr(block.ls2, "skip_lam", 1.0) == skip_lam
        assert model.patch_embed.conv1.out_channels == stem
        assert block.attn.head_dim == width // heads and block.attn.scale == (width // heads) ** -0.5
        assert isinstance(block.mlp.act, torch.nn.GELU) and block.mlp.act.approximate == "none"
        assert model.mix_token and model.return_dense and model.num_prefix_tokens == 1
        assert {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-5}
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == millions
        stages = [i for i, block in enumerate(model.blocks) if isinstance(block, ReorganizingBlock)]
        assert stages == [depth // 4, depth // 2, 3 * depth // 4]


def test_keys_are_those_of_the_published_checkpoints() -> None:
    keys = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for i in (1, 2, 3):
        keys.add(f"patch_embed.conv{i}.weight")
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        keys |= {f"patch_embed.bn{i}.{name}" for name in norm}
    for i in range(16):
        keys.add(f"blocks.{i}.attn.qkv.weight")
        for module in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            keys |= {f"blocks.{i}.{module}.weight", f"blocks.{i}.{module}.bias"}
    keys |= {f"{module}.{name}" for module in ("norm", "head", "aux_head") for name in ("weight", "bias")}
    state = models.lvvit_small(weight_init="skip").state_dict()
    assert set(state) == keys
    assert state["pos_embed"].shape == (1, 197, 384)
    assert state["patch_embed.conv1.weight"].shape == (64, 3, 7, 7)
    assert state["patch_embed.conv3.weight"].shape == (64, 64, 3, 3)
    assert state["patch_embed.proj.weight"].shape == (384, 64, 8, 8)
    assert set(micro(return_dense=False, mix_token=False).state_dict()) == {
        key for key in micro().state_dict() if not key.startswith("aux_head")
    }


@pytest.mark.parametrize("size", SIZES)
def test_registry_gives_the_same_model(size: str) -> None:
    name = f"evit_lvvit_{SIZES[size]}_patch16_224"
    assert timm.is_model(name)
    arguments = {**MICRO, "keep_rate": 0.4, "fuse_token": False, "drop_loc": (0, 2)}
    torch.manual_seed(1)
    ours = getattr(models, f"lvvit_{size}")(**arguments).eval()
    torch.manual_seed(1)
    registered = timm.create_model(name, **arguments).eval()
    assert isinstance(registered, LVViT)
    assert torch.equal(ours(images()), registered(images()))
    blocks = [block for block in registered.blocks if isinstance(block, ReorganizingBlock)]
    assert [(block.keep_rate, block.rule.fuse_token) for block in blocks] == [(0.4, False)] * 2
    assert ours.default_cfg["crop_pct"] == (0.9 if size in ("tiny", "small") else 1.0)


def test_initial_weights() -> None:
    model = micro(big=False, embed_dim=240, num_classes=50)
    for weight in (model.cls_token, model.pos_embed, model.head.weight, model.aux_head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.head.bias.abs().max() == model.aux_head.bias.abs().max() == 0


def test_arguments_pass_through() -> None:
    assert micro(in_chans=1)(images()[:, :1]).shape == (3, 5)
    assert evit_ext.count_macs(micro(in_chans=1)) < evit_ext.count_macs(micro())
    assert micro(drop_path_rate=0.3).blocks[3].drop_path1.drop_prob == pytest.approx(0.3)
    assert micro(img_size=(32, 64))(images(3, 32, 64)).shape == (3, 5)
    assert micro(skip_lam=1.0).blocks[0].ls1(images()) is not None
    assert not any(isinstance(module, ResidualScale) for module in micro(skip_lam=1.0).modules())
    assert "skip_lam=2.0" in repr(micro())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 7}, "patch_size must be an even number.*got 7"),
        ({"return_dense": False}, "mix_token=True needs return_dense=True"),
        ({"skip_lam": 0.0}, "skip_lam must be positive, got 0.0"),
        ({"init_values": 1e-5}, "LV-ViT scales its residuals with skip_lam"),
        ({"global_pool": "avg"}, "no global_pool='avg'"),
        ({"patch_drop_rate": 0.1}, "patch_drop_rate would drop patches without telling which"),
        ({"keep_rate": 2}, r"keep_rate must be in \(0, 1\], got 2"),
    ],
)
def test_argument_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro(**arguments)


def test_image_errors() -> None:
    with pytest.raises(ValueError, match="images are 36 × 32, no multiple of the patch, 8 × 8"):
        micro()(images(3, 36, 32))
    with pytest.raises(ValueError, match="images are 48 × 40, the model was built for 32 × 32"):
        micro(dynamic_img_size=False)(images(3, 48, 40))
    with pytest.raises(ValueError, match="cannot be changed to 16"):
        micro().set_input_size(patch_size=16)
    padded = micro(dynamic_img_pad=True)
    x = torch.nn.functional.pad(images(3, 36, 30), (0, 2, 0, 4))
    torch.testing.assert_close(padded(images(3, 36, 30)), padded(x))


def test_both_heads_are_reset() -> None:
    model = micro()
    model.reset_classifier(3)
    assert model(images()).shape == (3, 3) and model.train()(images()).aux_logits.shape[2] == 3
    model.reset_classifier(0)
    assert model(images()).shape == model.eval()(images()).shape == (3, 24)
    assert torch.equal(model(images()), model.forward_features(images())[:, 0])
    assert torch.equal(micro(num_classes=0)(images()), micro().forward_tokens(images())[0][:, 0])
    with pytest.raises(ValueError, match="no global_pool='avg'"):
        model.reset_classifier(3, "avg")


# --- inference


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    ("rates", "skip_lam"), [((0.7, 0.7, 0.7), 2.0), ((0.2, 0.9, 0.6), 3.0), ((1.0, 1.0, 0.3), 1.0)]
)
def test_agrees_with_the_slow_implementation(
    rates: tuple[float, ...], skip_lam: float, fuse: bool, device: torch.device
) -> None:
    model = micro(keep_rate=rates, fuse_token=fuse, skip_lam=skip_lam).double()
    x = images(dtype=torch.float64)
    expected, _, _, ids = slow_lvvit(model, x, rates, (1, 2, 3), fuse, skip_lam)
    loss_weights = torch.randn(expected.shape, dtype=torch.float64)
    expected_gradients = torch.autograd.grad((expected * loss_weights).sum(), list(model.parameters()))
    model.to(device)
    with evit_ext.record_tokens(model) as record:
        logits = model(x.to(device))
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-11, atol=1e-12)
    with torch.no_grad():  # another operator
        torch.testing.assert_close(model(x.to(device)).cpu(), expected, rtol=1e-11, atol=1e-12)
        patches = model.forward_tokens(x.to(device))[1]
    assert patches.dtype == torch.int64
    assert torch.equal(patches.cpu().sort().values, ids.sort().values)
    fused = int(fuse and rates[2] < 1)
    assert torch.equal(patches[:, : patches.shape[1] - fused], record.kept[2])
    gradients = torch.autograd.grad((logits.cpu() * loss_weights).sum(), list(model.parameters()))
    atol = 1e-12 * max(gradient.abs().max().item() for gradient in expected_gradients)
    for (name, _), gradient, other in zip(
        model.named_parameters(), gradients, expected_gradients, strict=True
    ):
        torch.testing.assert_close(
            gradient.cpu(), other, rtol=1e-9, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("size", "skip_lam"), [("tiny", 1.0), ("medium", 2.0), ("large", 3.0)])
@pytest.mark.parametrize("keep_rate", [0.7, 1.0])
def test_sizes_agree_with_the_slow_implementation(size: str, skip_lam: float, keep_rate: float) -> None:
    """With the published channels, heads, stem and scaling, which no argument overrides."""
    model = getattr(models, f"lvvit_{size}")(keep_rate, depth=4, img_size=64, num_classes=9).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.normal_(mean=float(parameter.dim() == 1), std=fan_in**-0.5, generator=generator)
        x = images(2, 64, 64, dtype=torch.float64)
        expected, *_ = slow_lvvit(model, x, (keep_rate,) * 3, (1, 2, 3), skip_lam=skip_lam)
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-12)


def test_an_earlier_fused_token_is_left_out() -> None:
    """The case above where it counts: a fused token that a later stage kept, and a last one."""
    model = micro(keep_rate=(0.2, 0.9, 0.6)).double()
    tokens, patches = model.forward_tokens(images(dtype=torch.float64))
    assert ((patches == -1).sum(dim=1) > 1).any()
    with_fused = model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).amax(dim=1)
    assert not torch.equal(model(images(dtype=torch.float64)), with_fused)


def test_nothing_but_fused_tokens_left(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([torch.arange(17.0), torch.tensor([0.0, 0.1, 0.9]), torch.tensor([0.0, 0.5, 0.6])])
    monkeypatch.setattr(evit_ext.ops, "class_attention", lambda q, k: next(scores).repeat(len(q), 1))
    # In float64 scores are class_attention's on every device: elsewhere attention_with_scores may give them.
    model = micro(keep_rate=(0.01, 0.5, 0.5)).double()
    tokens, patches = model.forward_tokens(images(dtype=torch.float64))
    assert patches.tolist() == [[-1, -1]] * 3
    expected = model.head(tokens[:, 0])
    logits = model.forward_head(tokens, patches=patches)
    assert torch.equal(logits, expected)
    logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("keep_rate", [0.6, 1.0])
@pytest.mark.parametrize(("height", "width"), [(48, 48), (24, 24), (32, 56), (40, 16)])
def test_images_of_any_size(height: int, width: int, keep_rate: float) -> None:
    model = micro(keep_rate=keep_rate).double()
    x = images(2, height, width, dtype=torch.float64)
    expected, *_ = slow_lvvit(model, x, (keep_rate,) * 3, (1, 2, 3))
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-12)
    model.set_input_size(img_size=(height, width))
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-12)


def test_forward_is_features_and_head() -> None:
    model = micro(keep_rate=0.6)
    x = images()
    tokens, patches = model.forward_tokens(x)
    assert torch.equal(model.forward_features(x), tokens)
    assert torch.equal(model.forward_head(tokens, patches=patches), model(x))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    with pytest.raises(ValueError, match="give patches, of forward_tokens"):
        model.forward_head(tokens)
    evit_ext.set_keep_rate(model, 1.0)
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))


def test_without_auxiliary_head() -> None:
    model = micro(return_dense=False, mix_token=False)
    expected = model.head(model.forward_features(images())[:, 0])
    assert torch.equal(model(images()), expected)
    assert torch.equal(model.forward_head(model.forward_features(images())), expected)
    assert isinstance(model.train()(images()), torch.Tensor)


def test_apply_set_keep_rate_remove() -> None:
    model = micro(keep_rate=0.5)
    expected = model(images())
    evit_ext.set_keep_rate(model, 1.0)
    full = model(images())
    assert not torch.equal(full, expected)
    evit_ext.remove(model)
    assert all(type(block) is Block for block in model.blocks)
    assert torch.equal(model(images()), full)
    assert torch.equal(evit_ext.apply(model, 0.5)(images()), expected)


def test_hooks_see_tokens() -> None:
    model, shapes = micro(keep_rate=0.5), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: shapes.append(out.shape[1]))
    model(images())
    assert shapes == [17, 1 + 8 + 1, 1 + 5 + 1, 1 + 3 + 1]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [False, True])
def test_compile_with_dynamic_batch(training: bool, gradients: bool) -> None:
    model = micro(keep_rate=0.6, mix_token=False).train(training)
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.set_grad_enabled(gradients):
        for batch in (2, 3, 5):
            torch.testing.assert_close(compiled(images(batch)), model(images(batch)))
    assert graphs.frame_count == 2


def test_compile_at_two_sizes() -> None:
    model = micro(keep_rate=0.6)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for height, width in ((32, 32), (48, 48), (40, 64)):
        x = images(3, height, width)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_export() -> None:
    model = micro(keep_rate=0.6)
    program = torch.export.export(
        model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    for batch in (1, 5):
        torch.testing.assert_close(program.module()(images(batch)), model(images(batch)))


def test_autocast() -> None:
    model = micro(keep_rate=0.6, big=False)
    expected = model(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(images()).float(), expected, rtol=0.1, atol=0.05)
        output = model.train()(images())
    (output.logits.float().sum() + output.aux_logits.float().square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- weights


def test_copies_are_independent() -> None:
    model = micro(keep_rate=0.5)
    expected = model(images())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    torch.nn.init.zeros_(model.aux_head.weight)
    for other in copies:
        assert torch.equal(other(images()), expected)


@pytest.mark.parametrize("nesting", [None, "state_dict"])
def test_pretrained_from_a_file(tmp_path: Path, nesting: str | None) -> None:
    """The path that the published weights take, for another image size and other numbers of classes."""
    source = micro(num_classes=1000, keep_rate=0.6)
    state = source.state_dict()
    if nesting:
        state = {f"module.{key}": value for key, value in state.items()}
    torch.save({nesting: state} if nesting else state, tmp_path / "weights.pth.tar")

    def load(**arguments: Any) -> LVViT:
        overlay = {"file": str(tmp_path / "weights.pth.tar")}
        arguments = {"num_classes": 1000, "keep_rate": 0.6, **arguments}
        return micro(big=False, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)

    assert torch.equal(load()(images()), source(images()))
    other = load(num_classes=7, img_size=48)
    assert torch.equal(other.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert torch.equal(other.patch_embed.bn1.running_var, source.patch_embed.bn1.running_var)
    assert other.head.weight.shape == other.aux_head.weight.shape == (7, 24)
    x = images(2, 48, 48)
    torch.testing.assert_close(other.forward_tokens(x)[0], source.forward_tokens(x)[0], rtol=1e-4, atol=1e-4)
    assert load(in_chans=1).patch_embed.conv1.weight.shape == (6, 1, 7, 7)
    plain = load(return_dense=False, mix_token=False)
    assert plain.aux_head is None
    assert torch.equal(plain(images()), source.head(source.forward_features(images())[:, 0]))


def test_state_dict_goes_both_ways() -> None:
    model, file = micro(keep_rate=0.6), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = micro(big=False, keep_rate=0.6)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(images()), model(images()))
    evit_ext.remove(other).load_state_dict(model.state_dict())


def test_pretrained_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("refused")

    monkeypatch.setattr("evit_ext.models.lvvit.build_model_with_cfg", fail)
    with pytest.raises(RuntimeError, match="weights of LV-ViT-M could not be fetched from GitHub"):
        models.lvvit_medium(pretrained=True)
    with pytest.raises(ValueError, match="keep_rate must be in"):  # before anything is fetched
        models.lvvit_medium(pretrained=True, keep_rate=0)


def test_where_the_published_weights_are() -> None:
    urls = {size: timm.get_pretrained_cfg(f"evit_lvvit_{size}_patch16_224").url for size in "tsml"}
    release = "https://github.com/zihangJiang/TokenLabeling/releases/download/1.0"
    assert urls["s"] == f"{release}/lvvit_s-26M-224-83.3.pth.tar"
    assert urls["m"] == f"{release}/lvvit_m-56M-224-84.0.pth.tar"
    assert not urls["t"] and not urls["l"]
