"""The projection of the patches as a product."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from cpu_calls import Build
from torch import Tensor, nn

import evit_ext
from evit_ext.cpu import forward as cpu_forward
from evit_ext.cpu import patch_projection

pytestmark = pytest.mark.skipif(
    not cpu_forward.SUPPORTED, reason="the portable kernels are not used in models: they are no faster"
)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The patches that were multiplied as such."""
    seen: list[Tensor] = []
    product = patch_projection.product

    def keep(x: Tensor, *arguments: Any) -> Tensor:
        seen.append(x)
        return product(x, *arguments)

    monkeypatch.setattr(patch_projection, "product", keep)
    return seen


def images(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size or (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 3, 32, 32), (1, 3, 37, 47), (2, 3, 8, 8)], ids=str)
def test_the_same_as_the_convolution(
    small_vit: Build, products: list[Tensor], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    if dtype not in cpu_forward._LINEAR_DTYPES:
        pytest.skip(f"oneDNN does not multiply {dtype} here")
    convolution = evit_ext.apply(small_vit(), 0.7).patch_embed.proj.to(dtype)
    x = images(*size, dtype=dtype)
    with torch.no_grad():
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.repeat(1, 1, 1, 2)[..., ::2]):
            out = convolution(given)
            exact = copy.deepcopy(convolution).double()(given.double())
            assert out.dtype == dtype and out.shape == exact.shape
            # Measured: 3e-7 and 3e-3 of the largest.
            off = (out.double() - exact).abs().max() / exact.abs().max()
            assert off < {torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]
    assert len(products) == 3
    tokens = out.flatten(2).transpose(1, 2)
    assert tokens.is_contiguous()  # as the model wants them, without a copy


def test_only_without_gradients_and_below_keep_rate_1(small_vit: Build, products: list[Tensor]) -> None:
    dense = small_vit()
    with torch.no_grad():
        expected = dense.patch_embed(images())
    vit = evit_ext.apply(copy.deepcopy(dense), 1.0)
    with torch.no_grad():
        assert torch.equal(vit.patch_embed(images()), expected) and not products
        evit_ext.set_keep_rate(vit, 0.7)
        torch.testing.assert_close(vit.patch_embed(images()), expected, rtol=1e-5, atol=1e-6)
    assert len(products) == 1
    assert vit.patch_embed(images()).requires_grad and len(products) == 1
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert vit.patch_embed(images()).dtype == torch.bfloat16 and len(products) == 1
    evit_ext.remove(vit)
    with torch.no_grad():
        assert torch.equal(vit.patch_embed(images()), expected) and len(products) == 1


def test_hooks_run_around_it(small_vit: Build, products: list[Tensor]) -> None:
    vit = evit_ext.apply(small_vit(), 0.7)
    seen = []
    vit.patch_embed.proj.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)))
    with torch.no_grad():
        vit(images())
    assert seen == [(2, 24, 4, 4)] and len(products) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"groups": 3},
        {"stride": 4},
        {"dilation": 2, "stride": 8},
        {"padding": "same", "stride": 1},
    ],
    ids=str,
)
def test_other_convolutions(small_vit: Build, products: list[Tensor], settings: dict[str, Any]) -> None:
    """Also if they became so after apply."""
    vit = evit_ext.apply(small_vit(), 0.7)
    other = nn.Conv2d(3, 24, 8, **{"stride": 8, **settings})
    convolution = vit.patch_embed.proj
    convolution.__dict__.update({name: getattr(other, name) for name in ("padding", "groups", "stride")})
    convolution.__dict__.update(dilation=other.dilation, _parameters=other._parameters)
    convolution._reversed_padding_repeated_twice = other._reversed_padding_repeated_twice
    with torch.no_grad():
        assert torch.equal(convolution(images()), other(images()))
    assert not products


def test_packed_weights_follow_the_layer(small_vit: Build, products: list[Tensor]) -> None:
    vit = evit_ext.prepack(evit_ext.apply(small_vit(), 0.7))
    with torch.no_grad():
        before = vit.patch_embed(images())
        vit.patch_embed.proj.weight.mul_(2)
        vit.patch_embed.proj.bias.zero_()
        after = vit.patch_embed(images())
        expected = nn.Conv2d.forward(vit.patch_embed.proj, images()).flatten(2).transpose(1, 2)
    assert len(products) == 2 and not torch.equal(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_other_code_makes_of_it(
    small_vit: Build, products: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Subclasses, pruning, plain tensors and patched methods: each computes as it does with gradients."""

    def check(changed: str) -> None:
        products.clear()
        with torch.no_grad():
            out = convolution(images())
        assert torch.equal(out, convolution(images())) and not products, changed

    def double(self: Any, *given: Any) -> Tensor:
        return 2 * original(self, *given)

    vit = evit_ext.apply(small_vit(), 0.7)
    convolution: Any = vit.patch_embed.proj
    expected = 2 * convolution(images())
    original = nn.Conv2d._conv_forward
    with monkeypatch.context() as patched:
        patched.setattr(nn.Conv2d, "_conv_forward", double)
        check("the method of the class")
    convolution._conv_forward = lambda *given: double(convolution, *given)
    check("the method of the object")
    torch.testing.assert_close(convolution(images()), expected)
    del convolution._conv_forward
    convolution.__class__ = Twice
    check("the class")
    torch.testing.assert_close(convolution(images()), expected)
    evit_ext.set_keep_rate(vit, 1.0)
    check("the class at keep rate 1")
    evit_ext.remove(vit)
    assert "forward" not in convolution.__dict__
    convolution.__class__ = nn.Conv2d
    evit_ext.apply(vit, 0.7)
    torch.nn.utils.prune.l1_unstructured(convolution, "weight", 0.5)
    check("pruning")
    torch.nn.utils.prune.remove(convolution, "weight")
    weight = convolution.weight.detach()
    del convolution.weight
    convolution.weight = weight
    check("a plain tensor")


def test_keep_rate_1_after_a_parametrization(small_vit: Build, products: list[Tensor]) -> None:
    """While it has one, its class is another."""
    vit = evit_ext.apply(small_vit(), 0.7)
    parametrize = torch.nn.utils.parametrize
    parametrize.register_parametrization(vit.patch_embed.proj, "weight", nn.Identity())
    evit_ext.set_keep_rate(vit, 1.0)
    parametrize.remove_parametrizations(vit.patch_embed.proj, "weight")
    with torch.no_grad():
        vit(images())
    assert not products


def test_errors_are_pytorchs(small_vit: Build, products: list[Tensor]) -> None:
    convolution = evit_ext.apply(small_vit(), 0.7).patch_embed.proj
    with torch.no_grad():
        for wrong, message in (
            (images(2, 1, 32, 32), "to have 3 channels"),
            (images(2, 3, 4, 32), "Kernel size can't be greater"),
        ):
            with pytest.raises(RuntimeError, match=message):
                convolution(wrong)
        assert convolution(images(3, 32, 32)).shape == (24, 4, 4)  # an image without a batch
    assert not products
