"""Evaluation: what it counts, alone and in several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluating_ranks
import launch
import pytest
import torch
from torch import Tensor, nn

import evit_ext
from evit_ext import models
from evit_ext.training import Precision, evaluate
from evit_ext.training.ranks import ALONE

FLOAT32 = Precision(torch.float32, "test")


class Identity(nn.Module):
    """Takes logits for images."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.parameter


def test_top5() -> None:
    logits = torch.arange(10.0, 0, -1).repeat(4, 1)
    result = evaluate(Identity(), [(logits, torch.tensor([0, 4, 5, 9]))], FLOAT32)
    assert (result.top1, result.top5) == (25.0, 50.0)


def test_top5_of_fewer_classes_is_all_there_is() -> None:
    result = evaluate(Identity(), [(torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]))], FLOAT32)
    assert result.top5 == 100.0


def test_batches_of_different_sizes_count_by_their_images() -> None:
    logits = torch.randn(7, 6)
    labels = torch.arange(7) % 6
    expected = nn.functional.cross_entropy(logits.double(), labels).item()
    parts = [(logits[:1], labels[:1]), (logits[1:1], labels[1:1]), (logits[1:], labels[1:])]
    result = evaluate(Identity(), parts, FLOAT32)
    assert result.images == 7
    # Of float32 losses, each within half a unit of 2**-23 of about 2; 2e-8 was measured.
    assert result.loss == pytest.approx(expected, rel=2e-7)
    assert result.images_per_second > 0


def test_tokens_that_are_left(small_vit: Callable[..., Any]) -> None:
    data = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    dense = evaluate(small_vit(), data, FLOAT32)
    assert (dense.tokens_kept, dense.tokens_kept_by_stage) == (1.0, ())
    evit = evit_ext.apply(small_vit(), (0.7, 0.5, 1.0))
    # 16 patches; 12 and a fused one; 7 and a fused one; those.
    assert evaluate(evit, data, FLOAT32).tokens_kept_by_stage == (13 / 16, 8 / 16, 8 / 16)
    rival: Any = models.dynamicvit_small(
        keep_rate=0.5, img_size=64, embed_dim=48, depth=4, num_heads=2, num_classes=5, drop_loc=(1, 2)
    )
    result = evaluate(rival, [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))], FLOAT32)
    assert result.tokens_kept_by_stage == (8 / 16, 4 / 16)
    assert result.tokens_kept == 4 / 16


def test_images_of_two_sizes(small_vit: Callable[..., Any]) -> None:
    evit = evit_ext.apply(small_vit(dynamic_img_size=True), 0.5, drop_loc=(1,), fuse_token=False)
    data = [
        (torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])),
        (torch.randn(1, 3, 40, 24), torch.tensor([0])),
    ]
    # 16 patches three times, 15 once.
    assert evaluate(evit, data, FLOAT32).tokens_kept == (3 * 8 + 8) / (3 * 16 + 15)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    data = [(torch.randn(2, 3), torch.tensor([0, 1]))] * 3
    evaluate(Identity(), data, FLOAT32, progress=True)
    assert capsys.readouterr().out.startswith("evaluate: 3/3")
    evaluate(Identity(), iter(data), FLOAT32, progress=True, total=3)
    assert capsys.readouterr().out.startswith("evaluate: 3/3")
    evaluate(Identity(), iter(data), FLOAT32, progress=True)
    assert capsys.readouterr().out.startswith("evaluate: 3  ")
    evaluate(Identity(), data, FLOAT32)
    assert not capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_find_what_one_finds(world_size: int) -> None:
    alone = evaluating_ranks.main(ALONE)["plain"]
    script = Path(evaluating_ranks.__file__)
    everywhere = [json.loads(printed) for printed in launch.run(script, world_size)]
    assert all(results == everywhere[0] for results in everywhere)
    for kind in ("plain", "ddp", "fsdp"):
        result = everywhere[0][kind]
        assert result["tokens_kept_by_stage"] == list(alone["tokens_kept_by_stage"])
        for name in ("top1", "top5", "images", "tokens_kept"):
            assert result[name] == alone[name], (kind, name)
        # Measured equal to the last bit; batches of other sizes may be multiplied in other orders.
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-6), kind
    assert 0 < alone["top1"] < alone["top5"] < 100
    # Of three, the first has no batch.
    named = range(1 if world_size == 3 else 0, world_size)
    assert everywhere[0]["fsdp"]["unreadable"] == [[f"rank{rank}.png", "truncated"] for rank in named]
    assert everywhere[0]["empty"] == "there is no image to evaluate on"
