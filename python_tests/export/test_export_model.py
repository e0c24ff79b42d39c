"""Exported files: what they compute, what they say of the model, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evit_ext
from evit_ext import models
from evit_ext.export import FORMATS, Metadata, export_model, exporting, read_metadata
from evit_ext.export.comparison import clear_images, compare
from evit_ext.patching.recording import record_tokens

#: Which no file is to name, as those who get it have no use for it.
FOLDER = str(Path(evit_ext.__file__).parent).encode()

CLASSES = ["a", "b", "ü", "d", "e"]


@pytest.fixture
def evit(small_vit: Any, one_thread: None) -> Any:
    return evit_ext.apply(small_vit(depth=3), (0.8, 0.5), (0, 1))


def images(batch: int, seed: int = 5) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def run_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    from evit_ext.export.onnx_file import runner

    return runner(file, threads=1)


def test_pt2(evit: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.pt2"
    exported = export_model(evit, file, name="small", classes=CLASSES)
    assert exported.file == file and exported.batches == (1, 3)
    assert exported.metadata == read_metadata(file)
    assert exported.metadata.classes == tuple(CLASSES) and exported.metadata.model == "small"
    assert exported.metadata.keep_rate == (0.8, 0.5)
    assert exported.metadata.input_size == (3, 32, 32)
    with zipfile.ZipFile(file) as archive:
        assert not any(FOLDER in archive.read(name) for name in archive.namelist())
    program = torch.export.load(file)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"evit.class_attention.default", "evit.add_reorganize_norm.default"} <= names
    for batch in (1, 2, 5, 33):
        x = images(batch)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), evit(x), rtol=1e-4, atol=1e-5)
    assert list(tmp_path.iterdir()) == [file]


def test_max_batch(evit: Any, tmp_path: Path) -> None:
    export_model(evit, tmp_path / "a.pt2", max_batch=2)
    assert read_metadata(tmp_path / "a.pt2").max_batch == 2
    module = torch.export.load(tmp_path / "a.pt2").module()
    module(images(2))
    with pytest.raises(AssertionError, match="<= 2"):
        module(images(3))


def test_onnx(evit: Any, tmp_path: Path, onnx: Any) -> None:
    from evit_ext.export.onnx_file import operators

    file = tmp_path / "a.onnx"
    export_model(evit, file, "onnx", classes=CLASSES)
    assert FOLDER not in file.read_bytes()
    model = onnx.load(str(file))
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.domain for entry in model.opset_import] == [""] and not model.functions
    found = operators(model)
    assert found["TopK"] == 4  # two of each stage
    assert found["Gelu"] == 3 and found["LayerNormalization"] == 7
    assert not {"GatherElements", "Sort", "Loop", "If"} & set(found)
    constants = {value.name for value in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    assert all(node.input[1] in constants for node in model.graph.node if node.op_type == "TopK")
    (x,), (logits,) = model.graph.input, model.graph.output
    shape = [dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim]
    assert (x.name, shape) == ("images", ["batch", 3, 32, 32])
    shape = [dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim]
    assert (logits.name, shape) == ("logits", ["batch", 5])
    assert read_metadata(file).classes == tuple(CLASSES)
    run = run_onnx(file)
    for batch in (1, 2, 7):
        x = images(batch)
        with torch.no_grad():
            torch.testing.assert_close(run(x), evit(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuse_token", [True, False])
def test_other_kinds_in_onnx(fuse_token: bool, small_vit: Any, tmp_path: Path, onnx: Any) -> None:
    """Without a class token (mean attention), with several prefix tokens, without fused ones."""
    kind = {"reg_tokens": 3} if fuse_token else {"class_token": False, "global_pool": "avg"}
    vit = evit_ext.apply(small_vit(depth=2, **kind), 0.6, (0, 1), fuse_token)
    export_model(vit, tmp_path / "a.onnx", "onnx", image_size=32)


def test_dynamicvit_in_onnx(tmp_path: Path, onnx: Any) -> None:
    model = models.dynamicvit_tiny(keep_rate=0.6, img_size=32, depth=2, drop_loc=(0, 1), num_classes=5).eval()
    export_model(model, tmp_path / "a.onnx", "onnx")
    assert read_metadata(tmp_path / "a.onnx").keep_rate == (0.6,)


_IN_ANOTHER_PROCESS = """
import sys
import torch
{load}
package = torch._inductor.aoti_load_package(sys.argv[1])
images, expected = torch.load(sys.argv[2])
for batch in (1, 4):
    torch.testing.assert_close(package(images[:batch]), expected[:batch], rtol=1e-4, atol=1e-5)
