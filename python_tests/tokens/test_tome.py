"""ToMe against the slow implementation, in every family, and what a model does with its plans."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from family_lines import DROP_LOC, LINES, Line, drops_patches, forward, named, tensors
from slow_tome import Groups, slow_tome

import evit_ext
from evit_ext import ops
from evit_ext.benchmark.contestants import contestants
from evit_ext.cost.tokens import count_tokens
from evit_ext.models.by_name import create_evit
from evit_ext.tokens import EViT, RandomSelection, ToMe, make_rule
from evit_ext.tokens.merging import MergePlan
from evit_ext.tokens.stage import find_stages

pytestmark = pytest.mark.usefixtures("one_thread")

#: How many tokens the blocks of `DROP_LOC` merge away: some, many, one.
MERGED = (3, 4, 1)


def rules(proportional: bool = True) -> list[ToMe]:
    return [ToMe(r=r, proportional=proportional) for r in MERGED]


def owners_of(groups: Groups, num_patches: int) -> list[int]:
    """For each patch, the number of the token that it is in."""
    found = {patch: token for token, group in enumerate(groups) for patch in group}
    return [found[patch] for patch in range(num_patches)]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_agrees_with_the_slow_implementation(line: Line) -> None:
    assert_agrees(line, proportional=True)


@named("ViT, AugReg", "LV-ViT", "EVA-02", "BEiT", "no relative position bias", "patch dropout")
def test_agrees_where_attention_is_as_before(line: Line) -> None:
    assert_agrees(line, proportional=False)


def assert_agrees(line: Line, proportional: bool) -> None:
    training = drops_patches(line)
    slow, x = line.build(torch.float64).train(training), line.images(2, torch.float64)
    plain, vit = copy.deepcopy(slow), copy.deepcopy(slow)
    torch.manual_seed(3)
    expected = slow_tome(slow, x, MERGED, DROP_LOC, proportional)
    evit_ext.apply(vit, rule=rules(proportional), drop_loc=DROP_LOC)
    with evit_ext.record_tokens(vit) as record:
        logits = forward(vit, x)
    # As for EViT: gradients are compared with the largest, as sums over many tokens cancel in small ones.
    torch.testing.assert_close(logits, expected.logits, rtol=1e-12, atol=2e-13)
    trail = record.trail
    for stage, groups in enumerate(expected.groups):
        places = trail.places(stage + 1)
        assert places is not None
        assert places.tolist() == [owners_of(image, places.shape[1]) for image in groups]
        assert record.kept[stage].tolist() == [[group[0] for group in image] for image in groups]
    weights = torch.randn_like(expected.logits)
    for out in (logits, expected.logits, forward(plain, x)):
        (out * weights).sum().backward()
    largest = max(p.grad.abs().max().item() for p in slow.parameters() if p.grad is not None)
    for (name, parameter), other, original in zip(
        vit.named_parameters(), slow.parameters(), plain.parameters(), strict=True
    ):
        assert (parameter.grad is None) == (original.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-12 * largest, msg=name)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_without_merging_it_is_the_original_to_the_last_bit(line: Line, training: bool) -> None:
    chances = {"drop_path_rate": 0.3, "attn_drop_rate": 0.2, "proj_drop_rate": 0.1} if training else {}
    vit, x = line.build(**chances).train(training), line.images()
    expected = forward(copy.deepcopy(vit), x)
    evit_ext.apply(vit, rule=ToMe(r=0), drop_loc=DROP_LOC)
    for actual, wanted in zip(tensors(forward(vit, x)), tensors(expected), strict=True):
        assert torch.equal(actual, wanted)
    evit_ext.remove(vit)
    assert not find_stages(vit)
    for actual, wanted in zip(tensors(forward(vit, x)), tensors(expected), strict=True):
        assert torch.equal(actual, wanted)


# The matching.


def test_merge_and_restore_are_a_pair() -> None:
    x = torch.randn(3, 2 + 12, 8, dtype=torch.float64)
    sizes = torch.randint(1, 5, (3, 12)).double()
    kept, owner = ops.bipartite_matching(torch.randn(3, 2, 12, 4), 7)
    plan = MergePlan(kept, owner, sizes)
    merged = plan.apply(x, 2)
    restored = plan.restore(merged[:, 2:])
    again = MergePlan(kept, owner, sizes).apply(torch.cat([x[:, :2], restored], dim=1), 2)
    torch.testing.assert_close(again, merged, rtol=1e-14, atol=1e-14)
    assert torch.equal(merged[:, :2], x[:, :2])
    # What is merged with no other comes back to the last bit.
    alone = (owner.unsqueeze(2) == owner.unsqueeze(1)).sum(dim=2) == 1
    assert alone.any() and torch.equal(restored[alone], x[:, 2:][alone])
    total = (merged[:, 2:] * plan.merged_sizes(sizes, torch.float64, x.device).unsqueeze(2)).sum(dim=1)
    torch.testing.assert_close(total, (x[:, 2:] * sizes.unsqueeze(2)).sum(dim=1), rtol=1e-12, atol=1e-12)


def test_gradient_of_the_average() -> None:
    kept, owner = ops.bipartite_matching(torch.randn(2, 2, 6, 4), 3)
    sizes = torch.tensor([[1.0, 2, 3, 1, 1, 4]] * 2, dtype=torch.float64)
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: MergePlan(kept, owner, sizes).apply(x, 1), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_average_in_narrow_types(dtype: torch.dtype) -> None:
    kept, owner = ops.bipartite_matching(torch.randn(2, 2, 40, 4), 20)
    x = torch.randn(2, 41, 8) * 1000
    wide = MergePlan(kept, owner, None).apply(x.to(dtype).float(), 1)
    found = MergePlan(kept, owner, None).apply(x.to(dtype), 1)
    assert found.dtype == dtype
    # Each of the weights, the products and the sum is rounded once.
    torch.testing.assert_close(found.float(), wide, rtol=0, atol=3 * 4000 * torch.finfo(dtype).eps)


# The rule.


def test_sizes() -> None:
    assert [ToMe(r=13).num_out(n, None) for n in (196, 26, 20, 1)] == [183, 13, 10, 1]
    assert [ToMe(0.7).num_out(n, None) for n in (196, 7, 1)] == [138, 5, 1]
    assert ToMe().keep_rate == 0.7 and ToMe(r=4).keep_rate is None
    assert ToMe(r=0) == ToMe(1.0) and ToMe(r=4).with_keep_rate(0.9) == ToMe(0.9)
    for rule in (ToMe(r=4), ToMe(0.6, proportional=False)):
        assert make_rule("tome", rule.settings()) == rule


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep_rate": 0.4}, ValueError, r"must be in \[0.5, 1\].* got 0.4: let more blocks merge"),
        ({"keep_rate": 0.7, "r": 4}, ValueError, "a keep_rate or r, .*got both: keep_rate=0.7, r=4"),
        ({"r": -1}, ValueError, "r must not be negative, got -1"),
        ({"r": 1.5}, TypeError, "r must be a whole number of tokens, got 1.5"),
        ({"proportional": 1}, TypeError, "proportional must be True or False, got 1"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ToMe(**arguments)


def test_models_and_benchmarks_by_name() -> None:
    arguments: dict[str, Any] = {"img_size": 64, "embed_dim": 24, "num_heads": 2, "depth": 4}
    model = create_evit("deit_tiny", 0.6, rule="tome", **arguments)
    assert [stage.rule for stage in find_stages(model)] == [ToMe(0.6)] * 3
    model = create_evit("deit_tiny", rule="tome", rule_args={"r": 2}, drop_loc=range(4), **arguments)
    assert [stage.rule for stage in find_stages(model)] == [ToMe(r=2)] * 4
    found = contestants("deit_tiny", [0.6], reduction={"rule": "tome"}, **arguments)
    assert [one.name for one in found] == ["dense", "ToMe 0.6"] and found[1].gmacs < found[0].gmacs


def test_costs_and_restored_grids(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), rule=ToMe(r=4), drop_loc=[0, 2])
    x = torch.randn(2, 3, 32, 32)
    costs = evit_ext.layer_costs(vit)
    assert [(cost.patches, cost.kept) for cost in costs if cost.kept] == [(16, 12), (12, 8)]
    assert count_tokens(vit, (32, 32)) == [16, 12, 8]
    with torch.no_grad(), evit_ext.record_tokens(vit) as record:
        tokens = vit.forward_features(x)
    (grid,) = vit.forward_intermediates(x, [3], norm=True, intermediates_only=True)
    restored = record.restore(tokens, num_prefix_tokens=1)
    torch.testing.assert_close(grid.flatten(2).transpose(1, 2), restored)
    places = record.trail.places(2)
    assert places is not None
    for b in range(2):
        for token in range(8):
            of_token = restored[b, places[b] == token]
            assert len(of_token) and torch.equal(of_token, tokens[b, 1 + token].expand_as(of_token))


def test_set_keep_rate_and_other_rules_after_it(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), rule=[ToMe(r=4), EViT(0.5), RandomSelection(0.5)])
    x = torch.randn(2, 3, 32, 32)
    with evit_ext.record_tokens(vit) as record:
        vit(x)
    assert [kept.shape[1] for kept in record.kept] == [12, 6, 4]
    evit_ext.set_keep_rate(vit, 0.75)
    assert [stage.rule for stage in find_stages(vit)] == [ToMe(0.75), EViT(0.75), RandomSelection(0.75)]
    plain = evit_ext.apply(small_vit(), rule=EViT(0.5))
    find_stages(plain)[0].rule = ToMe(0.5)
    with pytest.raises(RuntimeError, match="the rule tome was set after evit_ext.apply"):
        plain(x)


def test_trains_saves_and_exports(tmp_path: Any) -> None:
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    vit = timm.create_model(name, depth=3, embed_dim=24, num_heads=2, img_size=64, num_classes=5)
    evit_ext.apply(vit, rule=ToMe(r=5), drop_loc=(0, 1))
    x = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.SGD(vit.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        losses.append(torch.nn.functional.cross_entropy(vit.train()(x), torch.tensor([1, 3])))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[4] < losses[0] / 2
    logits = vit.eval()(x)
    evit_ext.save_pretrained(vit, tmp_path / "model")
    loaded = evit_ext.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(x), logits)
    assert [stage.rule for stage in find_stages(loaded)] == [ToMe(r=5)] * 2
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which writes ONNX, is not installed")
    exported = evit_ext.export.export_model(vit, tmp_path / "model.onnx", "onnx")
    assert exported.max_difference < 1e-5
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not {name for name in operators if name.startswith("Scatter")}
