"""Files of int8: what is quantised, on which images, and how they compare with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_data import crop
from torch import Tensor

import evit_ext
from evit_ext.export import Metadata, export_model, load, read_metadata
from evit_ext.export.comparison import agreement
from evit_ext.export.int8 import read_images, split
from evit_ext.export.onnx_file import operators

METADATA = Metadata("m", (0.5,), (3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.9)


@pytest.fixture
def evit(small_vit: Any, one_thread: None) -> Any:
    torch.manual_seed(0)
    return evit_ext.apply(small_vit(depth=2), (0.8, 0.5), (0, 1))


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_files(format: str, evit: Any, tmp_path: Path, openvino: Any) -> None:
    file = tmp_path / {"onnx": "a.onnx", "openvino": "a.xml"}[format]
    exported = export_model(evit, file, format, calibration=images(40))
    found = exported.agreement
    assert found is not None and (found.calibrated_on, found.images) == (30, 10)
    assert 0.97 < found.least_cosine <= found.cosine < 1 and found.same_class >= 0.8
    assert exported.metadata.quantization == read_metadata(file).quantization == "int8"
    assert exported.metadata.dtype == "float32"
    run = load(file, {"onnx": "onnxruntime", "openvino": "openvino"}[format], threads=1)
    others = images(40)[3::4]
    again, difference = agreement(evit, run, others, 30)
    assert again == found and difference == exported.max_difference
    for batch in (1, 5):
        assert run(images(batch)).shape == (batch, 5)


def test_what_is_quantised(evit: Any, tmp_path: Path, onnx: Any) -> None:
    """Products with weights; those of attention, which decide what is kept, are not."""
    export_model(evit, tmp_path / "a.onnx", "onnx")
    export_model(evit, tmp_path / "b.onnx", "onnx", calibration=images(8))
    exact, model = (onnx.load(str(tmp_path / name)) for name in ("a.onnx", "b.onnx"))
    weights = {value.name: value for value in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    of_weights = of_activations = 0
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        sources = [makers.get(name) for name in node.input[:2]]
        dequantised = [source is not None and source.op_type == "DequantizeLinear" for source in sources]
        assert dequantised in ([True, True], [False, False])
        if dequantised[1]:
            of_weights += 1
            weight = weights[sources[1].input[0]]
            assert weight.data_type == onnx.TensorProto.INT8
            scale = weights[sources[1].input[1]]
            assert list(scale.dims) == [weight.dims[-1 if node.op_type == "MatMul" else 0]]  # a channel each
        else:
            of_activations += 1
    # Patch embedding, four layers a block, head.
    assert of_weights == 1 + 4 * 2 + 1
    # An input each, which queries, keys and values share; what a product gives is not rounded.
    assert operators(model)["QuantizeLinear"] == of_weights
    kinds = operators(exact)
    assert of_weights + of_activations == kinds["MatMul"] + kinds["Gemm"] + kinds["Conv"]
    assert (tmp_path / "b.onnx").stat().st_size < 0.6 * (tmp_path / "a.onnx").stat().st_size


def test_another_model_does_not_agree(evit: Any, small_vit: Any, onnx: Any) -> None:
    other = evit_ext.apply(small_vit(depth=3), 0.5)
    with torch.no_grad():
        found, _ = agreement(evit, other, images(8), 0)
    assert found.cosine < 0.9
    for wrong in (lambda x: evit(x) * torch.nan, lambda x: evit(x)[:, :4]):
        with pytest.raises(ValueError, match="the model in int8 is not right, and was removed"):
            agreement(evit, wrong, images(4), 0)


def test_split() -> None:
    calibrating, others = split(torch.arange(10.0))
    assert others.tolist() == [3, 7] and calibrating.tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    with pytest.raises(ValueError, match="int8 needs at least 4 images to calibrate on, got 3"):
        split(images(3))


def test_images_of_a_folder(tmp_path: Path) -> None:
    for number in range(6):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        crop(number % 2, number).save(path)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    found = read_images(tmp_path, METADATA, 100)
    assert found.shape == (6, 3, 32, 32) and found.dtype == torch.float32
    assert torch.equal(read_images(tmp_path, METADATA, 3), found[[0, 2, 4]])
    (tmp_path / "b" / "9.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b/9.jpg, to calibrate on, cannot be read: not an image"):
        read_images(tmp_path, METADATA, 100)


def test_refused(evit: Any, tmp_path: Path, onnx: Any) -> None:
    (tmp_path / "empty").mkdir()
    file = tmp_path / "a.onnx"
    for given, error, message in (
        (images(3), ValueError, "at least 4 images to calibrate on, got 3"),
        (images(8).double(), ValueError, r"calibration must be float32 \[n, 3, 32, 32\], got torch.float64"),
        (
            images(8)[:, :1],
            ValueError,
            r"calibration must be float32 \[n, 3, 32, 32\], got torch.float32 \(8, 1",
        ),
        (tmp_path / "no", FileNotFoundError, "there is no folder .*no of images to calibrate on"),
        (tmp_path / "empty", ValueError, "empty has no image files to calibrate on"),
    ):
        with pytest.raises(error, match=message):
            export_model(evit, file, "onnx", image_size=32, calibration=given)
    with pytest.raises(ValueError, match="the model has no product with weights"):
        export_model(torch.nn.Flatten().eval(), file, "onnx", image_size=32, calibration=images(8))
    with pytest.raises(ValueError, match="int8 is for the formats onnx and openvino, got pt2"):
        export_model(evit, tmp_path / "a.pt2", calibration=images(8))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("number", [0, 3, -1])
def test_too_few_images_of_a_folder(number: int, small_vit: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"max_calibration_images must be at least 4, got {number}"):
        export_model(
            small_vit(depth=1), tmp_path / "a.onnx", "onnx", calibration="x", max_calibration_images=number
        )
    assert list(tmp_path.iterdir()) == []