assert "evit_ext.patching.block" not in sys.modules
"""


def test_aoti_runs_with_the_operators_alone(
    small_vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has loaded the operators' library, and nothing of this package's Python, runs it."""
    file, data = tmp_path / "a.pt2", tmp_path / "data.pth"
    vit = evit_ext.apply(small_vit(depth=1), 0.5, (0,))  # most of the time is the C++ compiler's
    exported = export_model(vit, file, "aoti", name="small", classes=CLASSES)
    with monkeypatch.context() as patch:  # the package's code is not loaded to read what it says
        patch.setattr(torch._inductor, "aoti_load_package", None)
        assert read_metadata(file) == exported.metadata
    x = images(4)
    with torch.no_grad():
        torch.save((x, vit(x)), data)
    library = evit_ext._C.__file__  # holds the operators, as libevit does
    code = _IN_ANOTHER_PROCESS.format(load=f"import torch._inductor\ntorch.ops.load_library({library!r})")
    done = subprocess.run([sys.executable, "-c", code, str(file), str(data)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) if x.sum() > 0 else x.amax(dim=(2, 3))


class Numbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).argmax(dim=1)


class Infinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) / 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Pair(), "the Pair returns a tuple"),
        (Pair().train(), "the Pair is in training mode"),
        (Branching(), "torch.export says: "),
        (Infinite(), "gives NaN or infinity"),
        (Numbers(), "the Numbers returns torch.int64"),
        (torch.compile(Branching()), "pass the one inside"),
    ],
    ids=["pair", "training", "branching", "infinite", "numbers", "compiled"],
)
def test_refused_models(model: Any, message: str, tmp_path: Path) -> None:
    if message != "the Pair is in training mode":
        model.eval()
    with pytest.raises(ValueError) as error:
        export_model(model, tmp_path / "a.pt2", image_size=8)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_refused_states(evit: Any, small_vit: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.pt2"
    oracle = evit_ext.Oracle(small_vit(depth=3), (0, 1))
    with oracle.guide(evit), pytest.raises(ValueError, match="an oracle guides the model"):
        export_model(evit, file)
    with record_tokens(evit), pytest.raises(ValueError, match="tokens are being recorded"):
        export_model(evit, file)
    dynamicvit = models.dynamicvit_tiny(img_size=32, depth=4, drop_loc=(1,), num_classes=5).train()
    with pytest.raises(ValueError, match="the DynamicViT is in training mode"):
        export_model(dynamicvit, file)
    with torch.device("meta"):
        empty = small_vit()
    with pytest.raises(ValueError, match="on the meta device"):
        export_model(empty, file)
    with pytest.raises(ValueError, match="5 logits, got names of 2 classes"):
        export_model(evit, file, classes=["a", "b"])
    with pytest.raises(ValueError, match="max_batch must be at least 2"):
        export_model(evit, file, max_batch=1)
    with pytest.raises(ValueError, match="format must be one of pt2, onnx, openvino, aoti"):
        export_model(evit, file, "torchscript")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export_model(evit, tmp_path / "b" / "a.pt2")
    assert not list(tmp_path.iterdir())


def test_refused_for_onnx(evit: Any, tmp_path: Path, onnx: Any) -> None:
    with pytest.raises(ValueError, match="torch.bfloat16 on cpu"):
        export_model(evit.bfloat16(), tmp_path / "a.onnx", "onnx")
    with pytest.raises(ValueError, match="opset must be at least 18"):
        export_model(evit.float(), tmp_path / "a.onnx", "onnx", opset=9)

    class Scattering(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            index = x[:, :, 0, 0].argsort(dim=1)
            return torch.zeros_like(x[:, :, 0, 0]).scatter(1, index, x[:, :, 0, 1])

    with pytest.raises(ValueError, match="its ONNX graph would need Scatter"):
        export_model(Scattering().eval(), tmp_path / "a.onnx", "onnx", image_size=8)
    assert not list(tmp_path.iterdir())


def test_missing_packages(evit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'evit_ext\[export\]'"):
        export_model(evit, tmp_path / "a.onnx", "onnx")


def test_a_file_that_differs_is_removed(evit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.pt2"
    file.write_bytes(b"before")
    whole = exporting.write_pt2

    def wrong(program: Any, path: Path, metadata: Metadata) -> Any:
        run = whole(program, path, metadata)
        return lambda x: run(x) + 1e-2 * (len(x) == 3)

    monkeypatch.setattr(exporting, "write_pt2", wrong)
    with pytest.raises(ValueError, match="for 3 images its logits differ by 0.01 from the model's"):
        export_model(evit, file)
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]


def test_comparison_refuses_nan_and_other_shapes(evit: Any) -> None:
    for change, message in (
        (lambda y: y * torch.nan, "differ by nan"),
        (lambda y: y[:, :4], r"\(2, 4\)"),
        (torch.Tensor.double, "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(evit, lambda x, change=change: change(evit(x)), [images(2)])


def test_images_without_ties(evit: Any) -> None:
    """Of images among which some make scores equal, the others are taken."""
    found = torch.cat(clear_images(evit, images(1), (1, 3)))
    assert found.shape == (4, 3, 32, 32)

    def closest(x: Tensor) -> float:
        with torch.no_grad(), record_tokens(evit) as record:
            evit(x)
        gaps = []
        for kept, scores in zip(record.kept, record.scores, strict=True):
            ordered = scores.sort(descending=True).values
            gaps.append(float((ordered[:, kept.shape[1] - 1] - ordered[:, kept.shape[1]]).min()))
        return min(gaps)

    assert closest(found) > 3 * closest(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def test_metadata_of_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_metadata(tmp_path / "a.onnx")
    torch.save({}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="was not written by evit export"):
        read_metadata(tmp_path / "a.pth")
    newer = Metadata("a", (0.5,), (3, 8, 8), (0.0,), (1.0,), "bilinear", 1.0).to_json()
    assert Metadata.from_json(newer[:-1] + ', "later": 1}').keep_rate == (0.5,)


def test_metadata_as_strings() -> None:
    classes = ("a b", "ü", "two\nlines")
    found = Metadata(
        "m", (0.5, 1), (3, 8, 16), (0.5, 0.25, 0.1), (1.0,) * 3, "bilinear", 0.9, classes=classes
    )
    strings = found.to_strings()
    assert strings.pop("evit.torch") == torch.__version__
    assert strings.pop("evit.evit_ext") == evit_ext.__version__
    assert strings == {
        "evit.model": "m",
        "evit.keep_rate": "0.5 1",
        "evit.input_size": "3 8 16",
        "evit.mean": "0.5 0.25 0.1",
        "evit.std": "1.0 1.0 1.0",
        "evit.interpolation": "bilinear",
        "evit.crop_pct": "0.9",
        "evit.crop_mode": "center",
        "evit.dtype": "float32",
        "evit.classes": "a b\nü\ntwo lines",
    }


def test_formats_are_those_of_the_command() -> None:
    from evit_ext.cli.grammar.export import _FORMATS

    assert (*FORMATS, "hf") == _FORMATS  # a folder for the hub, of which evit_ext.export knows nothing
