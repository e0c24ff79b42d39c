"""save_pretrained, push_to_hub and from_pretrained, and that timm reads what they write.

The Hugging Face hub is a folder here: its client's functions are replaced by ones that copy files.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from huggingface_hub.errors import EntryNotFoundError

import evit_ext
from evit_ext import from_pretrained, models, push_to_hub, save_pretrained
from evit_ext.patching.keep_rates import keep_rates

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 5}


def deit(**arguments: Any) -> Any:
    return models.deit_tiny(**{"drop_loc": (1, 3), "keep_rate": 0.6, **SMALL, **arguments})


def applied(name: str = "vit_tiny_patch16_224", **arguments: Any) -> Any:
    settings = {
        key: arguments.pop(key) for key in ("keep_rate", "drop_loc", "fuse_token") if key in arguments
    }
    return evit_ext.apply(timm.create_model(name, **{**SMALL, **arguments}), **settings)


def logits(model: Any) -> torch.Tensor:
    like = next(model.parameters())
    images = torch.randn(3, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(images.to(like))


BUILDS: dict[str, Callable[[], Any]] = {
    "deit": deit,
    "rate of each stage, no fused token": lambda: deit(keep_rate=[0.5, 0.8], fuse_token=False),
    "not square": lambda: deit(img_size=(32, 64)),
    "distilled": lambda: models.deit_tiny_distilled(drop_loc=(1, 3), **SMALL),
    "lvvit": lambda: models.lvvit_tiny(keep_rate=0.6, **{**SMALL, "stem_dim": 16}),
    "dynamicvit": lambda: models.dynamicvit_tiny(keep_rate=[0.9, 0.5], drop_loc=(1, 2), **SMALL),
    "applied": lambda: applied(keep_rate=0.4, drop_loc=(2,), global_pool="avg"),
    "applied, rotary": lambda: applied("eva02_tiny_patch14_224", img_size=28, keep_rate=0.5),
    "applied, position biases": lambda: applied("beit_base_patch16_224", drop_loc=(1, 2), fuse_token=False),
}


@pytest.mark.parametrize("name", BUILDS)
def test_the_same_model_again(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BUILDS[name]().train()
    assert save_pretrained(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert all(module.training for module in model.modules())
    loaded = from_pretrained(tmp_path / "new" / "folder")
    assert type(loaded) is type(model) and not loaded.training
    assert keep_rates(loaded) == keep_rates(model)
    assert torch.equal(logits(loaded), logits(model))
    # By timm: the same, or what evit_ext.apply was called on.
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'new' / 'folder'}", pretrained=True)
    expected = evit_ext.remove(model) if name.startswith("applied") else model
    assert torch.equal(logits(by_timm), logits(expected))


def test_what_changed_after_building(tmp_path: Path) -> None:
    """Keep rates, the number of classes, the size of images and the dtype are those that the model has."""
    torch.manual_seed(0)
    model = deit()
    evit_ext.set_keep_rate(model, [0.3, 0.9])
    model.reset_classifier(7)
    model.set_input_size((48, 32))
    model.to(torch.bfloat16)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(str(tmp_path))
    assert next(loaded.parameters()).dtype is torch.bfloat16
    assert torch.equal(logits(loaded), logits(model)) and logits(loaded).shape == (3, 7)
    assert keep_rates(from_pretrained(tmp_path, keep_rate=0.5)) == [0.5]


def test_names_of_classes_and_normalisation(tmp_path: Path) -> None:
    names = ["cat", "dog", "fox", "owl", "ant"]
    normalisation = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 1.0}
    save_pretrained(deit(), tmp_path, label_names=names, pretrained_cfg=normalisation)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "evit_deit_tiny_patch16_224" and config["label_names"] == names
    assert config["evit"]["keep_rate"] == 0.6 and config["evit"]["drop_loc"] == [1, 3]
    assert config["evit"]["fuse_token"] is True
    for model in (from_pretrained(tmp_path), timm.create_model(f"local-dir:{tmp_path}")):
        assert model.pretrained_cfg["label_names"] == names
        data = timm.data.resolve_model_data_config(model)
        assert tuple(data["input_size"]) == (3, 32, 32) and data["crop_pct"] == 1.0
        assert tuple(data["mean"]) == (0.5, 0.5, 0.5) and tuple(data["std"]) == (0.25, 0.25, 0.25)


def test_card(tmp_path: Path) -> None:
    save_pretrained(deit(), tmp_path, license="mit", description="Knows owls.", repo_id="someone/owls")
    card = (tmp_path / "README.md").read_text()
    metadata = huggingface_hub.ModelCard(card).data
    assert metadata.license == "mit" and metadata.library_name == "evit_ext" and "evit" in metadata.tags
    macs = evit_ext.count_macs(deit()) / 1e9
    assert "# owls\n" in card and "Knows owls." in card and f"| GMACs | {macs:.3g}," in card
    assert "| Keep rate | 0.6, at blocks 1, 3; what is not kept is fused into one token |" in card
    assert 'evit_ext.from_pretrained("hf-hub:someone/owls")' in card
    save_pretrained(deit(), tmp_path / "small-evit")
    assert "# small-evit\n" in (tmp_path / "small-evit" / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    save_pretrained(deit(keep_rate=0.5), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert keep_rates(from_pretrained(tmp_path)) == [0.5]


class Hub:
    """In the place of the Hugging Face hub: a folder for each repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[Any, ...]] = []

    def HfApi(self, token: str | None, library_name: str, library_version: str) -> Any:
        return SimpleNamespace(create_repo=self.create, file_exists=self.exists, upload_folder=self.upload)

    def create(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(("create", repo_id, private))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def exists(self, repo_id: str, filename: str, revision: str | None) -> bool:
        return (self.root / repo_id / filename).exists()

    def upload(
        self, repo_id: str, folder_path: str, revision: Any, create_pr: bool, commit_message: str
    ) -> Any:
        self.calls.append(
            ("upload", sorted(file.name for file in Path(folder_path).iterdir()), commit_message)
        )
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"commit of {repo_id}")

    def download(self, repo_id: str, filename: str, **_: Any) -> str:
        if not (self.root / repo_id / filename).exists():
            raise EntryNotFoundError(filename)
        return str(self.root / repo_id / filename)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub.HfApi)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", hub.download)
    return hub


