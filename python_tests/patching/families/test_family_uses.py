"""Every line of docs/supported-models.md: what is done with models, and what stays as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from family_lines import (
    DROP_LOC,
    LINES,
    RATES,
    Line,
    attributes,
    drops_patches,
    forward,
    loss,
    named,
)
from timm.models.eva import Eva
from torch import Tensor, nn

import evit_ext

pytestmark = pytest.mark.usefixtures("one_thread")

# What stays as it was.


def test_remove_leaves_nothing_behind(line: Line) -> None:
    vit, x = line.build(), line.images()
    expected, before, blocks, text = vit(x), attributes(vit), list(vit.blocks), repr(vit)
    evit_ext.apply(vit, RATES, DROP_LOC)
    assert not torch.equal(vit(x), expected)
    assert evit_ext.remove(vit) is vit
    assert all(a is b for a, b in zip(vit.blocks, blocks, strict=True))
    after = attributes(vit)
    assert set(after) == set(before)
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
