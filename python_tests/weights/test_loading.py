"""load_checkpoint: the models that weights are loaded into."""

from __future__ import annotations

import io
from collections.abc import Callable
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


#: What becomes of a tensor of ones in a file.
OTHER_THAN_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "meta": lambda ones: ones.to("meta"),
    "sparse": lambda ones: ones.to_sparse(),
    "quantised": lambda ones: torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8),
    "nested": lambda ones: torch.nested.nested_tensor([ones]),
    "no numbers": lambda ones: torch.empty(ones.shape, dtype=torch.float4_e2m1fn_x2),
    "complex": lambda ones: ones.to(torch.complex64),
    "whole numbers": lambda ones: ones.long(),
    "no dimension": lambda ones: torch.ones(()),
    "expanded": lambda ones: torch.ones(1).expand(ones.shape),
}


@pytest.mark.filterwarnings("ignore")  # what torch says of these kinds of tensors
@pytest.mark.parametrize("key", ["norm.weight", "blocks.0.norm1.weight", "pos_embed"])
@pytest.mark.parametrize("what", OTHER_THAN_PLAIN)
def test_all_or_nothing(tmp_path: Path, what: str, key: str) -> None:
    """What cannot be copied is found before anything is; `refused` compares every weight of the model."""
    state = deit_file(tokens=26)  # which is resized
    state[key] = OTHER_THAN_PLAIN[what](torch.ones_like(state[key]))
    message = refused(evit(), saved(tmp_path, {"model": state}), resize_pos_embed=True)
    assert key in message and len(message) < 600


def test_eight_bits_are_resized_too(tmp_path: Path) -> None:
    state = {key: value.to(torch.float8_e4m3fn) for key, value in deit_file(tokens=26).items()}
    load_checkpoint(evit(), saved(tmp_path, state), resize_pos_embed=True)


def test_a_position_embedding_that_takes_more_than_its_file(tmp_path: Path) -> None:
    """An expanded one of a few bytes would be resized from terabytes."""
    state = {**deit_file(), "pos_embed": torch.ones(1).expand(1, 10**12 + 1, 24)}
    assert "pos_embed is a view of" in refused(evit(), saved(tmp_path, state), resize_pos_embed=True)


def test_hooks_that_fail(tmp_path: Path) -> None:
    """What a module does when it is loaded may fail after others have their weights."""

    def fail(*_: object) -> None:
        raise KeyError("of a hook")

    model = evit()
    model.head.register_load_state_dict_post_hook(fail)
    assert "DeiT refuses them (KeyError: 'of a hook'); its" in refused(model, saved(tmp_path, deit_file()))


def test_an_interruption(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = evit()
    model.head.register_load_state_dict_post_hook(interrupt)
    refused(model, saved(tmp_path, deit_file()), KeyboardInterrupt)


def test_tied_weights(tmp_path: Path) -> None:
    """Two keys of one parameter: the same weights, or none."""
    model, state = evit(), deit_file()
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    message = refused(model, saved(tmp_path, state))
    assert (
        "blocks.0.norm1.weight and blocks.1.norm1.weight are one tensor of the model, but differ" in message
    )
    state["blocks.1.norm1.weight"] = state["blocks.0.norm1.weight"]
    load_checkpoint(model, saved(tmp_path, state))
    assert_loaded(model, state)


def test_parameters_that_are_expanded(tmp_path: Path) -> None:
    model = evit()
    model.norm.weight = nn.Parameter(torch.ones(1).expand(24))
    assert "norm.weight is expanded: several of its" in refused(model, saved(tmp_path, deit_file()))


def test_long_keys_in_messages(tmp_path: Path) -> None:
    message = refused(evit(), saved(tmp_path, {**deit_file(), "x" * 10**6: torch.ones(1)}))
    assert "not in the model: xxx" in message and len(message) < 400
