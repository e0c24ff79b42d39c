"""Engines: what each computes, in what precision, and what is said where one cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import evit_ext
from evit_ext.export import ENGINES, export_model, load, why_not
from evit_ext.export.engines import in_engine
from evit_ext.tokens.stage import find_stages


@pytest.fixture
def evit(small_vit: Any, one_thread: None) -> Any:
    return evit_ext.apply(small_vit(depth=2), 0.6, (0, 1)).eval()


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_in_engine(engine: str, evit: Any, openvino: Any) -> None:
    """The model's logits for batches of any size, and all else of it."""
    with in_engine(evit, engine) as served, torch.inference_mode():
        for batch in (3, 1):
            torch.testing.assert_close(served(images(batch)), evit(images(batch)), rtol=1e-4, atol=1e-5)
        assert find_stages(served) == find_stages(evit)
        assert next(served.parameters()) is next(evit.parameters())


def test_in_torch_compile(evit: Any) -> None:
    with in_engine(evit, "torch-compile") as served, torch.inference_mode():
        for batch in (3, 2):
            torch.testing.assert_close(served(images(batch)), evit(images(batch)), rtol=1e-4, atol=1e-5)


def test_in_an_engine_an_exported_file_is_run(evit: Any, tmp_path: Path, onnx: Any) -> None:
    export_model(evit, tmp_path / "a.onnx", "onnx")
    with torch.inference_mode():
        expected = evit(images(2))
        torch.nn.init.zeros_(evit.head.weight)
        with in_engine(evit, "onnxruntime", file=tmp_path / "a.onnx") as served:
            torch.testing.assert_close(served(images(2)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_int8_takes_files_of_int8_only(engine: str, evit: Any, tmp_path: Path, openvino: Any) -> None:
    exported = export_model(evit, tmp_path / "a.onnx", "onnx")
    with pytest.raises(ValueError, match=r"a\.onnx is not a file of int8: export one with --int8"):
        load(exported.file, engine, "int8")
    with pytest.raises(ValueError, match="int8 needs a file of int8"), in_engine(evit, engine, "int8"):
        pass


def test_what_each_computes_in(openvino: Any) -> None:
    for engine in ENGINES:
        assert why_not(engine, "float32") is None
        assert (why_not(engine, "int8") is None) == (engine in ("onnxruntime", "openvino"))
    assert why_not("torch", "bfloat16") is why_not("torch-compile", "float16") is None
    assert "CPU provider lacks kernels" in str(why_not("onnxruntime", "bfloat16"))
    with pytest.raises(
        ValueError, match="precision must be one of float32, bfloat16, float16, int8, got 'f'"
    ):
        why_not("torch", "f")


def test_onnxruntime_has_no_bfloat16(tmp_path: Path, onnx: Any) -> None:
    """What why_not says of it is so."""
    import onnxruntime
    from onnx import TensorProto, helper

    type_of = TensorProto.BFLOAT16
    x, w, y = (
        helper.make_tensor_value_info(name, type_of, shape)
        for name, shape in (("x", [1, 3, 8, 8]), ("w", [4, 3, 2, 2]), ("y", [1, 4, 7, 7]))
    )
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    model = helper.make_model(
        helper.make_graph([node], "a", [x, w], [y]),
        opset_imports=[helper.make_opsetid("", 22)],
        ir_version=10,
    )
    with pytest.raises(Exception, match="Could not find an implementation for Conv"):
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onnx", "there is no engine 'onnx': the nearest is onnxruntime"),
        ("openvin", "there is no engine 'openvin': the nearest is openvino"),
        ("compile", "there is no engine 'compile': the nearest is torch-compile"),
        ("x", "there is no engine 'x': expected one of torch, torch-compile, onnxruntime, openvino"),
        ("torch", "files are run by onnxruntime and openvino, got engine torch"),
    ],
)
def test_names(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.onnx", name)


def test_refused(evit: Any, tmp_path: Path, openvino: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*a.onnx"):
        load(tmp_path / "a.onnx", "onnxruntime")
    (tmp_path / "a.xml").write_text("<net/>")
    with pytest.raises(ValueError, match="onnxruntime runs ONNX: export it with --format onnx"):
        load(tmp_path / "a.xml", "onnxruntime")
    (tmp_path / "a.onnx").write_bytes(b"no")
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(ValueError, match="the file cannot be loaded: (ONNX Runtime|OpenVINO) says: "):
            load(tmp_path / "a.onnx", engine)
    with pytest.raises(ValueError, match="onnxruntime does not compute in bfloat16 here: its CPU provider"):
        load(tmp_path / "a.onnx", "onnxruntime", "bfloat16")
