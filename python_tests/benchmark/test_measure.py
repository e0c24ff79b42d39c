"""Models side by side: who takes part, and what is said of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from evit_ext.benchmark import Contestant, contestants, measure, memory_added
from evit_ext.training import Precision

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 10}
BFLOAT16 = Precision(torch.bfloat16, "test")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def field(name: str = "vit_tiny_patch16_224") -> list[Contestant]:
    torch.manual_seed(0)
    return contestants(name, (0.7, 0.5), **TINY)


def test_contestants_share_their_weights() -> None:
    models = field()
    assert [model.name for model in models] == ["dense", "EViT 0.7", "EViT 0.5"]
    assert [model.keep_rate for model in models] == [1.0, 0.7, 0.5]
    costs = [model.gmacs for model in models]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 3  # type: ignore[type-var]
    for model in models[1:]:
        for key, value in models[0].model.state_dict().items():
            assert torch.equal(model.model.state_dict()[key], value), key


def test_rules_without_a_keep_rate() -> None:
    """They are run as they are set, and by a keep rate where they take one in the place of a setting."""
    size = {"img_size": 32, "patch_size": 8, "depth": 4}
    reduction = {"rule": "tome", "rule_args": {"r": 3, "proportional": False}}
    dense, tome, other = contestants("deit_tiny", (None, 0.5), reduction=reduction, **size)
    assert (tome.name, tome.keep_rate) == ("ToMe r 3 proportional False", None)
    assert (other.name, other.keep_rate) == ("ToMe 0.5", 0.5)
    assert other.gmacs < tome.gmacs < dense.gmacs
    (evit,) = contestants("deit_tiny", (None,), **size)[1:]
    assert (evit.name, evit.keep_rate) == ("EViT 0.7", 0.7)


@pytest.mark.parametrize("task", ["inference", "training"])
@pytest.mark.parametrize("precision", [None, BFLOAT16], ids=["float32", "bfloat16"])
def test_rows(task: str, precision: Precision | None) -> None:
    rows = measure(field(), torch.randn(2, 3, 32, 32), task, ("eager",), precision, seconds=0.05)
    assert [row.model for row in rows] == ["dense", "EViT 0.7", "EViT 0.5"]
    for row in rows:
        assert (row.task, row.mode, row.batch) == (task, "eager", 2)
        assert row.precision == ("float32" if precision is None else "bfloat16")
        assert row.milliseconds > 0 and row.milliseconds_99 is None
        assert row.milliseconds_90 is None if row.calls < 10 else row.milliseconds_90 >= row.milliseconds
        assert row.images_per_second == pytest.approx(2e3 / row.milliseconds)
        assert row.speedup == pytest.approx(rows[0].milliseconds / row.milliseconds)
        assert row.calls >= 5
        assert row.peak_memory is None or 0 <= row.peak_memory < 2**27


def test_percentiles_need_calls() -> None:
    rows = measure(field()[:1], torch.randn(1, 3, 32, 32), seconds=0.0, least=100)
    (row,) = rows
    assert row.calls == 100 and row.milliseconds_90 is not None and row.milliseconds_99 is not None
    assert row.milliseconds <= row.milliseconds_90 <= row.milliseconds_99
    (row,) = measure(field()[:1], torch.randn(1, 3, 32, 32), seconds=0.0, least=10)
    assert row.milliseconds_90 is not None and row.milliseconds_99 is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a peak anew")
def test_memory_that_a_call_adds() -> None:
    mib = 2**20
    kept = torch.ones(64 * mib, dtype=torch.uint8)  # resident before: not counted

    def call() -> torch.Tensor:
        first = torch.ones(48 * mib, dtype=torch.uint8)
        del first
        return torch.ones(32 * mib, dtype=torch.uint8)

    for _ in range(3):  # the same however often: not what is left of the calls before
        added = memory_added(call)
        assert added is not None and 46 * mib <= added <= 52 * mib, added / mib
    assert kept.sum() == 64 * mib


def test_inference_computes_the_logits() -> None:
    """What is timed is the model's own forward, without gradients, and leaves the weights alone."""
    models = field()
    before = {key: value.clone() for key, value in models[1].model.state_dict().items()}
    seen: list[tuple[torch.Size, bool]] = []
    for model in models:
        model.model.register_forward_hook(
            lambda module, args, out: seen.append((out.shape, out.requires_grad))
        )
    measure(models, torch.randn(3, 3, 32, 32), seconds=0.0, apart=False)
    assert set(seen) == {(torch.Size([3, 10]), False)} and len(seen) == 3 * (
        2 + 5 + 1
    )  # the last one for its memory
    assert all(torch.equal(value, before[key]) for key, value in models[1].model.state_dict().items())


def test_errors() -> None:
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="task must be one of inference, training, got 'test'"):
        measure(field(), images, "test")
    with pytest.raises(ValueError, match="mode must be one of eager, compile, cudagraph, got 'fast'"):
        measure(field(), images, modes=("fast",))
    with pytest.raises(ValueError, match="CUDA graphs are for inference on a GPU"):
        measure(field(), images, modes=("cudagraph",))


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="tests run without the source tree")
@pytest.mark.parametrize("keep_rate", [1.0, 0.7, 0.3])
def test_the_plain_evit_is_one(keep_rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from plain_evit import PlainEViT

    dense, ours = contestants("vit_tiny_patch16_224", (keep_rate,), **TINY)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    plain = PlainEViT(dense.model, keep_rate, (1, 2, 3)).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(images), ours.model.double().eval()(images), rtol=1e-12, atol=1e-13)


def test_inference_casts_weights_and_images_once_and_training_autocasts() -> None:
    seen: list[tuple[torch.dtype, torch.dtype, bool]] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append((images.dtype, self.head.weight.dtype, torch.is_autocast_enabled("cpu")))
            return self.head(images.flatten(1))

    model, images = Model(), torch.randn(2, 3, 2, 2)
    precision = BFLOAT16
    for task, expected in (
        ("inference", (torch.bfloat16, torch.bfloat16, False)),
        ("training", (torch.float32, torch.float32, True)),
    ):
        seen.clear()
        measure(
            [Contestant("model", model, 1.0, None)],
            images,
            task,
            precision=precision,
            seconds=0.01,
            apart=False,
        )
        assert set(seen) == {expected}
    assert model.head.weight.dtype == torch.float32
