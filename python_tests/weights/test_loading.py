"""load_checkpoint: the models that weights are loaded into."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    assert_loaded,
    deit_file,
    evit,
    images,
    lvvit,
    lvvit_file,
    refused,
    saved,
    vit,
)
from torch import Tensor, nn

from evit_ext.weights import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_dtype_and_identity_of_parameters(tmp_path: Path, device: torch.device) -> None:
    model = evit().to(device, torch.bfloat16)
    before = dict(model.named_parameters())
    load_checkpoint(model, saved(tmp_path, {"model": deit_file()}))
    assert_loaded(model, deit_file())
    for name, parameter in model.named_parameters():
        assert parameter is before[name] and parameter.requires_grad
        assert (parameter.dtype, parameter.device.type) == (torch.bfloat16, device.type)


def test_half_precision_files(tmp_path: Path) -> None:
    half = {key: value.half() for key, value in deit_file(tokens=26).items()}
    model = evit()
    load_checkpoint(model, saved(tmp_path, half), resize_pos_embed=True)
    assert model.pos_embed.dtype == torch.float32 and torch.isfinite(model(images())).all()


def test_models_that_cannot_take_weights(tmp_path: Path) -> None:
    file = saved(tmp_path, deit_file())
    with torch.device("meta"):
        model = vit()
    with pytest.raises(ValueError, match="cls_token is on the meta device, which holds no weights"):
        load_checkpoint(model, file)

    class Shard(Tensor):
        pass

    model = vit()
    model.norm.weight = nn.Parameter(torch.ones(24).as_subclass(Shard))
    with pytest.raises(ValueError, match="norm.weight is a Shard, no plain tensor: load the check"):
        load_checkpoint(model, file)


def test_the_file_can_go_away_afterwards(tmp_path: Path) -> None:
    """The file is mapped while it is read; the model must not be."""
    model, state = evit(), deit_file()
    file = saved(tmp_path, {"model": state})
    load_checkpoint(model, file)
    file.write_bytes(b"\0" * file.stat().st_size)
    assert_loaded(model, state)


def test_checkpoint_path_goes_on_working(tmp_path: Path) -> None:
    state = lvvit_file()
    assert_loaded(lvvit(checkpoint_path=saved(tmp_path, {"state_dict": state})), state)
    state = deit_file()
    assert_loaded(evit(checkpoint_path=saved(tmp_path, {"model": state})), state)


def test_in_memory_files_are_no_paths() -> None:
    assert "got BytesIO" in refused(evit(), io.BytesIO(b""), TypeError)


def test_parameters_made_in_inference_mode(tmp_path: Path) -> None:
    model = evit()
    with torch.inference_mode():
        model.norm.weight = nn.Parameter(torch.ones(24))
    expected = model.cls_token.clone()
    assert "was made in inference mode" in refused(model, saved(tmp_path, deit_file()))
    assert torch.equal(model.cls_token, expected)
