"""apply, remove and set_keep_rate on timm models: arguments, errors, and what stays as it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
from timm.models.vision_transformer import Attention, ParallelScalingBlock, ParallelThingsBlock

import evit_ext
from evit_ext.patching.block import ReorganizingBlock

pytestmark = pytest.mark.usefixtures("one_thread")


def images(batch: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, dtype=dtype, generator=generator)


def test_state_dict_is_that_of_timm(variant: Any) -> None:
    vit, plain = variant(), variant()
    before = vit.state_dict()
    parameters = list(vit.parameters())
    assert evit_ext.apply(vit) is vit
    assert list(vit.state_dict()) == list(before)
    assert all(a is b for a, b in zip(vit.parameters(), parameters, strict=True))
    vit.load_state_dict(plain.state_dict())
    plain.load_state_dict(vit.state_dict())


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_stays(small_vit: Any, training: bool) -> None:
    vit = evit_ext.apply(small_vit().train(training))
    assert {module.training for module in vit.modules()} == {training}


def test_only_the_named_blocks_change(small_vit: Any) -> None:
    vit = small_vit()
    blocks = list(vit.blocks)
    evit_ext.apply(vit, drop_loc=[1, 3])
    assert [isinstance(block, ReorganizingBlock) for block in vit.blocks] == [False, True, False, True]
    assert vit.blocks[0] is blocks[0] and vit.blocks[2] is blocks[2]
    assert vit.blocks[1].mlp is blocks[1].mlp and vit.blocks[1].attn is blocks[1].attn


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(12, [3, 6, 9]), (16, [4, 8, 12]), (6, [1, 3, 4]), (4, [1, 2, 3]), (2, [0, 1]), (1, [0])],
)
def test_default_blocks(small_vit: Any, depth: int, expected: list[int]) -> None:
    vit = evit_ext.apply(small_vit(depth=depth))
    assert [i for i, block in enumerate(vit.blocks) if isinstance(block, ReorganizingBlock)] == expected


def test_remove_restores_the_original(variant: Any, device: torch.device) -> None:
    vit, x = variant().to(device), images().to(device)
    blocks, keys, expected = list(vit.blocks), list(vit.state_dict()), vit(x)
    evit_ext.apply(vit, 0.5)
    assert not torch.equal(vit(x), expected)
    assert evit_ext.remove(vit) is vit
    assert all(a is b for a, b in zip(vit.blocks, blocks, strict=True))
    assert list(vit.state_dict()) == keys
    assert torch.equal(vit(x), expected)
    assert evit_ext.remove(vit) is vit
    evit_ext.apply(vit, 0.5)


def test_remove_keeps_what_happened_in_between(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(attn_drop_rate=0.1), 0.5)
    vit.train().double()
    vit.blocks[1].mlp = torch.nn.Identity()
    with torch.no_grad():
        vit.blocks[2].norm1.weight.zero_()
    evit_ext.remove(vit)
    assert all(module.training for module in vit.modules())
    assert isinstance(vit.blocks[1].mlp, torch.nn.Identity)
    assert vit.blocks[2].norm1.weight.abs().sum() == 0
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float64}
    vit(images(dtype=torch.float64))


def test_set_keep_rate(small_vit: Any, device: torch.device) -> None:
    vit, x = evit_ext.apply(small_vit().to(device), 0.5), images().to(device)
    assert evit_ext.set_keep_rate(vit, 0.8) is vit
    assert torch.equal(vit(x), evit_ext.apply(_fresh(vit), 0.8)(x))
    evit_ext.set_keep_rate(vit, (0.9, 1, 0.25))
    assert [block.keep_rate for block in vit.blocks[1:]] == [0.9, 1.0, 0.25]
    assert "rule=EViT(keep_rate=0.25, fuse_token=True), num_prefix_tokens=1" in repr(vit)


def _fresh(vit: Any) -> Any:
    return evit_ext.remove(copy.deepcopy(vit))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep_rate": 0}, ValueError, r"keep_rate must be in \(0, 1\], got 0"),
        ({"keep_rate": 1.01}, ValueError, "got 1.01"),
        ({"keep_rate": float("nan")}, ValueError, "got nan"),
        ({"keep_rate": "0.7"}, TypeError, "must be a number in .*, got '0.7'"),
        ({"keep_rate": True}, TypeError, "got True"),
        ({"keep_rate": (0.5, 0.7)}, ValueError, "one number or 3, one for each reorganising block, got 2"),
        ({"keep_rate": (0.5, 0.7, -1)}, ValueError, "got -1"),
        ({"drop_loc": (1, 4)}, ValueError, r"must be in \[0, 4\), the model's blocks, got \(1, 4\)"),
        ({"drop_loc": (-1, 2)}, ValueError, r"got \(-1, 2\)"),
        ({"drop_loc": (2, 1)}, ValueError, r"must be ascending, without repetition, got \(2, 1\)"),
        ({"drop_loc": (1, 1)}, ValueError, r"got \(1, 1\)"),
        ({"drop_loc": ()}, ValueError, "got none"),
        ({"drop_loc": 3}, TypeError, "must be a sequence of block numbers.*got 3"),
        ({"drop_loc": (1, 2.0)}, TypeError, r"got \(1, 2.0\)"),
        ({"drop_loc": "123"}, TypeError, "got '123'"),
    ],
)
def test_argument_errors(
    small_vit: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    vit = small_vit()
    blocks = list(vit.blocks)
    with pytest.raises(error, match=message):
        evit_ext.apply(vit, **arguments)
    assert all(a is b for a, b in zip(vit.blocks, blocks, strict=True))


def test_numbers_of_other_kinds(small_vit: Any) -> None:
    np = pytest.importorskip("numpy")
    vit = evit_ext.apply(small_vit(), np.float32(0.5), drop_loc=np.array([1, 3]))
    assert [type(block.keep_rate) for block in vit.blocks if hasattr(block, "keep_rate")] == [float, float]
    evit_ext.apply(small_vit(), 1, drop_loc=range(2))


def test_twice(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit())
    with pytest.raises(ValueError, match="set_keep_rate, or call evit_ext.remove first"):
        evit_ext.apply(vit, drop_loc=[0])


def test_set_keep_rate_errors(small_vit: Any) -> None:
    vit = small_vit()
    with pytest.raises(ValueError, match="VisionTransformer has no block .* call evit_ext.apply first"):
        evit_ext.set_keep_rate(vit, 0.7)
    evit_ext.apply(vit, 0.6)
    with pytest.raises(ValueError, match="got 2"):
        evit_ext.set_keep_rate(vit, 2)
    with pytest.raises(ValueError, match="got 4"):
        evit_ext.set_keep_rate(vit, (0.5, 0.5, 0.5, 0.5))
    assert {block.keep_rate for block in vit.blocks[1:]} == {0.6}


def test_models_that_cannot_be_supported(small_vit: Any) -> None:
    def refuse(model: Any, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            evit_ext.apply(model)

    refuse("deit_small", "must be a vision transformer, a torch module, got str", TypeError)
    refuse(torch.nn.Linear(2, 2), "Linear is not supported: expected a vision transformer with its blocks")
    wrapped = torch.nn.Module()
    wrapped.module = small_vit()
    refuse(wrapped, r"pass the model inside the wrapper \(.module\)")
    for attribute in ("model", "trunk"):
        wrapped = torch.nn.Module()
        setattr(wrapped, attribute, small_vit())
        refuse(wrapped, rf"pass the model inside the wrapper \(.{attribute}\)")
    prefix = "block 1 is a timm.models.vision_transformer"
    refuse(small_vit(block_fn=ParallelScalingBlock), f"{prefix}.ParallelScalingBlock, which is not supported")
    refuse(small_vit(block_fn=ParallelThingsBlock), f"{prefix}.ParallelThingsBlock, which is not supported")
    refuse(
        evit_ext.models.dynamicvit_tiny(weight_init="skip"), "it drops tokens itself, by the rule dynamicvit"
    )
    silent = torch.nn.Module()
    silent.blocks = small_vit().blocks
    refuse(silent, "does not tell the number of its prefix tokens")

    class Scaled(Attention):
        pass

    vit = small_vit()
    vit.blocks[3].attn = Scaled(24, 2)
    expected = "the attention of block 3 is a test_applying.Scaled, which is not supported: expected timm.lay"
    refuse(vit, expected)
    assert not any(isinstance(block, ReorganizingBlock) for block in vit.blocks)


def test_copies_are_independent(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), 0.5)
    expected = vit(images())
    copied = copy.deepcopy(vit)
    file = io.BytesIO()
    torch.save(vit, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    unpickled = pickle.loads(pickle.dumps(vit))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    for other in (copied, loaded, unpickled):
        assert torch.equal(other(images()), expected)
        # The original block of a copy holds the copy's parameters, not those of the model it came from.
        evit_ext.set_keep_rate(other, 1.0)
        full = other(images())
        evit_ext.remove(other)
        assert not any(isinstance(module, ReorganizingBlock) for module in other.modules())
        assert torch.equal(other(images()), full)
        assert full.abs().sum() > 0


def test_blocks_that_are_compiled(small_vit: Any) -> None:
    """A compiled call is bound to one object: it must not go along to another."""
    x = images()
    vit = small_vit()
    expected = vit(x)
    reduced = evit_ext.apply(copy.deepcopy(vit), 0.5)(x)
    for block in vit.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(evit_ext.apply(vit, 0.5)(x), reduced)
    for block in vit.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(vit(x), reduced)
    copied = copy.deepcopy(vit)
    pickle.dumps(vit)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert copied(x).abs().sum() == 0
    torch.testing.assert_close(evit_ext.remove(vit)(x), expected)


def test_a_compiled_model(small_vit: Any) -> None:
    vit = small_vit()
    with pytest.raises(ValueError, match=r"the model is compiled: pass the one inside \(._orig_mod\)"):
        evit_ext.apply(torch.compile(vit))
    compiled = torch.compile(evit_ext.apply(vit, 0.5), backend="eager")
    evit_ext.set_keep_rate(compiled, 0.6)
    assert vit.blocks[1].keep_rate == 0.6
    evit_ext.remove(compiled)
    assert not any(isinstance(block, ReorganizingBlock) for block in vit.blocks)
    assert "forward_intermediates" not in vit.__dict__


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_remove_where_the_reorganising_blocks_are_gone(name: str) -> None:
    vit = timm.create_model(name, depth=4, embed_dim=24, num_heads=2)
    attributes = set(vit.__dict__) | set(vit._modules)
    evit_ext.apply(vit, 0.6, [2])
    vit.prune_intermediate_layers([0])
    with pytest.raises(ValueError, match="or call evit_ext.remove first"):
        evit_ext.apply(vit, 0.6, [0])
    evit_ext.remove(vit)
    assert set(vit.__dict__) | set(vit._modules) <= attributes | {"norm", "fc_norm", "head"}
    evit_ext.remove(evit_ext.apply(vit, 0.6, [0]))


def test_attributes_deleted_and_added_in_between(small_vit: Any) -> None:
    vit = small_vit()
    vit.blocks[1].note = "old"
    evit_ext.apply(vit, 0.6)
    del vit.blocks[1].note
    vit.blocks[2].note = "new"
    evit_ext.remove(vit)
    assert not hasattr(vit.blocks[1], "note") and vit.blocks[2].note == "new"


def test_blocks_with_a_forward_or_a_class_of_their_own(small_vit: Any) -> None:
    vit = small_vit()
    vit.blocks[1].forward = lambda x: x
    with pytest.raises(ValueError, match="block 1 has a forward of its own"):
        evit_ext.apply(vit, 0.6)
    vit = evit_ext.apply(small_vit(), 0.6)

    class Sharded(type(vit.blocks[1])):  # type: ignore[misc]
        pass

    vit.blocks[1].__class__ = Sharded
    with pytest.raises(RuntimeError, match="block 1 became a Sharded after evit_ext.apply"):
        evit_ext.remove(vit)


def test_a_model_goes_when_nobody_wants_it(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), 0.6)
    vit(images())
    gone = weakref.ref(vit)
    method = vit.forward_intermediates
    del vit
    gc.collect()
    method(images())  # which keeps its model, as any method does
    del method
    gc.collect()
    assert gone() is None
