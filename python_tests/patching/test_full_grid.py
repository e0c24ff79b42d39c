"""Intermediate features as full grids: value, layout, and a segmentation head that knows nothing of it."""

from __future__ import annotations

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

import evit_ext

pytestmark = pytest.mark.usefixtures("one_thread")

DROP_LOC = (0, 1, 3)
RATES = (0.7, 0.6, 0.5)


def images(
    batch: int = 2, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (32, 32)
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, *size, dtype=dtype, generator=generator)


def slow_grids(vit: Any, x: torch.Tensor, fill: str) -> list[torch.Tensor]:
    """For every block of the EViT `vit`, features [B, N - P, C], put back patch by patch."""
    prefix = vit.num_prefix_tokens
    outputs: list[torch.Tensor] = []
    sums: dict[int, torch.Tensor] = {}

    def watch(number: int) -> Any:
        def after(module: Any, arguments: Any, out: torch.Tensor) -> None:
            outputs.append(out)
            # The residual stream between attention and MLP, computed once more from the block's input.
            x = arguments[0]
            normed = module.norm1(x)
            attended = type(module.attn).forward(module.attn, normed)
            sums[number] = x + module.ls1(attended)

        return after

    handles = [block.register_forward_hook(watch(i)) for i, block in enumerate(vit.blocks)]
    with evit_ext.record_tokens(vit) as record:
        vit.forward_features(x)
    for handle in handles:
        handle.remove()
    plans = [record.trail.plan(stage) for stage in range(len(DROP_LOC))]
    steps = [(plan.kept, plan.num_patches) for plan in plans]
    grids = []
    for number, out in enumerate(outputs):
        stages = sum(location <= number for location in DROP_LOC)
        rows = []
        for b in range(len(x)):
            tokens = list(out[b, prefix:])
            for stage in reversed(range(stages)):
                kept, num_patches = steps[stage]
                before: list[Any] = []
                for j in range(num_patches):
                    if j in kept[b].tolist():
                        before.append(tokens[kept[b].tolist().index(j)])
                    elif fill == "fused":
                        before.append(tokens[-1])
                    elif fill == "zero":
                        before.append(torch.zeros_like(tokens[0]))
                    else:
                        before.append(sums[DROP_LOC[stage]][b, prefix + j])
                tokens = before
            rows.append(torch.stack(tokens))
        grids.append(torch.stack(rows))
    return grids


@pytest.mark.parametrize(
    ("fuse", "fill"), [(True, "fused"), (True, "zero"), (True, "before"), (False, "before")]
)
def test_against_plain_loops(small_vit: Any, fuse: bool, fill: str, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit(dtype=torch.float64, reg_tokens=1).to(device), RATES, DROP_LOC, fuse)
    x = images().to(device)
    expected = slow_grids(vit, x, fill)
    grids = vit.forward_intermediates(x, fill=fill, intermediates_only=True)
    assert len(grids) == 4
    for grid, slow in zip(grids, expected, strict=True):
        assert grid.shape == (2, 24, 4, 4) and grid.is_contiguous()
        torch.testing.assert_close(grid.flatten(2).transpose(1, 2), slow, rtol=1e-11, atol=1e-12)
    for a, b in zip(grids, vit.forward_intermediates(x, output_fmt="NLC", fill=fill)[1], strict=True):
        assert torch.equal(a.flatten(2).transpose(1, 2), b)


