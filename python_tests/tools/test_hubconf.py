"""hubconf.py through torch.hub, from the source tree and without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import evit_ext
from evit_ext import models

ROOT = Path(__file__).parents[2]


def load(name: str, *arguments: Any, **named: Any) -> Any:
    return torch.hub.load(str(ROOT), name, *arguments, source="local", **named)


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository that torch.hub takes for one it has fetched already."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "owner_evit_ext_main").symlink_to(ROOT)
    return "owner/evit_ext:main"


def test_the_same_model_as_the_packages() -> None:
    torch.manual_seed(0)
    expected = models.deit_tiny(keep_rate=0.6, depth=4, drop_loc=(2,), img_size=64).eval()
    torch.manual_seed(0)
    model = load("evit_deit_tiny", keep_rate=0.6, depth=4, drop_loc=(2,), img_size=64).eval()
    assert type(model) is type(expected)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), expected(images))


def test_any_model_of_timm() -> None:
    model = load("evit", "vit_tiny_patch16_224", keep_rate=0.5, drop_loc=(1, 5), img_size=64, num_classes=7)
    with evit_ext.record_tokens(model) as record:
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert [kept.shape[1] for kept in record.kept] == [8, 5]


def test_list_has_every_model_and_nothing_else(fetched: str) -> None:
    entries = set(torch.hub.list(fetched, trust_repo=True))
    named = {name if name.startswith("dynamicvit") else f"evit_{name}" for name in models.__all__}
    assert entries == named | {"evit"}
    with torch.device("meta"):
        for name in named:
            expected = getattr(models, name.removeprefix("evit_"))
            assert load(name).default_cfg == expected().default_cfg


def test_help(fetched: str) -> None:
    assert "EViT-DeiT-S" in torch.hub.help(fetched, "evit_deit_small", trust_repo=True)
    for name in torch.hub.list(fetched, trust_repo=True):
        assert torch.hub.help(fetched, name, trust_repo=True).startswith("Return")


@pytest.mark.parametrize("installed", [True, False])
def test_sources_that_are_not_built(tmp_path: Path, installed: bool) -> None:
    """torch.hub fetches sources without compiled operators: the installed package, or what to do."""
    fetched = tmp_path / "owner_evit_ext_main"
    (fetched / "evit_ext").mkdir(parents=True)
    (fetched / "evit_ext/__init__.py").write_text("from evit_ext import _C\n")
    (fetched / "hubconf.py").write_text((ROOT / "hubconf.py").read_text())
    folder = str(Path(evit_ext.__file__).parents[1])
    prepare = f"sys.path.append({folder!r})" if installed else "sys.modules['evit_ext'] = None"
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
{prepare}
import torch
print(torch.hub.load({str(fetched)!r}, "evit_deit_tiny", source="local", weight_init="skip").__module__)
"""
    environment = {"PATH": "", "PYTHONPATH": ""}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    if installed:
        assert found.stdout.strip() == "evit_ext.models.deit_model", found.stderr
    else:
        last = found.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: evit_ext cannot be imported (")
        assert last.endswith(f"pip install {fetched}")


def test_unknown_entry() -> None:
    with pytest.raises(RuntimeError, match="Cannot find callable evit_deit_huge"):
        load("evit_deit_huge")
