"""benchmarks/fine_tuning.py: heads, the fine-tuning, its page; no downloads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip("onnx", reason="onnx is not installed")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from retrieval import heads, page, pictures  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def stripes() -> pictures.Pictures:
    """Return noise with a brighter third: which third it is, is the class."""
    images = torch.randn(36, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(36) % 3
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 16 * label : 16 * label + 16] += 2
    return pictures.Pictures(images, labels, ["a", "b", "c"], "stripes")


def test_a_head_learns_what_can_be_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    embeddings = torch.randn(30, 8, generator=generator) + 5 * torch.nn.functional.one_hot(labels, 8)
    head = heads.fit_head(embeddings, labels)
    assert heads.top1(embeddings, head, labels) == 100
    assert heads.top1(embeddings, head, (labels + 1) % 3) == 0


def test_figures_and_page() -> None:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0
    ).eval()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    found = heads.measure(vit, stripes(), splits=2, epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert (found["index"], found["queries"]) == (24, 12)
    assert [row["keep rate"] for row in found["rows"]] == [1.0, 0.7, 0.5]
    full = found["rows"][0]
    assert full["own head"]["values"] == full["head of the full model"]["values"]
    assert full["fine-tuned"]["difference"]["mean"] == 0
    results = {"machine": {"threads": 1}, "wheel": "w", "left out": [], "sets": {"36 stripes": found}}
    text = page.of_heads(results)
    assert "## 36 stripes\n\nIndex 24, queries 12, 2 splits, 1 epochs." in text
    assert text.count("\n| 0.7 | ") == 1 and text.count("\n| full | ") == 1


def test_fine_tuning_lowers_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LR", 1e-2)
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0
    ).eval()
    head, of = torch.nn.Linear(32, 3), stripes()

    def loss() -> float:
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(head(vit(of.images)), of.labels).item()

    before = loss()
    heads.fine_tune(vit, head, of.images, of.labels, seed=0, epochs=10)
    assert loss() < 0.8 * before
