"""Every line of docs/supported-models.md: what `apply` makes of the model, against a slow implementation.

The models are timm's own, built by their names with few and narrow blocks, small images and random weights.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import slow_families
import timm
import torch
from slow_families import FUSED, slow_family
from timm.layers import Attention
from timm.models.eva import Eva
from torch import Tensor, nn

import evit_ext

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).parents[1] / "docs" / "supported-models.md"

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


@pytest.fixture(params=LINES, ids=[line.name for line in LINES])
def line(request: pytest.FixtureRequest) -> Line:
    """Each line of the table in turn."""
    return request.param  # type: ignore[no-any-return]


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


# Against the unchanged model and against the slow implementation.


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_keep_rate_one_is_the_original_to_the_last_bit(line: Line, training: bool) -> None:
    rates = {"drop_path_rate": 0.3, "attn_drop_rate": 0.2, "proj_drop_rate": 0.1} if training else {}
    vit, x = line.build(**rates).train(training), line.images()
    expected = forward(copy.deepcopy(vit), x)
    evit_ext.apply(vit, 1.0, DROP_LOC)
    for actual, wanted in zip(tensors(forward(vit, x)), tensors(expected), strict=True):
        assert torch.equal(actual, wanted)


def assert_agrees(line: Line, rates: tuple[float, ...], drop_loc: tuple[int, ...], fuse: bool) -> None:
    """Compare logits, patches, scores and gradients with those of the slow implementation."""
    training = drops_patches(line)
    slow, x = line.build(torch.float64).train(training), line.images(2, torch.float64)
    plain, vit = copy.deepcopy(slow), copy.deepcopy(slow)
    torch.manual_seed(3)
    expected = slow_family(slow, x, rates, drop_loc, fuse)
    evit_ext.apply(vit, rates, drop_loc, fuse)
    with evit_ext.record_tokens(vit) as record:
        logits = forward(vit, x)
    # The largest errors seen: logits 1.4e-14, scores 5e-16, gradients 2e-13 of the largest.
    torch.testing.assert_close(logits, expected.logits, rtol=1e-12, atol=2e-13)
    for kept, scores, slow_kept, slow_scores in zip(
        record.kept, record.scores, expected.kept, expected.scores, strict=True
    ):
        assert torch.equal(kept.sort(dim=1).values, slow_kept.sort(dim=1).values)
        torch.testing.assert_close(scores, slow_scores, rtol=1e-12, atol=1e-14)
    weights = torch.randn_like(expected.logits)
    for out in (logits, expected.logits, forward(plain, x)):
        (out * weights).sum().backward()
    largest = max(p.grad.abs().max().item() for p in slow.parameters() if p.grad is not None)
    for (name, parameter), other, original in zip(
        vit.named_parameters(), slow.parameters(), plain.parameters(), strict=True
    ):
        # A parameter that is used or unused here only would stop DistributedDataParallel.
        assert (parameter.grad is None) == (original.grad is None), name
        if parameter.grad is None:
            assert other.grad is None, name
            continue
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-12 * largest, msg=name)
        assert not original.grad.any() or parameter.grad.any(), name


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "not fused"])
def test_agrees_with_the_slow_implementation(line: Line, fuse: bool) -> None:
    assert_agrees(line, RATES, DROP_LOC, fuse)


def test_agrees_where_one_stage_keeps_all(line: Line) -> None:
    assert_agrees(line, (0.5, 1.0, 0.6), (1, 2, 3), True)


def test_agrees_at_the_default_rate(line: Line) -> None:
    training = drops_patches(line)
    vit, x = line.build(torch.float64).train(training), line.images(2, torch.float64)
    torch.manual_seed(3)
    with torch.no_grad():
        expected = slow_family(vit, x, (0.7,) * 3, (1, 2, 3))
        evit_ext.apply(vit, 0.7)
        # Without gradients another operator runs than with them.
        torch.testing.assert_close(forward(vit, x), expected.logits, rtol=1e-12, atol=2e-13)


# That a mistake would be seen: the slow implementation with it is far from the one without.


def _no_rotation(x: Tensor, prefix: int, places: Tensor, *others: Any) -> Tensor:
    return x


def _first_rotations(x: Tensor, prefix: int, places: Tensor, *others: Any) -> Tensor:
    """The first patches' rotations, whichever are left."""
    own = torch.arange(places.shape[1]).expand(places.shape).where(places != FUSED, FUSED)
    return _ROTATED(x, prefix, own, *others)