def test_the_default_filling(small_vit: Any) -> None:
    x = images()
    for fuse, fill in ((True, "fused"), (False, "before")):
        vit = evit_ext.apply(small_vit(dtype=torch.float64), 0.5, DROP_LOC, fuse)
        default = vit.forward_intermediates(x, intermediates_only=True)
        for a, b in zip(
            default, vit.forward_intermediates(x, intermediates_only=True, fill=fill), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("indices", [None, 2, [0, 3], [3, 1], -1])
def test_returns_what_timm_returns(small_vit: Any, indices: Any, norm: bool) -> None:
    vit, x = small_vit(dtype=torch.float64), images()
    plain = copy.deepcopy(vit)
    evit_ext.apply(vit, 1.0)
    if indices == -1:
        with pytest.raises(Exception) as theirs:
            plain.forward_intermediates(x, indices=indices)
        with pytest.raises(type(theirs.value)):
            vit.forward_intermediates(x, indices=indices)
        return
    arguments = {"indices": indices, "norm": norm}
    for more in (
        {},
        {"stop_early": True},
        {"output_fmt": "NLC"},
        {"return_prefix_tokens": True},
        {"intermediates_only": True},
        {"output_dict": True, "return_prefix_tokens": True},
    ):
        expected = plain.forward_intermediates(x, **arguments, **more)
        got = vit.forward_intermediates(x, **arguments, **more)
        compare(got, expected)
    # By position, too.
    compare(
        vit.forward_intermediates(x, indices, True, norm, False, "NLC", True),
        plain.forward_intermediates(x, indices, True, norm, False, "NLC", True),
    )
    evit_ext.set_keep_rate(vit, 0.5)
    shapes = lambda out: [tuple(grid.shape) for grid in out]  # noqa: E731
    grids = vit.forward_intermediates(x, **arguments, intermediates_only=True)
    assert shapes(grids) == shapes(plain.forward_intermediates(x, **arguments, intermediates_only=True))
    features, _ = vit.forward_intermediates(x, **arguments)
    torch.testing.assert_close(features, vit.forward_features(x))


def compare(got: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected) or set(got) == set(expected)
        for key in expected:
            compare(got[key], expected[key])
    else:
        assert type(got) is type(expected) and len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            compare(a, b)


def test_sizes_that_are_not_square(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(dynamic_img_size=True, dtype=torch.float64), 0.6)
    (grid,) = vit.forward_intermediates(images(size=(24, 56)), indices=1, intermediates_only=True)
    assert grid.shape == (2, 24, 3, 7)


def test_norm_is_of_the_filling_too(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(dtype=torch.float64), 0.5, DROP_LOC)
    x = images()
    for fill in ("fused", "before"):
        plain = vit.forward_intermediates(x, fill=fill, output_fmt="NLC", intermediates_only=True)
        normed = vit.forward_intermediates(x, fill=fill, output_fmt="NLC", norm=True, intermediates_only=True)
        for a, b in zip(plain, normed, strict=True):
            torch.testing.assert_close(vit.norm(a), b)


class SegmentationHead(nn.Module):
    """A head as others write it: four grids of a backbone, upsampled to logits for every pixel."""

    def __init__(self, backbone: Any, channels: int, classes: int = 3) -> None:
        super().__init__()
        self.backbone = backbone
        self.lateral = nn.ModuleList(nn.Conv2d(channels, 8, 1) for _ in range(4))
        self.smooth = nn.Conv2d(8, classes, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grids = self.backbone.forward_intermediates(x, indices=4, norm=True, intermediates_only=True)
        mixed = sum(lateral(grid) for lateral, grid in zip(self.lateral, grids, strict=True))
        return nn.functional.interpolate(self.smooth(mixed), size=x.shape[-2:], mode="bilinear")


def test_a_segmentation_head_works_unchanged(small_vit: Any, device: torch.device) -> None:
    """It learns to tell bright places from dark ones, and its loss reaches every layer."""
    torch.manual_seed(0)
    vit = evit_ext.apply(small_vit(), 0.6, (1, 2))
    model = SegmentationHead(vit, 24, classes=2).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    coarse = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    target = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)
    x = (target.float() + 0.1 * torch.randn(16, 1, 32, 32)).expand(-1, 3, -1, -1).to(device)
    target = target[:, 0].long().to(device)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for name, p in vit.blocks.named_parameters())
    accuracy = (model.eval()(x).argmax(1) == target).float().mean()
    assert accuracy > 0.9  # 0.97 measured; one answer for all would give 0.5