def test_push_and_from_the_hub(hub: Hub) -> None:
    torch.manual_seed(0)
    model = deit()
    assert push_to_hub(model, "someone/small", private=True, license="mit") == "commit of someone/small"
    files = ["README.md", "config.json", "model.safetensors"]
    assert hub.calls == [("create", "someone/small", True), ("upload", files, "Add model")]
    assert "hf-hub:someone/small" in (hub.root / "someone/small/README.md").read_text()
    assert torch.equal(logits(from_pretrained("hf-hub:someone/small")), logits(model))
    by_timm = timm.create_model("hf-hub:someone/small", pretrained=True)
    assert torch.equal(logits(by_timm), logits(model))
    push_to_hub(model, "someone/small", commit_message="Again")
    assert hub.calls[-1] == ("upload", files[1:], "Again")  # the card that is there stays


def test_nothing_is_asked_of_the_hub_for_a_model_that_cannot_be_saved(hub: Hub) -> None:
    with pytest.raises(ValueError, match="expected 5 label_names, one for each class, got 1"):
        push_to_hub(deit(), "someone/small", label_names=["owl"])
    with pytest.raises(ValueError, match="repo_id must be 'owner/name', got 'small'"):
        push_to_hub(deit(), "small")
    assert not hub.calls


def test_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "create", fail)
    with pytest.raises(RuntimeError, match="someone/small could not be written .*no route"):
        push_to_hub(deit(), "someone/small")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(RuntimeError, match="someone/small could not be fetched from the Hugging Face hub"):
        from_pretrained("hf-hub:someone/small")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: "deit_tiny", TypeError, "model must be a torch module, got str"),
        (
            lambda: torch.nn.Linear(2, 2),
            ValueError,
            "Linear cannot be saved: expected a model of evit_ext.mo",
        ),
        (lambda: evit_ext.remove(deit()), ValueError, "DeiT does not reorganise tokens"),
        (lambda: applied(norm_layer=torch.nn.LayerNorm), ValueError, "'norm_layer' is not serializable"),
    ],
)
def test_what_cannot_be_saved(
    build: Callable[[], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        save_pretrained(build(), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_model_that_would_be_another_does_not_replace_what_is_there(tmp_path: Path) -> None:
    save_pretrained(deit(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    changed = deit()
    changed.blocks[0].attn.num_heads, changed.blocks[0].attn.head_dim = 1, 48
    torch.nn.init.normal_(changed.blocks[0].attn.qkv.weight)
    with pytest.raises(ValueError, match="DeiT would be loaded as another model: its config.json does not"):
        save_pretrained(changed, tmp_path)
    changed.blocks[1].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match="DeiT cannot be loaded again: .* say it in model_args"):
        save_pretrained(changed, tmp_path)
    mixed = deit()
    mixed.head.to(torch.bfloat16)
    with pytest.raises(ValueError, match="its parameters have several dtypes"):
        save_pretrained(mixed, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_model_args_are_taken(tmp_path: Path) -> None:
    """With them, a model is saved of which timm remembers no arguments."""
    torch.manual_seed(0)
    model = applied()
    model._model_args = {}
    with pytest.raises(ValueError, match="say it in model_args"):
        save_pretrained(model, tmp_path)
    save_pretrained(model, tmp_path, model_args={"depth": 4, "embed_dim": 48, "num_heads": 3})
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(deit(), tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "deit_smal"}, "cannot be built: there is no model 'deit_smal': the near"),
        ({"architecture": None}, "config.json has no entry 'architecture'"),
        (
            {"evit": None},
            "has no entry 'evit': .* use timm.create_model and evit_ext.apply",
        ),
        (
            {"model_args": {"checkpoint_path": "/etc/passwd"}},
            "arguments of the model, got checkpoint_path",
        ),
        ({"model_args": {"colour": "red"}}, "cannot be built: .*colour"),
        ({"evit": {"keep_rate": 1.5}}, r"keep_rate must be in \(0, 1\], got 1.5"),
        ({"evit": {"dtype": "int"}}, "cannot be built"),
        ({"evit": {"dtype": "red"}}, "dtype must be one of torch's, such as 'float32', got 'red'"),
        ({"model_args": {}}, "model.safetensors does not fit: .* they have 48 channels"),
        ("{", "config.json is damaged, no JSON"),
        ("[]", "config.json has no entry 'architecture'"),
        ("[" * 100_000, "config.json is damaged, no JSON: RecursionError"),
        (" " * 2**24 + "{}", "config.json has 16777218 bytes, expected at most 16777216"),
        ({"architecture": "x" * 10**6}, "^.{0,500}$"),
        ({"model_args": "red"}, "model_args must be a mapping of names to values, got 'red'"),
        ({"model_args": {"act_layer": "wavy"}}, "config.json names .*: KeyError 'wavy'"),
        ({"model_args": {"norm_layer": "wavy"}}, "config.json names .* KeyError 'wavy'"),
        ({"model_args": {"embed_dim": -48}}, "config.json names .* negative dimension -48"),
        ({"model_args": {"patch_size": 0}}, "config.json names .* ZeroDivisionError"),
        ({"pretrained_cfg": {"input_size": []}}, "config.json names .* AssertionError"),
    ],
)
def test_damaged_folders(saved: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "folder")
    if not isinstance(change, str):
        change = json.dumps({**json.loads((folder / "config.json").read_text()), **change})
    (folder / "config.json").write_text(change)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_missing_files(saved: Path, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere; of the Hugging Face hub"):
        from_pretrained("nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no .*config.json: expected what evit_ext.save_pr"):
        from_pretrained(tmp_path)
    with pytest.raises(NotADirectoryError, match="is no folder: evit_ext.load_checkpoint loads a file"):
        from_pretrained(saved / "model.safetensors")
    with pytest.raises(NotADirectoryError, match="is a file: give a folder"):
        save_pretrained(deit(), saved / "config.json")
    shutil.copy(saved / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no .*model.safetensors"):
        from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="someone/other on the Hugging Face hub has no config.json"):
        from_pretrained("hf-hub:someone/other")


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 10**6},
        {"depth": 10**12},
        {"depth": 10**6, "embed_dim": 4, "num_heads": 1},  # of which only the number is large
        {"embed_dim": 3 * 2**20},
        {"img_size": 2**20},
        {"num_classes": 10**9},
        {"mlp_ratio": 1e7},
        {"reg_tokens": 10**9},
    ],
    ids=str,
)
def test_no_more_memory_than_the_weights_call_for(
    saved: Path, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    """A configuration may ask for a million blocks, of which the weights have four."""
    folder = shutil.copytree(saved, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].update(arguments)
    (folder / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="config.json .* many times as large as its weights: the"):
        from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB


def test_position_biases_that_are_not_saved(tmp_path: Path) -> None:
    """A table of how all patches lie to each other, of a model that is small otherwise."""
    folder = save_pretrained(applied("beit_base_patch16_224", depth=2, embed_dim=8, num_heads=1), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["img_size"] = [16 * 300, 16 * 300]  # 90,001 tokens
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="many times as large as its weights"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("keep_rate", "error", "message"),
    [
        (70, ValueError, r"keep_rate must be in \(0, 1\], got 70"),
        ([0.7, 0.7, 0.7], ValueError, "keep_rate must be one number or 2, one for each reorganising block"),
        ("0.7", TypeError, "keep_rate must be a number in"),
    ],
)
def test_keep_rates_are_checked(saved: Path, keep_rate: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_pretrained(saved, keep_rate=keep_rate)


def test_weights_that_do_not_fit(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "folder")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state["blocks.2.norm1.weight"]
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)does not fit DeiT:.*blocks.2.norm1.weight"):
        from_pretrained(folder)
