"""Tests of evit_ext.ops.bipartite_matching."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_tester import DTYPES, awkward_strides, random_examples
from torch import Tensor

from evit_ext import ops


def make(batch: int, heads: int, tokens: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, tokens, channels, dtype=torch.float64, generator=generator)


def slow(keys: Tensor, num_out: int) -> tuple[list[int], list[int]]:
    """Of one image, keys [N, D] averaged over heads: with lists, one pair after the other."""
    unit = (keys / keys.norm(dim=1, keepdim=True)).tolist()
    best = {}
    for i in range(0, len(unit), 2):
        if len(unit) == 1:
            break
        cosines = [sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) for j in range(1, len(unit), 2)]
        largest = max(range(len(cosines)), key=lambda j: cosines[j])
        best[i] = (cosines[largest], 2 * largest + 1)
    goes = sorted(best, key=lambda i: -best[i][0])[: len(unit) - num_out]
    kept = [n for n in range(len(unit)) if n not in goes]
    return kept, [kept.index(best[n][1] if n in goes else n) for n in range(len(unit))]


@random_examples(60)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 4),
    tokens=st.integers(1, 70),
    channels=st.integers(2, 70),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    device: torch.device, batch: int, heads: int, tokens: int, channels: int, share: float, seed: int
) -> None:
    keys = make(batch, heads, tokens, channels, seed)
    num_out = tokens - round(share * (tokens // 2))
    kept, owner = ops.bipartite_matching(keys.to(device), num_out)
    for b in range(batch):
        assert (kept[b].tolist(), owner[b].tolist()) == slow(keys[b].mean(dim=0), num_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device: torch.device, dtype: torch.dtype) -> None:
    for shape, num_out in (
        ((2, 6, 196, 64), 183),
        ((1, 3, 9, 5), 5),
        ((2, 12, 576, 64), 400),
        ((2, 1, 2, 2), 1),
    ):
        keys = make(*shape).to(dtype)
        # The closest cosines of these differ by more than what is rounded.
        expected = ops.reference.bipartite_matching(keys.double(), num_out)
        for actual, wanted in zip(ops.bipartite_matching(keys.to(device), num_out), expected, strict=True):
            assert torch.equal(actual.cpu(), wanted) and actual.dtype == torch.int64


@pytest.mark.parametrize("function", [ops.bipartite_matching, ops.reference.bipartite_matching])
def test_ties_and_no_numbers(device: torch.device, function) -> None:  # type: ignore[no-untyped-def]
    same = torch.ones(1, 2, 9, 4, device=device)
    kept, owner = function(same, 6)
    assert owner.tolist() == [[0, 0, 0, 1, 0, 2, 3, 4, 5]]  # 0, 2 and 4 become part of 1
    assert kept.tolist() == [[1, 3, 5, 6, 7, 8]]
    with_nan = torch.tensor([1.0, 1, -1, 1, float("nan"), 1, 1], device=device).view(1, 1, 7, 1)
    kept, owner = function(with_nan, 6)
    assert kept.tolist() == [[0, 1, 2, 3, 5, 6]] and owner[0, 4] == 1  # the largest, and of these the first
    no_direction = torch.zeros(1, 2, 4, 3, device=device)
    kept, owner = function(no_direction, 2)
    assert kept.tolist() == [[1, 3]] and owner.tolist() == [[0, 0, 0, 1]]


def test_any_strides_and_threads(device: torch.device) -> None:
    keys = make(2, 3, 40, 24).float().to(device)
    expected = ops.bipartite_matching(keys, 25)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for name, strided in [("dense", keys), *awkward_strides(keys)]:
                for a, b in zip(ops.bipartite_matching(strided, 25), expected, strict=True):
                    assert torch.equal(a, b), f"{name}, {count} threads"
    finally:
        torch.set_num_threads(threads)


def test_has_no_gradient(device: torch.device) -> None:
    keys = make(2, 3, 10, 4).to(device).requires_grad_()
    assert not any(t.requires_grad for t in ops.bipartite_matching(keys, 6))


def test_autocast_changes_nothing(device: torch.device) -> None:
    keys = make(2, 3, 40, 24).float().to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = ops.bipartite_matching(keys, 25)
    assert all(torch.equal(a, b) for a, b in zip(inside, ops.bipartite_matching(keys, 25), strict=True))


def test_all_stay(device: torch.device) -> None:
    keys = make(2, 3, 5, 4).to(device)
    for tensor in ops.bipartite_matching(keys, 5):
        assert torch.equal(tensor.cpu(), torch.arange(5).repeat(2, 1))


def test_opcheck_compile_and_export(device: torch.device) -> None:
    keys = make(2, 3, 10, 4).float().to(device)
    torch.library.opcheck(torch.ops.evit.bipartite_matching, (keys, 6))
    torch._dynamo.reset()
    compiled = torch.compile(ops.bipartite_matching, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 1, 5):
        more = make(batch, 3, 10, 4).float().to(device)
        for a, b in zip(compiled(more, 6), ops.bipartite_matching(more, 6), strict=True):
            assert torch.equal(a, b)

    class Module(torch.nn.Module):
        def forward(self, keys: Tensor) -> tuple[Tensor, Tensor]:
            return ops.bipartite_matching(keys, 6)

    program = torch.export.export(
        Module(), (keys,), dynamic_shapes={"keys": {0: torch.export.Dim("batch", min=1)}}
    )
    more = make(7, 3, 10, 4).float().to(device)
    for a, b in zip(program.module()(more), ops.bipartite_matching(more, 6), strict=True):
        assert torch.equal(a, b)


def test_meta_tensors() -> None:
    for tensor, shape in zip(
        ops.bipartite_matching(make(2, 3, 10, 4).to("meta"), 6), ((2, 6), (2, 10)), strict=True
    ):
        assert (tensor.shape, tensor.dtype, tensor.device.type) == (shape, torch.int64, "meta")


def test_errors(device: torch.device) -> None:
    keys = make(2, 3, 9, 4).to(device)
    for function in (ops.bipartite_matching, ops.reference.bipartite_matching):
        with pytest.raises(ValueError, match=r"num_out must be in \[5, 9\] for 9 tokens.*got 4"):
            function(keys, 4)
        with pytest.raises(ValueError, match=r"num_out must be in \[5, 9\] for 9 tokens.*got 10"):
            function(keys, 10)
        with pytest.raises(TypeError, match="num_out must be an int, got float"):
            function(keys, 6.0)
        with pytest.raises(ValueError, match=r"keys must have shape \[B, H, N, D\], got \(2, 3, 9\)"):
            function(keys[..., 0], 6)
        with pytest.raises(ValueError, match="keys must have at least one head and channel"):
            function(keys[:, :0], 6)
        with pytest.raises(TypeError, match="keys must be float32.*got torch.int64"):
            function(keys.long(), 6)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=r"num_out must be in \[5, 9\)"):
            torch.ops.evit.bipartite_matching(keys, 9)
        with pytest.raises(RuntimeError, match="keys must have at least one head and channel"):
            torch.ops.evit.bipartite_matching(keys[:, :0], 6)
