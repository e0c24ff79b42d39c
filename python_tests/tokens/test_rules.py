"""The rules that come with the package, and how they are named, checked and applied."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import evit_ext
from evit_ext.models.by_name import create_evit
from evit_ext.tokens import EViT, Plan, RandomSelection, Rule, Seen, make_rule, named_rules
from evit_ext.tokens.dynamicvit import PredictedSelection
from evit_ext.tokens.rule import rules_by_name
from evit_ext.tokens.stage import find_stages

pytestmark = pytest.mark.usefixtures("one_thread")


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_apply_means_evit(small_vit: Any) -> None:
    models = [evit_ext.apply(small_vit(), 0.6), evit_ext.apply(small_vit(), rule=EViT(0.6))]
    for model in models:
        model.load_state_dict(models[0].state_dict())
    assert torch.equal(models[0](images()), models[1](images()))
    assert [stage.rule for stage in find_stages(models[0])] == [EViT(0.6)] * 3


def test_a_rule_for_each_block(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), rule=[EViT(0.5), RandomSelection(0.5), EViT(0.5, fuse_token=False)])
    with evit_ext.record_tokens(vit) as record:
        vit(images())
    assert [kept.shape[1] for kept in record.kept] == [8, 5, 3]
    assert [record.trail.plan(stage).num_made for stage in range(3)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"rule": EViT(0.7), "keep_rate": 0.7},
            ValueError,
            "a rule has settings of its own: leave out",
        ),
        ({"rule": EViT(0.7), "fuse_token": True}, ValueError, "a rule has settings of its own"),
        ({"rule": [EViT(0.7)] * 2}, ValueError, "rule must be one rule or 3, one for each .* block, got 2"),
        (
            {"rule": "evit"},
            TypeError,
            "rule must be a rule, such as .*got 'evit'",
        ),
        ({"rule": EViT}, TypeError, "rule must be a rule"),
        (
            {"rule": PredictedSelection(0.7)},
            ValueError,
            "the rule dynamicvit wants predictions",
        ),
    ],
)
def test_wrong_rules(small_vit: Any, arguments: Any, error: type[Exception], message: str) -> None:
    vit = small_vit()
    with pytest.raises(error, match=message):
        evit_ext.apply(vit, **arguments)
    assert not find_stages(vit)


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 2"):
        EViT(2)
    with pytest.raises(TypeError, match="fuse_token must be True or False, got 1"):
        EViT(0.7, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no rule 'evti': expected one of dynamicvit, .*random"):
        make_rule("evti", {})
    with pytest.raises(ValueError, match="the rule random does not take these settings: .*'fuse'"):
        make_rule("random", {"fuse": True})


def test_names_and_settings_make_the_same_rule() -> None:
    assert {"evit", "random", "dynamicvit"} <= set(named_rules())
    for rule in (EViT(0.3, fuse_token=False), RandomSelection(0.4)):
        assert make_rule(rule.name, rule.settings()) == rule
    assert rules_by_name("random", [0.9, 0.5], {}) == [RandomSelection(0.9), RandomSelection(0.5)]
    assert rules_by_name("evit", None, {"fuse_token": False}) == EViT(fuse_token=False)


def test_random_selection_is_uniform_and_anew(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), rule=RandomSelection(0.5), drop_loc=[1])
    with torch.no_grad(), evit_ext.record_tokens(vit) as record:
        vit(images(4000))
        first = record.kept[0]
        vit(images(4000))
    counts = torch.stack([(first == patch).any(dim=1).float().mean() for patch in range(16)])
    # Each patch is kept in half of the images: five standard deviations of a share of 4,000.
    assert (counts - 0.5).abs().max() < 5 * (0.25 / 4000) ** 0.5
    assert not torch.equal(first, record.kept[0])
    torch.manual_seed(3)
    again = vit(images())
    torch.manual_seed(3)
    assert torch.equal(vit(images()), again)


def test_merging_rules_follow_their_owner_map(small_vit: Any) -> None:
    class Pairs(Rule):
        """The mean of each two neighbours; both have a token that stands for them."""

        fuses = True

        def num_out(self, num_patches: int, num_image_patches: int) -> int:
            return num_patches // 2

        def plan(self, seen: Seen) -> Plan:
            tokens = torch.arange(seen.num_patches, device=seen.device).expand(seen.batch, -1)
            return Plan(tokens[:, ::2], seen.num_patches, owner=tokens // 2, complete=True)

    vit = evit_ext.apply(small_vit(dtype=torch.float64), rule=Pairs(), drop_loc=[0, 2])
    x = torch.randn(3, 17, 24, dtype=torch.float64)
    owner = torch.arange(16).expand(3, -1) // 2
    plan = Plan(torch.arange(0, 16, 2).expand(3, -1), 16, owner=owner, complete=True)
    merged = plan.apply(x, 1)
    torch.testing.assert_close(merged[:, 1:], x[:, 1:].unflatten(1, (8, 2)).mean(dim=2))
    assert torch.equal(plan.restore(merged[:, 1:]), merged[:, 1:].repeat_interleave(2, dim=1))
    with evit_ext.record_tokens(vit) as record:
        tokens = vit.forward_features(images().double())
    (grid,) = vit.forward_intermediates(images().double(), [3], norm=True, intermediates_only=True)
    expected = tokens[:, 1:].repeat_interleave(4, dim=1)
    assert torch.equal(grid.flatten(2).transpose(1, 2), expected)
    assert torch.equal(record.restore(tokens, num_prefix_tokens=1), expected)
    with pytest.raises(ValueError, match="the rule Pairs has no keep rate"):
        evit_ext.set_keep_rate(vit, 0.5)
    with pytest.raises(ValueError, match="stage 0 has no scores: its rule does not rank patches"):
        _ = record.scores


def test_rules_by_name_build_models() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 4}
    model = create_evit("deit_tiny", 0.5, rule="random", **sizes)
    assert [stage.rule for stage in find_stages(model)] == [RandomSelection(0.5)] * 3
    with pytest.raises(ValueError, match="rule_args are settings of a rule that is given by its name"):
        create_evit("deit_tiny", rule_args={"fuse_token": False}, **sizes)


def test_a_plan_that_is_not_as_the_rule_says(small_vit: Any) -> None:
    class Wrong(RandomSelection):
        def num_out(self, num_patches: int, num_image_patches: int | None) -> int:
            return num_patches // 4

        def plan(self, seen: Seen) -> Plan:
            return Plan(torch.arange(5).expand(seen.batch, -1), seen.num_patches)

    vit = evit_ext.apply(small_vit(), rule=Wrong(0.5))
    with pytest.raises(ValueError, match="of 16 patch tokens 4 are kept and 4 leave, and plans 5 and 5"):
        vit(images())


def test_sizes_of_the_image_are_known_or_not_given(small_vit: Any) -> None:
    class Share(Rule):
        def num_out(self, num_patches: int, num_image_patches: int | None) -> int:
            return int(num_image_patches * 0.5)  # type: ignore[operator]

    vit = evit_ext.apply(small_vit(), rule=Share())
    with pytest.raises(TypeError, match="NoneType"):
        vit(images())


def test_plans_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="a plan that makes 2 tokens must say by owner"):
        Plan(torch.zeros(1, 1, dtype=torch.int64), 4, num_made=2)
    lost = Plan(torch.tensor([[0, 2]]), 4, owner=torch.tensor([[0, 0, 1, -1]]))
    with pytest.raises(ValueError, match="fill='fused' needs a token that stands for each"):
        lost.restore(torch.ones(1, 2, 3))


@dataclass(frozen=True)
class Window(Rule, name="window-of-the-tests"):
    start: tuple[int, int] = (0, 8)

    def num_out(self, num_patches: int, num_image_patches: int | None) -> int:
        return self.start[1] - self.start[0]

    def plan(self, seen: Seen) -> Plan:
        kept = torch.arange(*self.start, device=seen.device)
        return Plan(kept.expand(seen.batch, -1), seen.num_patches)


@pytest.mark.parametrize(
    ("rules", "prefix"),
    [
        ([RandomSelection(0.5)] * 2, None),
        ([Window((2, 10)), Window((0, 4))], None),
        ([EViT(0.5, True), EViT(0.5, False)], None),
        ([EViT(0.9), EViT(0.5)], 3),
    ],
)
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "evit_deit_tiny_patch16_224"])
def test_any_rule_is_saved_and_loaded(
    name: str, rules: list[Rule], prefix: int | None, tmp_path: Any
) -> None:
    model = timm.create_model(name, img_size=64, embed_dim=24, num_heads=2, depth=4, num_classes=5)
    evit_ext.apply(evit_ext.remove(model), drop_loc=(1, 3), rule=rules, num_prefix_tokens=prefix)
    evit_ext.save_pretrained(model, tmp_path)
    stages = find_stages(evit_ext.from_pretrained(tmp_path))
    assert [list(stage.rule.settings().values()) for stage in stages] == [
        json.loads(json.dumps(list(rule.settings().values()))) for rule in rules
    ]
    assert {stage.num_prefix_tokens for stage in stages} == {1 if prefix is None else prefix}
    card = (tmp_path / "README.md").read_text()
    assert ("or keep_rate=0.5" in card) == (rules[0].keep_rate is not None)


def test_random_rules_are_not_exported(small_vit: Any, tmp_path: Any) -> None:
    vit = evit_ext.apply(small_vit(), rule=RandomSelection(0.5))
    with pytest.raises(ValueError, match="its rule random draws random numbers"):
        evit_ext.export.export_model(vit, tmp_path / "a.pt2", "pt2")
