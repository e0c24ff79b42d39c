"""Every line of docs/supported-models.md: what `apply` makes of the model, against a slow implementation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import slow_families
import torch
from family_lines import (
    DROP_LOC,
    LINES,
    RATES,
    Line,
    drops_patches,
    forward,
    tensors,
)
from slow_families import FUSED, slow_family
from torch import Tensor

import evit_ext

pytestmark = pytest.mark.usefixtures("one_thread")

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