def _fused_is_rotated(x: Tensor, prefix: int, places: Tensor, *others: Any) -> Tensor:
    return _ROTATED(x, prefix, places.where(places != FUSED, 5), *others)


def _class_token_is_rotated(x: Tensor, prefix: int, places: Tensor, *others: Any) -> Tensor:
    return _ROTATED(x, prefix - 1, torch.nn.functional.pad(places, (1, 0), value=5), *others)


def _no_bias(*args: Any) -> None:
    return None


def _first_biases(vit: Any, attention: Any, places: Tensor, grid: tuple[int, int]) -> Tensor | None:
    own = torch.arange(places.shape[1]).expand(places.shape).where(places != FUSED, FUSED)
    return _BIASES(vit, attention, own, grid)


def _bias_of_a_patch(vit: Any, attention: Any, places: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """A patch's bias for the fused token."""
    return _BIASES(vit, attention, places.where(places != FUSED, 5), grid)


def _bias_transposed(*args: Any) -> Tensor | None:
    bias = _BIASES(*args)
    return None if bias is None else bias.transpose(2, 3)


def _a_patch_too_many(vit: Any, images: Tensor) -> Any:
    """The first patch taken for a prefix token."""
    x, prefix, places, grid = _EMBED(vit, images)
    return x, prefix + 1, places[:, 1:], grid


def _score_of_another(attention: Any, *args: Any) -> tuple[Tensor, Tensor]:
    """The mean of all queries for the first token's attention, and the other way round."""
    out, probabilities = _ATTENTION(attention, *args)
    first, mean = probabilities[:, :, :1], probabilities.mean(dim=2, keepdim=True)
    others = probabilities[:, :, 1:] * 0 + first  # of which the mean is the first
    return out, torch.cat([mean, others + (first - mean) / others.shape[2]], dim=2)


def _is_rotated(vit: Any) -> bool:
    return getattr(vit, "rope", None) is not None


def _is_biased(vit: Any) -> bool:
    own = getattr(vit.blocks[0].attn, "relative_position_bias_table", None) is not None
    return own or getattr(vit, "rel_pos_bias", None) is not None


_EMBED, _ROTATED, _BIASES, _ATTENTION = (
    getattr(slow_families, name) for name in ("_embed", "_rotated", "_biases", "_attention")
)


@pytest.mark.parametrize(
    ("concerns", "replaced", "mistake"),
    [
        (_is_rotated, "_rotated", _no_rotation),
        (_is_rotated, "_rotated", _first_rotations),
        (_is_rotated, "_rotated", _fused_is_rotated),
        (lambda vit: _is_rotated(vit) and vit.num_prefix_tokens > 0, "_rotated", _class_token_is_rotated),
        (_is_biased, "_biases", _no_bias),
        (_is_biased, "_biases", _first_biases),
        (_is_biased, "_biases", _bias_of_a_patch),
        (_is_biased, "_biases", _bias_transposed),
        (lambda vit: not _is_biased(vit), "_embed", _a_patch_too_many),
        (lambda vit: True, "_attention", _score_of_another),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.__name__.strip("_").replace("_", " "),
)
def test_a_mistake_would_be_seen(
    concerns: Callable[[Any], bool], replaced: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in LINES:
        vit, x = line.build(torch.float64), line.images(1, torch.float64)
        if not concerns(vit):
            continue
        with torch.no_grad():
            expected = slow_family(vit, x, RATES, DROP_LOC).logits
            with monkeypatch.context() as patch:
                patch.setattr(slow_families, replaced, mistake)
                difference = (slow_family(vit, x, RATES, DROP_LOC).logits - expected).abs().max()
        assert difference > 1e-4, (line.name, float(difference))


# What stays as it was.


def attributes(vit: nn.Module) -> dict[str, Any]:
    """All that the modules of `vit` hold, hooks included, by name."""
    return {
        f"{name}.{attribute}": dict(value) if isinstance(value, dict) else value
        for name, module in vit.named_modules()
        for attribute, value in vars(module).items()
    }


def test_remove_leaves_nothing_behind(line: Line) -> None:
    vit, x = line.build(), line.images()
    expected, before, blocks, text = vit(x), attributes(vit), list(vit.blocks), repr(vit)
    evit_ext.apply(vit, RATES, DROP_LOC)
    assert not torch.equal(vit(x), expected)
    assert evit_ext.remove(vit) is vit
    assert all(a is b for a, b in zip(vit.blocks, blocks, strict=True))
    after = attributes(vit)
    assert list(after) == list(before) or set(after) == set(before)
    assert [
        name for name, value in after.items() if value is not before[name] and value != before[name]
    ] == []
    assert repr(vit) == text
    assert torch.equal(vit(x), expected)
    evit_ext.apply(vit, RATES, DROP_LOC)  # and once more


def test_state_dicts_go_both_ways(line: Line) -> None:
    plain, x = line.build(), line.images()
    vit = evit_ext.apply(copy.deepcopy(plain), RATES, DROP_LOC)
    assert list(vit.state_dict()) == list(plain.state_dict())
    other = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    vit.load_state_dict(other.state_dict())
    assert torch.equal(vit(x), evit_ext.apply(copy.deepcopy(other), RATES, DROP_LOC)(x))
    plain.load_state_dict(vit.state_dict())
    assert torch.equal(plain(x), other(x))


def test_copies_are_independent(line: Line) -> None:
    vit, x = evit_ext.apply(line.build(), RATES, DROP_LOC), line.images()
    plain, expected = line.build()(x), vit(x)
    copies = [copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))]
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    evit_ext.set_keep_rate(vit, 1.0)
    for other in copies:
        assert torch.equal(other(x), expected)
        evit_ext.set_keep_rate(other, 1.0)
        assert torch.equal(other(x), plain)
        evit_ext.remove(other)
        assert torch.equal(other(x), plain)
    assert len([block for block in vit.blocks if hasattr(block, "keep_rate")]) == 3


# What is done with models.


def test_gradient_checkpointing(line: Line) -> None:
    """Also with two forwards before the backwards: a block computed again has its own forward's patches."""
    gradients = []
    for checkpointing in (False, True):
        vit = evit_ext.apply(line.build(torch.float64), RATES, DROP_LOC).train()
        vit.set_grad_checkpointing(checkpointing)
        outs = [forward(vit, line.images(2, torch.float64, seed), seed) for seed in (0, 1)]
        for out in outs:
            loss(out).backward()
        gradients.append([parameter.grad for parameter in vit.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert (plain is None) == (checkpointed is None)
        if plain is not None:
            torch.testing.assert_close(plain, checkpointed, rtol=1e-10, atol=1e-11)


def compiled_agrees(line: Line, depth: int, rates: tuple[float, ...], drop_loc: tuple[int, ...]) -> None:
    vit = evit_ext.apply(line.build(torch.float64, **line.of_depth(depth)), rates, drop_loc)
    x = line.images(2, torch.float64)
    torch.compiler.reset()
    with torch.no_grad():
        logits = torch.compile(vit, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(logits, vit(x), rtol=1e-12, atol=1e-12)


def of_other_blocks() -> list[Line]:
    """Return the lines but those whose blocks, and what these are told, are those of an earlier line.

    What differs between such models, their weights and heads, is timm's own code, and compiling takes long.
    """
    chosen: dict[str, Line] = {}
    for line in LINES:
        vit = line.build()
        told = (getattr(vit, name, None) for name in ("rope", "rel_pos_bias"))
        held = [(name, p.shape) for name, p in vit.blocks[0].named_parameters()]
        tokens = (vit.num_prefix_tokens, getattr(vit, "cls_token", None) is None, vit.pos_embed is None)
        rest = (line.size, drops_patches(line), vit.patch_embed.__class__)
        chosen.setdefault(repr((vit.blocks[0], held, *told, tokens, rest)), line)
    return list(chosen.values())


@pytest.mark.parametrize("line", of_other_blocks(), ids=lambda line: line.name)
def test_compiles_without_a_graph_break(line: Line) -> None:
    if line.family == "vit":  # whose blocks do not depend on each other
        compiled_agrees(line, 1, (0.6,), (0,))
    else:
        compiled_agrees(line, 2, (0.7, 0.6), (0, 1))


#: One or two lines of each family, for what takes long.
few = named("DINOv2 with registers", "SigLIP", "DINOv3", "ViT with mixed rotary embeddings", "BEiT")
fewer = named("SigLIP", "ViT with mixed rotary embeddings", "BEiT")


@fewer
def test_compiles_with_blocks_that_follow(line: Line) -> None:
    compiled_agrees(line, 3, (0.6,), (0,))


@fewer
def test_compiles_for_training(line: Line) -> None:
    vit = evit_ext.apply(line.build(torch.float64, **line.of_depth(2)), 0.6, (0,)).train()
    parameters = [parameter for parameter in vit.parameters() if parameter.requires_grad]
    torch.compiler.reset()
    gradients = []
    for function in (torch.compile(vit, fullgraph=True, backend="aot_eager"), vit):
        out = forward(function, line.images(2, torch.float64))
        gradients.append(torch.autograd.grad(loss(out), parameters, allow_unused=True))
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@few
def test_exports_with_dynamic_batch(line: Line) -> None:
    vit = evit_ext.apply(line.build(**line.of_depth(2)), 0.6, (0, 1))
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(vit, (line.images(2),), dynamic_shapes=({0: batch},))
    for size in (1, 3):
        x = line.images(size)
        torch.testing.assert_close(program.module()(x), vit(x), rtol=1e-4, atol=1e-5)


def replica_of(vit: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a model for each device: torch.nn.parallel.replicate, without devices."""
    modules = list(vit.modules())
    replicas = [module._replicate_for_data_parallel() for module in modules]
    for module, replica in zip(modules, replicas, strict=True):
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, replicas[modules.index(child)])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.detach().clone())
        for name, buffer in module._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.clone()
    return replicas[0]


@few
def test_data_parallel(line: Line) -> None:
    vit, x = evit_ext.apply(line.build(torch.float64), RATES, DROP_LOC), line.images(2, torch.float64)
    expected, replica = vit(x), replica_of(vit)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    torch.testing.assert_close(replica(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@few
def test_low_precision(line: Line, autocast: bool) -> None:
    exact = evit_ext.apply(line.build(torch.float64), 0.7, (1,))
    vit = copy.deepcopy(exact).to(torch.float32 if autocast else torch.bfloat16)
    x = line.images()
    with evit_ext.record_tokens(exact) as expected:
        logits = exact(x.double())
    with evit_ext.record_tokens(vit) as record, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        low = vit(x if autocast else x.bfloat16())
    assert low.dtype == torch.bfloat16 and record.scores[0].dtype == torch.float32
    torch.testing.assert_close(record.scores[0].double(), expected.scores[0], rtol=0.15, atol=2e-3)
    loss(low.float()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in vit.parameters())
    # Where the same patches were kept, there is but the rounding.
    same = (record.kept[0] == expected.kept[0]).all(dim=1)
    assert same.any()
    scale = logits.abs().max()
    assert (low.double() - logits)[same].abs().max() < 0.1 * scale


def macs_by_hand(vit: Any, tokens: list[tuple[int, int]]) -> int:
    """Multiply-accumulates of the blocks of `vit`, and of what comes after and depends on the tokens.

    `tokens` are, for each block, those before and after it.
    """

    def weights(*modules: Any) -> int:
        return sum(p.numel() for m in modules if m is not None for p in m.parameters() if p.dim() == 2)

    total = 0
    for block, (before, after) in zip(vit.blocks, tokens, strict=True):
        attention = block.attn
        table = getattr(attention, "relative_position_bias_table", None)
        width = attention.proj.in_features
        total += before * (weights(attention) - (0 if table is None else table.numel()))
        total += 2 * before * before * width + after * weights(block.mlp)
        if after < before and vit.cls_token is None:
            total += before * before * width  # the map a second time, for its mean
        elif after < before and (table is not None or getattr(vit, "rel_pos_bias", None) is not None):
            total += before * width  # the class token's row with its biases
    last = tokens[-1][1]
    if getattr(vit, "attn_pool", None) is not None:
        of_pool = last if vit.attn_pool.kv.in_features and type(vit) is Eva else last - vit.num_prefix_tokens
        total += of_pool * (weights(vit.attn_pool.kv) + 2 * vit.embed_dim)
    if getattr(vit, "aux_head", None) is not None:
        total += (last - vit.num_prefix_tokens) * weights(vit.aux_head)
    return total


def test_macs(line: Line) -> None:
    vit = line.build()
    plain = evit_ext.count_macs(vit, line.size)
    sizes: list[tuple[int, int]] = []

    def note(block: Any, args: Any, out: Tensor) -> None:
        sizes.append((args[0].shape[1], out.shape[1]))

    for block in vit.blocks:
        block.register_forward_hook(note)
    vit(line.images(1))
    by_hand = macs_by_hand(vit, sizes)
    sizes.clear()
    evit_ext.apply(vit, RATES, DROP_LOC)
    vit(line.images(1))
    saved = by_hand - macs_by_hand(vit, sizes)
    sizes.clear()
    assert saved > 0.15 * by_hand
    assert plain - evit_ext.count_macs(vit, line.size) == saved
    assert evit_ext.count_macs(evit_ext.set_keep_rate(vit, 1.0), line.size) == plain


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
    assert re.findall(r"^    (\S+)$", text, flags=re.MULTILINE) == NAMES
