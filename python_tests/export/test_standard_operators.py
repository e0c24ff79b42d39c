"""The operators in standard operators, against the reference, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evit_ext.export import standard_operators
from evit_ext.ops import reference


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES = list(itertools.product((1, 3), (1, 4, 9), (0, 1, 3), (True, False), (True, False)))


@pytest.mark.parametrize(("batch", "num_keep", "prefix", "fuse", "all_scores"), CASES)
def test_reorganize_tokens(batch: int, num_keep: int, prefix: int, fuse: bool, all_scores: bool) -> None:
    x = drawn(batch, prefix + 9, 5)
    scores = drawn(batch, prefix + 9 if all_scores else 9)
    arguments = (x, scores, num_keep, prefix, fuse)
    tokens, kept = standard_operators.reorganize_tokens(*arguments)
    expected, expected_kept = reference.reorganize_tokens(*arguments)
    assert torch.equal(kept, expected_kept)
    moved = prefix + num_keep  # what is moved is moved bit by bit; the fused token is a sum
    assert torch.equal(tokens[:, :moved], expected[:, :moved])
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-6)


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    _, kept = standard_operators.reorganize_tokens(drawn(2, 7, 3), scores, 4)
    assert kept.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("affine", [True, False])
def test_add_reorganize_norm(affine: bool) -> None:
    x, branch, scores = drawn(2, 9, 6), drawn(2, 9, 6) * 2, drawn(2, 9)
    weight, bias = (drawn(6), drawn(6) + 1) if affine else (None, None)
    arguments = (x, branch, scores, 4, weight, bias, 1e-3, 2)
    for found, expected in zip(
        standard_operators.add_reorganize_norm(*arguments),
        reference.add_reorganize_norm(*arguments),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_mean_attention() -> None:
    q, k = drawn(2, 3, 5, 4), drawn(2, 3, 7, 4)
    for scale in (0.5, -1.7):
        expected = reference.mean_attention(q, k, scale)
        torch.testing.assert_close(standard_operators.mean_attention(q, k, scale), expected)


def test_class_attention() -> None:
    q, k = drawn(2, 3, 4), drawn(2, 3, 7, 4)
    for scale in (0.5, 1.7):
        expected = reference.class_attention(q, k, scale)
        torch.testing.assert_close(standard_operators.class_attention(q, k, scale), expected)


def test_gather_tokens() -> None:
    x, index = drawn(3, 5, 4), torch.tensor([[4, 0], [1, 1], [2, 3]])
    assert torch.equal(standard_operators.gather_tokens(x, index), reference.gather_tokens(x, index))


def test_scatter_tokens() -> None:
    x, index = drawn(3, 4, 5), torch.tensor([[4, 0, 4, 4], [1, 1, 0, 2], [2, 3, 1, 0]])
    expected = reference.scatter_tokens(x, index, 6)
    torch.testing.assert_close(standard_operators.scatter_tokens(x, index, 6), expected)


def test_merge_tokens() -> None:
    # One owner has a token alone, one has none.
    x, owner = drawn(2, 7, 4), torch.tensor([[0, 2, 2, 1, 2], [3, 3, 0, 0, 0]])
    weights = torch.tensor([[0.0, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    found = standard_operators.merge_tokens(x, owner, weights, 4, 2)
    for actual, expected in zip(found, reference.merge_tokens(x, owner, 4, weights, 2), strict=True):
        torch.testing.assert_close(actual, expected)
    assert torch.equal(found[0][0, 2], x[0, 2])


@pytest.mark.parametrize("num_tokens", [2, 3, 16, 33])
def test_bipartite_matching(num_tokens: int) -> None:
    keys = drawn(3, 2, num_tokens, 5)
    for num_out in range(num_tokens - num_tokens // 2, num_tokens):
        found = standard_operators.bipartite_matching(keys, num_out)
        for actual, expected in zip(found, reference.bipartite_matching(keys, num_out), strict=True):
            assert torch.equal(actual, expected)


def test_every_operator_has_the_names_of_its_arguments() -> None:
    """A program calls them by position or by name, as the operator's schema has them."""
    for operator, function in standard_operators.decompositions().items():
        names = [argument.name for argument in operator._schema.arguments]
        assert list(function.__code__.co_varnames[: function.__code__.co_argcount]) == names


class Reorganize(torch.nn.Module):
    """The operator as a model of tokens and scores in one tensor [B, N, C + 1]."""

    def forward(self, both: Tensor) -> Tensor:
        from evit_ext import ops

        tokens, kept = ops.reorganize_tokens(both[:, :, :-1], both[:, :, -1], 4)
        return torch.cat([tokens[:, 1:5], kept.unsqueeze(2).to(tokens.dtype)], dim=2)


def test_ties_in_onnx_runtime(tmp_path: Path, onnx: Any) -> None:
    from evit_ext.export.metadata import Metadata
    from evit_ext.export.onnx_file import onnx_model, runner, write_onnx
    from evit_ext.export.program import capture

    both = drawn(5, 11, 4)
    # Equal ones among the kept and the others, in several places and numbers.
    both[:, :, -1] = torch.randint(0, 3, (5, 11), generator=torch.Generator().manual_seed(0)).float()
    both[0, :, -1], both[1, :, -1] = 0.0, -torch.arange(11.0) // 3
    program = capture(Reorganize(), both, None)
    metadata = Metadata("reorganize", (), (1,), (), (), "", 1.0)
    write_onnx(onnx_model(program), tmp_path / "ties.onnx", metadata)
    run = runner(tmp_path / "ties.onnx")
    assert torch.equal(run(both), Reorganize()(both))
    assert torch.equal(run(both[:1]), Reorganize()(both[:1]))
