"""timm's ``Block`` as a whole: it computes the same, and stands back for whatever else is in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_calls import FAST, Build, Calls, images, watch_class
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, DropPath, LayerScale
from torch import nn

import evit_ext
from evit_ext.cpu import forward as cpu_forward
from evit_ext.cpu.known import KNOWN

pytestmark = pytest.mark.skipif(
    not cpu_forward.SUPPORTED, reason="the portable kernels are not used in models: they are no faster"
)

#: Of the model's four blocks the third reorganises; the others add both branches where the products end.
WHOLE = 6


@pytest.fixture
def vit(small_vit: Build) -> Any:
    return evit_ext.apply(small_vit(), 0.7, drop_loc=(2,))


def test_blocks_are_computed_as_a_whole(vit: Any, calls: Calls) -> None:
    out, counted = calls.during(vit, images())
    assert counted == FAST and calls.sums == WHOLE
    with_gradients = vit(images())
    assert calls.sums == WHOLE
    torch.testing.assert_close(out, with_gradients, rtol=0, atol=3e-6 * with_gradients.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_scale(small_vit: Build, calls: Calls, dtype: torch.dtype) -> None:
    """The factors are applied to the branch, not to the sum."""
    if dtype not in cpu_forward._LINEAR_DTYPES:
        pytest.skip(f"oneDNN does not multiply {dtype} here")
    vit = evit_ext.apply(small_vit(init_values=0.5), 0.7, drop_loc=(2,)).to(dtype)
    for number, parameter in enumerate(p for name, p in vit.named_parameters() if "gamma" in name):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    out, counted = calls.during(vit, images(dtype))
    assert counted == FAST and calls.sums == 0
    expected = vit.double()(images().double())
    off = (out.double() - expected).abs().max() / expected.abs().max()
    # Measured: 2e-7 and 0.011.
    assert off < {torch.float32: 2e-6, torch.bfloat16: 0.04}[dtype]


def test_tokens_of_other_strides(vit: Any, calls: Calls) -> None:
    block = vit.blocks[0]
    tokens = torch.randn(2, 24, 17, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    with torch.no_grad():
        out = block(tokens)
        assert calls.sums == 0  # oneDNN would take them as they lie in memory
        assert torch.equal(out, block(tokens.contiguous()))


def test_masks_go_to_timm(vit: Any, calls: Calls) -> None:
    tokens = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(17, 17).index_fill(1, torch.tensor([3]), float("-inf"))
    with torch.no_grad():
        plain = vit.blocks[0](tokens)
        for arguments in ({"attn_mask": mask}, {"is_causal": True}):
            calls.sums = 0
            assert (vit.blocks[0](tokens, **arguments) - plain).abs().max() > 1e-3
            assert calls.sums == 0
        assert torch.equal(vit.blocks[0](tokens, attn_mask=None, is_causal=False), plain)


SEEN: list[str] = []


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: SEEN.append("hook"))


def _hook_before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: SEEN.append("hook before"))


def _forward(module: nn.Module) -> None:
    original = module.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        SEEN.append("forward")
        return original(*arguments, **named)

    module.forward = forward  # type: ignore[method-assign]


def _subclass(module: nn.Module) -> None:
    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        SEEN.append("subclass")
        return kind.forward(self, *arguments, **named)

    kind = type(module)
    module.__class__ = type("Other", (kind,), {"forward": forward})


#: What a block has.
_PARTS = [
    *("norm1", "attn", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.norm", "attn.proj", "attn.proj_drop"),
    *("ls1", "drop_path1", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.norm", "mlp.fc2"),
    *("mlp.drop2", "ls2", "drop_path2"),
]


@pytest.mark.parametrize("change", [_hook, _hook_before, _forward, _subclass], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", _PARTS)
def test_what_is_watched_or_changed_runs(
    vit: Any, calls: Calls, change: Callable[[nn.Module], None], name: str
) -> None:
    """In a block, and in one that reorganises, while the others stay whole."""
    before, _ = calls.during(vit, images())
    for number, whole in ((1, WHOLE - 2), (2, WHOLE - 2)):
        change(vit.get_submodule(f"blocks.{number}.{name}"))
        SEEN.clear()
        out, _ = calls.during(vit, images())
        assert len(SEEN) == number and calls.sums == whole
        torch.testing.assert_close(out, before, rtol=1e-4, atol=1e-5)


def test_a_block_that_is_watched_is_whole(vit: Any, calls: Calls) -> None:
    before, _ = calls.during(vit, images())
    _hook(vit.blocks[1])
    SEEN.clear()
    out, _ = calls.during(vit, images())
    assert SEEN == ["hook"] and calls.sums == WHOLE and torch.equal(out, before)


@pytest.mark.parametrize("kind", [Block, LayerNorm, nn.Dropout, nn.Identity], ids=lambda kind: kind.__name__)
def test_another_forward_of_a_class(
    vit: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    watch_class(monkeypatch, kind, SEEN)
    if kind is Block:  # and a block that reorganises tokens says that it cannot
        evit_ext.set_keep_rate(vit, 0.7)
        with pytest.raises(RuntimeError, match=r"Block.forward was replaced by other code"):
            calls.during(vit, images())
        assert SEEN == ["Block", "Block"] and calls.sums == 0
        return
    calls.during(vit, images())
    assert SEEN and calls.sums == 0


@pytest.mark.parametrize(
    ("name", "module"),
    [("drop_path1", DropPath(0.9)), ("ls2", LayerScale(24, 0.5, inplace=True)), ("ls1", nn.Tanh())],
    ids=["drop path", "in place", "other"],
)
def test_what_only_timms_code_computes(vit: Any, calls: Calls, name: str, module: nn.Module) -> None:
    setattr(vit.blocks[1], name, module)
    _, counted = calls.during(vit, images())
    # Its other layers run through oneDNN one by one.
    assert counted == FAST and calls.sums == WHOLE - 2


def test_a_drop_path_that_drops_nothing(vit: Any, calls: Calls) -> None:
    before, _ = calls.during(vit, images())
    vit.blocks[1].drop_path1 = DropPath(0.9).eval()
    out, _ = calls.during(vit, images())
    assert torch.equal(out, before) and calls.sums == WHOLE


def test_parameters_of_other_dtypes(vit: Any, calls: Calls) -> None:
    """Norms in float32 among tokens in bfloat16 are timm's to compute, or to refuse."""
    vit.bfloat16().blocks[1].norm1.float()
    try:
        calls.during(vit, images(torch.bfloat16))
    except RuntimeError as error:
        assert "dtype" in str(error)
    assert calls.sums <= WHOLE - 2


