"""OpenVINO's files: what they compute, what they say of the model, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import evit_ext
from evit_ext.export import Exported, Metadata, export_model, exporting, load, read_metadata
from evit_ext.export.openvino_file import core, precisions, runner

CLASSES = ["a", "b", "ü", "d", "e"]
GOOD = Metadata("m", (0.5,), (3, 8, 8), (0.5,) * 3, (1.0,) * 3, "bilinear", 0.9).to_json()


def small(small_vit: Any) -> Any:
    """The same model each time."""
    torch.manual_seed(0)
    return evit_ext.apply(small_vit(depth=2), (0.8, 0.5), (0, 1))


@pytest.fixture
def evit(small_vit: Any, one_thread: None) -> Any:
    return small(small_vit)


@pytest.fixture(scope="module")
def exported(small_vit: Any, openvino: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    file = tmp_path_factory.mktemp("openvino") / "a.xml"
    return export_model(small(small_vit), file, "openvino", name="small", classes=CLASSES)


def images(batch: int, seed: int = 5) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_files(exported: Exported, evit: Any, openvino: Any) -> None:
    graph, weights = exported.files
    assert graph == exported.file and weights == graph.with_suffix(".bin")
    assert sorted(graph.parent.iterdir()) == sorted(exported.files)
    assert exported.metadata == read_metadata(graph) and exported.batches == (1, 3)
    assert exported.metadata.classes == tuple(CLASSES) and exported.metadata.quantization is None
    # Weights in float32: all parameters, and no more than some constants besides.
    size = sum(value.numel() * 4 for value in evit.state_dict().values())
    assert size <= weights.stat().st_size < 1.1 * size
    model = core().read_model(str(graph))
    assert str(model.input("images").get_partial_shape()) == "[?,3,32,32]"
    assert str(model.output("logits").get_partial_shape()) == "[?,5]"


def test_logits(exported: Exported, evit: Any) -> None:
    run = load(exported.file, "openvino", threads=1)
    found = {batch: run(images(batch)) for batch in (1, 2, 7)}
    for batch, logits in found.items():  # which stay when the next ones come
        with torch.no_grad():
            torch.testing.assert_close(logits, evit(images(batch)), rtol=1e-4, atol=1e-5)


def test_at_a_fixed_batch(exported: Exported, evit: Any) -> None:
    run = load(exported.file, "openvino", threads=1, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(run(images(2)), evit(images(2)), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="compatible"):
        run(images(3))


def test_precisions(exported: Exported, evit: Any) -> None:
    """What is asked for is computed in, or refused; never another one in silence."""
    with torch.no_grad():
        exact = evit(images(4))
    able = precisions()
    assert {"float32", "int8"} <= set(able)
    for precision in ("bfloat16", "float16"):
        if precision in able:
            off = (runner(exported.file, precision)(images(4)) - exact).abs().max() / exact.abs().max()
            assert 1e-5 < off < 0.1
        else:
            with pytest.raises(ValueError, match=f"openvino does not compute in {precision} here: "):
                load(exported.file, "openvino", precision)
    with pytest.raises(ValueError, match="precision must be one of float32, .*, got 'f32'"):
        runner(exported.file, "f32")


def test_refused(evit: Any, tmp_path: Path, openvino: Any) -> None:
    with pytest.raises(ValueError, match=r"OpenVINO's file of the graph must have a name that ends in .xml"):
        export_model(evit, tmp_path / "a.onnx", "openvino")
    with pytest.raises(ValueError, match="OpenVINO's format is written of a model in float32 on the CPU"):
        export_model(evit.bfloat16(), tmp_path / "a.xml", "openvino")
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(IsADirectoryError, match="a.bin is a folder, expected a file"):
        export_model(evit.float(), tmp_path / "a.xml", "openvino")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.bin"]


def test_a_graph_is_never_beside_weights_of_another(
    evit: Any, tmp_path: Path, openvino: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the process is killed: here, between the two files."""
    file, real = tmp_path / "a.xml", exporting.put
    for path in (file, tmp_path / "a.bin"):
        path.write_text("of another model")

    def killed(unfinished: Path, path: Path) -> None:
        if path.suffix == ".xml":
            raise KeyboardInterrupt
        real(unfinished, path)

    monkeypatch.setattr(exporting, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        export_model(evit, file, "openvino")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.bin"]
    assert (tmp_path / "a.bin").stat().st_size > 1000


def test_missing_package(evit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = (
        r"OpenVINO needs the package openvino, which is not installed: pip install 'evit_ext\[openvino\]'"
    )
    with pytest.raises(RuntimeError, match=message):
        export_model(evit, tmp_path / "a.xml", "openvino")
    (tmp_path / "a.xml").write_text("")
    with pytest.raises(RuntimeError, match=message):
        load(tmp_path / "a.xml", "openvino")


def graph(folder: Path, information: str, start: str = "") -> Path:
    file = folder / "a.xml"
    file.write_text(f'{start}<net name="a"><layers/>{information}</net>')
    return file


def test_metadata_needs_no_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = GOOD.replace('"', "&quot;")
    file = graph(tmp_path, f'<rt_info><evit value="{said}"/></rt_info>')
    assert read_metadata(file).keep_rate == (0.5,)
    # Of the graph itself, and not of one of its layers.
    file = graph(tmp_path, f'<layer><rt_info><evit value="{said}"/></rt_info></layer>')
    with pytest.raises(ValueError, match="was not written by evit export"):
        read_metadata(file)


def test_files_of_strangers(tmp_path: Path) -> None:
    bomb = "".join(f'<!ENTITY a{n + 1} "{f"&a{n};" * 10}">' for n in range(9))
    file = graph(
        tmp_path, '<rt_info><evit value="&a9;"/></rt_info>', f'<!DOCTYPE net [<!ENTITY a0 "a">{bomb}]>'
    )
    with pytest.raises(ValueError, match="a.xml is damaged: it declares an entity, 'a0'"):
        read_metadata(file)
    for text in ("<net", "<net></tent>", "<", "<" * 100_000):
        file.write_text(text)
        with pytest.raises(ValueError, match="a.xml is damaged: not XML"):
            read_metadata(file)
    file.write_text("<a>" * 100_000 + "</a>" * 100_000)
    with pytest.raises(ValueError, match="was not written by evit export"):
        read_metadata(file)
    with file.open("r+b") as opened:
        opened.truncate(2**26 + 1)
    with pytest.raises(ValueError, match="it has 67108865 bytes"):
        read_metadata(file)
    with pytest.raises(ValueError, match="damaged metadata"):
        read_metadata(graph(tmp_path, '<rt_info><evit value="{"/></rt_info>'))


# What ends a process where OpenVINO has left a stack for signals that is gone: a signal with a handler.
_CHILDREN_END = """
import faulthandler, signal, subprocess, sys
from evit_ext.export import load
from evit_ext.export.openvino_file import precisions

faulthandler.enable()
signal.signal(signal.SIGCHLD, lambda *_: None)
precisions()
first = load(sys.argv[1], "openvino")
second = load(sys.argv[1], "openvino")
del first
del second
subprocess.run(["true"], check=True)
print("alive")
"""


def test_signals_have_their_stack_when_models_are_gone(exported: Exported) -> None:
    command = [sys.executable, "-c", _CHILDREN_END, str(exported.file)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "alive\n"
