"""resize_position_embedding against the definition of bicubic interpolation, written out in the oracle."""

from __future__ import annotations

import pytest
import torch
from slow_evit import slow_bicubic
from timm.layers import resample_abs_pos_embed

from evit_ext.models.position_embedding import resize_position_embedding


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 3])
@pytest.mark.parametrize("new_grid", [(18, 18), (10, 10), (14, 20), (9, 15), (1, 1)])
def test_agrees_with_the_definition(
    new_grid: tuple[int, int], num_prefix_tokens: int, device: torch.device
) -> None:
    embedding = torch.randn(1, num_prefix_tokens + 14 * 14, 6, dtype=torch.float64, device=device)
    resized = resize_position_embedding(embedding, (14, 14), new_grid, num_prefix_tokens)
    assert torch.equal(resized[:, :num_prefix_tokens], embedding[:, :num_prefix_tokens])
    expected = slow_bicubic(embedding[0, num_prefix_tokens:], *new_grid)
    torch.testing.assert_close(resized[0, num_prefix_tokens:], expected, rtol=1e-12, atol=1e-13)


def test_is_not_what_timm_does() -> None:
    embedding = torch.randn(1, 197, 6)
    ours = resize_position_embedding(embedding, (14, 14), (18, 18))
    assert (ours - resample_abs_pos_embed(embedding, [18, 18])).abs().max() > 0.01


def test_equal_grids_return_the_embedding_itself(device: torch.device) -> None:
    embedding = torch.randn(1, 13, 6, device=device)
    assert resize_position_embedding(embedding, (3, 4), (3, 4)) is embedding
    # As many patches in another shape are another grid.
    assert not torch.equal(resize_position_embedding(embedding, (3, 4), (4, 3)), embedding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    embedding = torch.randn(1, 17, 6, device=device).to(dtype)
    resized = resize_position_embedding(embedding, (4, 4), (6, 5))
    assert resized.dtype == dtype and resized.shape == (1, 31, 6)
    exact = resize_position_embedding(embedding.double(), (4, 4), (6, 5))
    torch.testing.assert_close(resized.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_gradient(device: torch.device) -> None:
    embedding = torch.randn(1, 10, 2, dtype=torch.float64, device=device, requires_grad=True)
    # PyTorch's interpolation sums its gradient in any order on a GPU.
    assert torch.autograd.gradcheck(
        lambda e: resize_position_embedding(e, (3, 3), (4, 5)), embedding, nondet_tol=1e-12
    )


def test_wrong_grid() -> None:
    with pytest.raises(
        ValueError, match=r"\[1, 10, C\] for 1 prefix tokens and a grid of 3 × 3, got \(1, 9, 2\)"
    ):
        resize_position_embedding(torch.randn(1, 9, 2), (3, 3), (4, 4))
