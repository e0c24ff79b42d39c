"""benchmarks/gpu_training.py on the CPU with the smallest model, as a stand-in; and how it judges."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from torch.utils._python_dispatch import TorchDispatchMode

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import gpu_training  # noqa: E402
import gpu_training_report as report  # noqa: E402
from gpu_training_report import DENSE, KERNELS, REFERENCE, TWIN  # noqa: E402
from time_limit import TimeLimit  # noqa: E402

from evit_ext.ops import library  # noqa: E402

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'evit_ext[demo]'")
pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = (DENSE, KERNELS, REFERENCE, TWIN)
SMALL = gpu_training.Setup(
    model="vit_tiny_patch16_224",
    model_args={"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2},
    img_size=32,
    batch=8,
    train_images=40,
    test_images=20,
    steps_in_round=3,
    device="cpu",
    precision="float32",
    seconds=0.0,
)


class Operators(TorchDispatchMode):
    """The names of this package's operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "evit":
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_the_reference_runs_no_operator_of_ours() -> None:
    models = gpu_training.make_models(SMALL)
    images = torch.randn(2, 3, 32, 32)
    for run, some in ((DENSE, False), (KERNELS, True), (REFERENCE, False), (TWIN, True)):
        with gpu_training.operators(run), Operators() as seen:
            models[run].train()(images).sum().backward()
        assert bool(seen.names) == some, run
    timed = gpu_training.WithOperators(REFERENCE, models[KERNELS])
    with Operators() as seen:
        timed.train()(images).sum().backward()
    assert not seen.names
    with pytest.raises(KeyError), gpu_training.operators(REFERENCE):
        raise KeyError
    assert "cpu" in library.KERNEL_DEVICES


def test_all_begin_with_the_same_weights() -> None:
    models = gpu_training.make_models(SMALL)
    dense = models[DENSE].state_dict()
    for run in (KERNELS, REFERENCE):
        assert all(torch.equal(value, dense[name]) for name, value in models[run].state_dict().items())
    weight = models[TWIN].state_dict()["head.weight"]
    assert not torch.equal(weight, dense["head.weight"])
    torch.testing.assert_close(weight, dense["head.weight"], rtol=1e-5, atol=0)


def test_images_are_those_of_the_data_set() -> None:
    images = gpu_training.render("train", 10, SMALL)
    batch, labels = images.batch(torch.tensor([7, 2]))
    expected = gpu_training.ClutteredDigits("train", 32, 10).render([7, 2])
    torch.testing.assert_close(batch, expected.images, rtol=0, atol=1e-6)
    assert torch.equal(labels, expected.labels)
    several = gpu_training.render("train", 300, gpu_training.replace(SMALL, processes=2))
    assert len(several.labels) == 300 and torch.equal(several.canvases[:10], images.canvases)