def test_gradients_and_checkpointing(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(dtype=torch.float64), RATES, DROP_LOC).train()
    x, gradients = images(), []
    for fill in ("fused", "before"):
        for checkpointing in (False, True):
            vit.set_grad_checkpointing(checkpointing)
            vit.zero_grad()
            grids = vit.forward_intermediates(x, fill=fill, intermediates_only=True)
            sum(grid.square().sum() for grid in grids).backward()
            gradients.append([p.grad.clone() for p in vit.blocks.parameters()])
        for a, b in zip(*gradients[-2:], strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_and_exported(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(dtype=torch.float64), 0.6)

    class Grids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return self.vit.forward_intermediates(x, intermediates_only=True)

    x = images()
    torch.compiler.reset()
    expected = vit.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(torch.compile(Grids(), fullgraph=True, backend="aot_eager")(x), expected, strict=True):
        torch.testing.assert_close(a, b)
    program = torch.export.export(Grids(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for batch in (1, 3):
        x = images(batch)
        for a, b in zip(program.module()(x), Grids()(x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_base_patch16_siglip_224"]
)
def test_other_families(name: str) -> None:
    vit = timm.create_model(name, depth=4, embed_dim=48, num_heads=2).eval()
    side = vit.patch_embed.img_size[0]
    x = images(1, torch.float32, (side, side))
    with torch.no_grad():
        plain = vit.forward_intermediates(x, intermediates_only=True)
        evit_ext.apply(vit, 1.0)
        compare(vit.forward_intermediates(x, intermediates_only=True), plain)
        evit_ext.set_keep_rate(vit, 0.6)
        grids = vit.forward_intermediates(x, intermediates_only=True)
    assert [grid.shape for grid in grids] == [grid.shape for grid in plain]


def test_features_only() -> None:
    arguments = {"depth": 4, "embed_dim": 48, "num_heads": 2, "img_size": 64}
    net = timm.create_model("vit_small_patch16_224", features_only=True, **arguments).eval()
    x = images(1, torch.float32, (64, 64))
    shapes = [grid.shape for grid in net(x)]
    with pytest.raises(ValueError, match=r"pass the model inside the wrapper \(.model\)"):
        evit_ext.apply(net)
    evit_ext.apply(net.model, 0.6)
    assert [grid.shape for grid in net(x)] == shapes
    assert net.feature_info.channels() == [48, 48, 48]


def test_copies_have_their_own(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), 0.6)
    x = images(dtype=torch.float32)
    expected = vit.forward_intermediates(x, intermediates_only=True)
    copies = [copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))]
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    for copied in copies:
        compare(copied.forward_intermediates(x, intermediates_only=True), expected)


def test_remove_takes_it_away(small_vit: Any) -> None:
    vit = small_vit()
    attributes = set(vit.__dict__)
    evit_ext.remove(evit_ext.apply(vit, 0.6))
    assert set(vit.__dict__) == attributes


def test_errors(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), 0.6, fuse_token=False)
    x = images(dtype=torch.float32)
    with pytest.raises(ValueError, match="fill='fused' needs a fused token, but the model drops patches"):
        vit.forward_intermediates(x, fill="fused")
    with pytest.raises(ValueError, match="fill must be one of 'fused', 'before', 'zero', got 'mean'"):
        vit.forward_intermediates(x, fill="mean")
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        vit.forward_intermediates(x, output_fmt="NHWC")
    assert isinstance(timm.create_model("eva02_tiny_patch14_224", depth=1), Eva)


def test_many_threads(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), 0.6)
    inputs = [torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(60)]

    def grids(x: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return vit.forward_intermediates(x, intermediates_only=True)

    expected = [grids(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, alone in zip(pool.map(grids, inputs), expected, strict=True):
            compare(got, alone)
    assert all(block.recorders == () for block in vit.blocks[1:])


def test_inside_of_a_checkpoint(small_vit: Any) -> None:
    """Detectors put checkpoints around whole backbones."""
    vit, x, gradients = evit_ext.apply(small_vit(dtype=torch.float64), 0.6).train(), images(), []

    def loss(x: torch.Tensor) -> torch.Tensor:
        return sum(grid.square().sum() for grid in vit.forward_intermediates(x, intermediates_only=True))

    for checkpointing in (False, True):
        vit.zero_grad()
        (checkpoint(loss, x, use_reentrant=False) if checkpointing else loss(x)).backward()
        gradients.append([p.grad.clone() for p in vit.blocks.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_reentrant_checkpointing_has_no_gradient_of_what_was_before(small_vit: Any) -> None:
    vit, x = evit_ext.apply(small_vit(), 0.6).train(), images(dtype=torch.float32)
    vit.set_grad_checkpointing()
    was = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(True)
    try:
        vit.forward_intermediates(x, intermediates_only=True)
        with pytest.raises(RuntimeError, match="no gradient under reentrant gradient checkpointing"):
            vit.forward_intermediates(x, fill="before")
    finally:
        timm.layers.set_reentrant_ckpt(was)


def test_on_meta_tensors(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), 0.6).to("meta")
    grids = vit.forward_intermediates(images(dtype=torch.float32).to("meta"), intermediates_only=True)
    assert [tuple(grid.shape) for grid in grids] == [(2, 24, 4, 4)] * 4


def test_a_method_of_another_kind_is_left_alone(small_vit: Any) -> None:
    class Other(VisionTransformer):
        def forward_intermediates(self, x: torch.Tensor) -> str:  # type: ignore[override]
            return "mine"

    vit = evit_ext.apply(small_vit(cls=Other), 0.6)
    assert vit.forward_intermediates(images()) == "mine"
    vit = small_vit()
    calls: list[int] = []
    own = vit.forward_intermediates
    wrapped = functools.wraps(own)(lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    vit.forward_intermediates = wrapped
    evit_ext.apply(vit, 0.6)
    vit.forward_intermediates(images(dtype=torch.float32))
    assert calls == [1]
    assert evit_ext.remove(vit).forward_intermediates is wrapped