def test_a_gate(vit: Any, calls: Calls) -> None:
    """timm's attention may multiply its output by one."""
    for block in vit.blocks:
        block.attn.gate = nn.Linear(24, 24)
    out, _ = calls.during(vit, images())
    assert calls.sums == 0
    torch.testing.assert_close(out, vit(images()), rtol=1e-4, atol=1e-5)


class Doubled(nn.Parameter):
    """A parameter whose products are twice as large, as one that is quantised has its own."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        out = super().__torch_function__(function, types, arguments, named or {})
        return 2 * out if function is nn.functional.linear else out


def test_parameters_that_compute_otherwise(vit: Any, calls: Calls) -> None:
    """Also if they become so later."""
    before, _ = calls.during(vit, images())
    vit.blocks[1].mlp.fc1.weight.__class__ = Doubled
    out, _ = calls.during(vit, images())
    assert calls.sums == WHOLE - 2 and (out - before).abs().max() > 1e-3
    torch.testing.assert_close(out, vit(images()), rtol=1e-4, atol=1e-5)


def test_a_layer_of_another_width(vit: Any, calls: Calls) -> None:
    """Which timm's sum broadcasts."""
    calls.during(vit, images())
    vit.blocks[1].mlp.fc2 = nn.Linear(96, 1)
    out, _ = calls.during(vit, images())
    assert calls.sums == WHOLE - 2
    torch.testing.assert_close(out, vit(images()), rtol=1e-4, atol=1e-5)


def test_what_is_known_of_a_block_is_asked_once(vit: Any, calls: Calls) -> None:
    def known() -> list[Any]:
        return [value for block in vit.blocks for value in block.__dict__[KNOWN].found.values()]

    calls.during(vit, images())
    before = known()
    calls.during(vit, images())
    assert len(before) == 8 and all(now is then for now, then in zip(known(), before, strict=True))
    vit.blocks[0].mlp.eval().act.register_forward_hook(lambda *_: None).remove()
    calls.during(vit, images())
    assert sum(now is then for now, then in zip(known(), before, strict=True)) == 8
    vit.blocks[0].mlp.fc1 = nn.Linear(24, 96)
    calls.during(vit, images())
    assert sum(now is then for now, then in zip(known(), before, strict=True)) == 7


@pytest.mark.parametrize("forget", ["remove", "keep rate 1", "copy", "another layer"])
def test_what_is_known_goes(vit: Any, calls: Calls, forget: str) -> None:
    calls.during(vit, images())
    if forget == "copy":
        vit = copy.deepcopy(vit)
    elif forget == "remove":
        evit_ext.remove(vit)
    elif forget == "keep rate 1":
        evit_ext.set_keep_rate(vit, 1.0)
    else:
        for block in vit.blocks:
            block.mlp = nn.Identity()
            block.attn.proj = nn.Sequential(block.attn.proj)
        calls.during(vit, images())
    assert not any(block.__dict__[KNOWN].found for block in vit.blocks if KNOWN in block.__dict__)


def test_replicas_have_their_own_parts(vit: Any, calls: Calls) -> None:
    """nn.DataParallel copies the dictionary of a block, and then gives it other layers."""
    block, tokens = vit.blocks[0], torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = block(tokens)
        replica = block._replicate_for_data_parallel()
        replica._modules["mlp"] = copy.deepcopy(block.mlp)
        replica.mlp.fc2.weight.zero_()
        assert not torch.equal(replica(tokens), before)
        assert torch.equal(block(tokens), before)