def test_a_training(tmp_path: Path) -> None:
    results: dict[str, Any] = {}
    stem = tmp_path / "sub" / "training-cpu"
    for so_far in gpu_training.train(SMALL, TimeLimit(10), results, rounds=2):
        # Written whenever there is something new: what is not known yet is a dash.
        gpu_training.write(stem, {"processor": "any"}, so_far)
    assert results["rounds"] == results["planned_rounds"] == 2 and not results["left_out"]
    for run in RUNS:
        assert len(results["losses"][run]) == len(results["grad_norms"][run]) == 6
        assert 0 <= results["test"][run]["top1"] <= 100 and results["test"][run]["images"] == 20
    # Float32 on the CPU: kernels and reference differ by rounding alone, which six steps do not blow up.
    ours, theirs = (torch.tensor(results["losses"][run]) for run in (KERNELS, REFERENCE))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    assert results["losses"][DENSE] != results["losses"][KERNELS] != results["losses"][TWIN]
    assert [row["model"] for row in results["steps"]] == [DENSE, KERNELS, REFERENCE]
    written = json.loads(stem.with_suffix(".json").read_text())
    assert written["losses"] == results["losses"] and len(written["targets"]) == 6
    text = stem.with_suffix(".md").read_text()
    assert text.startswith("# Training\n\n- processor: any\n") and "6 steps of each run" in text
    assert "\ntargets met: " in text and "not measured" not in text
    report.plot(results, stem.with_suffix(".png"))
    assert stem.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("given", "optimizer", "lr"),
    [
        ([], "muon" if "muon" in timm.optim.list_optimizers() else "adamw", None),
        (["--optimizer", "adamw"], "adamw", 5e-4),
        (["--optimizer", "adamw", "--lr", "0.002"], "adamw", 0.002),
    ],
)
def test_another_optimizer(
    given: list[str], optimizer: str, lr: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a second try, should the first not learn: in a short session there is no time to change code."""
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", *given])
    chosen = gpu_training.setup_of(gpu_training.parse())
    assert (chosen.model, chosen.img_size, chosen.batch, chosen.device) == ("deit_small", 224, 256, "cpu")
    rates = {"optimizer": chosen.optimizer, "lr": chosen.lr, "adamw_lr": chosen.adamw_lr}
    results: dict[str, Any] = {}
    limit = TimeLimit(1.0, iter([0.0] + [1000.0] * 1000).__next__)
    list(gpu_training.train(gpu_training.replace(SMALL, **rates), limit, results))
    assert results["recipe"]["optimizer"] == optimizer
    assert lr is None or results["recipe"]["lr"] == lr
    assert f"optimizer {optimizer}, learning rate {results['recipe']['lr']:g}." in report.text(results)


def test_without_time_what_was_timed_is_kept() -> None:
    results: dict[str, Any] = {}
    limit = TimeLimit(1.0, iter([0.0] + [1000.0] * 1000).__next__)
    last = list(gpu_training.train(SMALL, limit, results))[-1]
    assert last["rounds"] == 0 and last["steps"] and "rounds 1 to 2: it would take" in last["left_out"][0]
    assert "| EViT, kernels | " in report.text(last) and "Left out: rounds 1 to 2" in report.text(last)
    assert [target.met for target in report.targets(last)][1:4] == [None, None, None]


def test_a_loss_that_is_not_finite_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(gpu_training, "_train_round", fail)
    results: dict[str, Any] = {}
    list(gpu_training.train(SMALL, TimeLimit(10), results, rounds=2))
    assert results["failures"] == ["dense, round 1: the loss is not finite"]
    assert "Failed: dense, round 1" in report.text(results)


def made_up() -> dict[str, Any]:
    setup = {"steps_in_round": 2, "model": "m", "img_size": 32, "batch": 8}
    losses = [2.0, 2.0, 1.0, 1.0, 0.5, 0.5]
    results: dict[str, Any] = {"setup": setup, "precision": "float32", "left_out": [], "failures": []}
    results["losses"] = {run: list(losses) for run in RUNS}
    results["losses"][TWIN] = [loss + 0.1 for loss in losses]
    results["grad_norms"] = {run: [1.0] * 6 for run in RUNS}
    results["steps"] = [{"model": DENSE, "milliseconds": 3.0}, {"model": KERNELS, "milliseconds": 2.0}]
    results["test"] = {run: {"top1": 90.0, "loss": 0.3, "images": 2000} for run in RUNS}
    return results


def missed(results: dict[str, Any]) -> list[int]:
    return [number for number, target in enumerate(report.targets(results)) if not target.met]


def test_how_it_judges() -> None:
    assert missed(made_up()) == []
    slow = made_up()
    slow["steps"][1]["milliseconds"] = 2.2
    assert missed(slow) == [0]
    first = made_up()
    first["losses"][REFERENCE][0] = 2.03
    first["grad_norms"][REFERENCE][0] = 1.06
    assert missed(first) == [1, 2]
    nothing_learned = made_up()
    for run in RUNS:
        nothing_learned["losses"][run][4:] = [1.1, 1.1]
    assert missed(nothing_learned) == [3]
    # The twin is 0.1 off, so the reference may be 0.3 off on average.
    for off, expected in ((0.29, []), (0.31, [4])):
        apart = made_up()
        apart["losses"][REFERENCE][1:] = [loss + off * 6 / 5 for loss in apart["losses"][REFERENCE][1:]]
        assert missed(apart) == expected
    # A twin that is close by chance: 2 % of the mean loss, 1.17 nats, may be between the curves.
    for off, expected in ((0.022, []), (0.026, [4])):
        close = made_up()
        close["losses"][TWIN] = list(close["losses"][KERNELS])
        close["losses"][REFERENCE][1:] = [loss + off * 6 / 5 for loss in close["losses"][REFERENCE][1:]]
        assert missed(close) == expected
    # Of 2,000 images at 90 %, the standard error of a difference is 0.95 points.
    for top1, expected in ((87.5, []), (86.5, [5])):
        worse = copy.deepcopy(made_up())
        worse["test"][REFERENCE]["top1"] = top1
        assert missed(worse) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("given", "said"),
    [([], "--device cuda needs a GPU"), (["--batch", "0"], "--batch must be positive, got 0")],
)
def test_bad_options(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_training.py", *given])
    with pytest.raises(SystemExit):
        gpu_training.parse()
    assert said in capsys.readouterr().err
