"""Every Python block of README.md, CONTRIBUTING.md and docs/, in order, in one namespace a page.

What stands in for what is not here: `pretrained=True` gives random weights, as there is no network; so does
``from_pretrained`` of transformers. ``torch.compile`` returns the model, and no package of AOTInductor is
loaded: compiling takes half a minute each, and both have tests of their own. Files that a page takes for
granted are made in a folder of the test's own.

Comment lines that follow a ``print(...)`` of a block are what it prints, and are compared.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch._inductor
import transformers
from documents import NOT_RUN, PAGES, ROOT, RUN, Block, blocks

import evit_ext
from evit_ext import export, models


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "from_pretrained",
        classmethod(lambda cls, _name: cls(cls.config_class()).eval()),
    )
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: path)
    # The hub is a folder; evit_ext's own tests have a stand-in that speaks its protocol.
    load = evit_ext.from_pretrained
    monkeypatch.setattr(
        evit_ext,
        "push_to_hub",
        lambda model, name, private, license: evit_ext.save_pretrained(model, name, license=license),
    )
    monkeypatch.setattr(
        evit_ext, "from_pretrained", lambda source, **named: load(source.removeprefix("hf-hub:"), **named)
    )


def _small_deit() -> Any:
    return models.deit_tiny(keep_rate=0.7, img_size=64, embed_dim=48, depth=4, drop_loc=(1, 2)).eval()


def _readme() -> dict[str, Any]:
    """An EViT's and a DynamicViT's file, as their authors write them, and a batch."""
    trained = {"epoch": 299, "args": argparse.Namespace(base_keep_rate=0.7)}
    torch.save({"model": models.deit_small().state_dict(), **trained}, "evit.pth")
    torch.save({"model": models.dynamicvit_small().state_dict()}, "checkpoint.pth")
    return {
        "images": torch.randn(2, 3, 224, 224),
        "labels": torch.tensor([3, 7]),
        "criterion": torch.nn.CrossEntropyLoss(),
    }


def _visualize() -> dict[str, Any]:
    return {"model": _small_deit(), "images": torch.randn(2, 3, 64, 64)}


def _export() -> dict[str, Any]:
    for format, ending in (("pt2", "pt2"), ("onnx", "onnx"), ("openvino", "xml")):
        export.export_model(_small_deit(), f"small.{ending}", format)
    return {"model": _small_deit(), "images": torch.randn(2, 3, 64, 64)}


def _hub() -> dict[str, Any]:
    """The repository, under the path that the page gives it."""
    Path("path/to/the").mkdir(parents=True)
    Path("path/to/the/repository").symlink_to(ROOT)
    return {}


#: What a page takes for granted. Pages that are not named begin with nothing.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": _readme,
    "docs/visualize.md": _visualize,
    "docs/export.md": _export,
    "docs/hub.md": _hub,
}

WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_blocks_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__", **GIVEN.get(page, dict)()}
    for block in blocks(page):
        if block.language == "python":
            run(block, namespace, capsys)


def run(block: Block, namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Run the statements of a block, and compare what they print with the comments that follow them."""
    lines = block.text.splitlines()
    # Line numbers of the page, so that a traceback shows where.
    tree = ast.parse("\n" * (block.line - 1) + block.text, str(ROOT / block.page))
    for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        capsys.readouterr()
        exec(compile(ast.Module([statement], []), str(ROOT / block.page), "exec"), namespace)
        printed = capsys.readouterr().out.splitlines()
        if "print" not in ast.unparse(statement):
            continue
        begin = statement.end_lineno - block.line + 1
        end = len(lines) if following is None else following.lineno - block.line
        said = [line[2:] for line in lines[begin:end] if line.startswith("# ")]
        if said:
            place = f"{block.page}:{block.line + begin}"
            assert [line.rstrip() for line in printed] == said, f"{place}: it prints other lines"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_their_language(page: str) -> None:
    """So that every one is run, or says why not."""
    unknown = [block for block in blocks(page) if block.language not in (*RUN, *NOT_RUN)]
    assert not unknown, "\n".join(
        f"{page}:{block.line}: in {block.language or 'no language'}: make it ```sh, ```python, ```text "
        "or another of python_tests/docs/documents.py (an indented block has none)"
        for block in unknown
    )


def test_what_stands_in_is_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `pretrained=True` nothing is fetched, and an unknown name is still an error."""
    assert evit_ext.apply(timm.create_model("vit_tiny_patch16_224", pretrained=True))
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("vit_small_patch16_2244", pretrained=True)
