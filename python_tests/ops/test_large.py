"""Offsets beyond 2**31 elements. Slow: needs about 10 GiB of memory; run with `pytest -m slow`."""

from __future__ import annotations

import pytest
import torch

from evit_ext import ops

pytestmark = pytest.mark.slow

CHANNELS = 1024
TOKENS = 2**31 // CHANNELS + 5


def test_tokens_beyond_2_to_the_31() -> None:
    x = torch.zeros(1, TOKENS, CHANNELS, dtype=torch.bfloat16)
    x[0, -3:] = torch.tensor([1.0, 2.0, 3.0]).bfloat16().unsqueeze(-1)
    index = torch.tensor([[TOKENS - 1, 0, TOKENS - 3]])
    assert ops.gather_tokens(x, index)[0, :, 5].tolist() == [3.0, 0.0, 1.0]
    weights = torch.ones(1, TOKENS)
    assert ops.fuse_tokens(x, weights, index)[0, -1].item() == 4.0
    scores = torch.zeros(1, TOKENS)
    scores[0, -2] = 1.0
    scores[0, -1] = 0.5
    tokens, kept = ops.reorganize_tokens(x, scores, 1)
    assert kept.item() == TOKENS - 3
    assert tokens[0, :, -1].tolist() == [0.0, 2.0, 1.5]
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16).expand(x.shape)
    tokens, normed, kept = ops.add_reorganize_norm(x, one, scores, 1)
    assert kept.item() == TOKENS - 3
    assert tokens[0, :, -1].tolist() == [1.0, 3.0, 2.0]
    assert normed.eq(0).all()


def test_a_result_beyond_2_to_the_31() -> None:
    ones = torch.ones(1, 2, CHANNELS, dtype=torch.bfloat16)
    out = ops.scatter_tokens(ones, torch.tensor([[TOKENS - 1, TOKENS - 1]]), TOKENS)
    assert out[0, -1, -1].item() == 2.0 and out[0, -2].eq(0).all()


def test_restored_tokens_beyond_2_to_the_31() -> None:
    tokens = torch.tensor([3.0, 4.0, 0.5]).bfloat16().view(1, 3, 1).expand(-1, -1, CHANNELS)
    kept = torch.tensor([[0, TOKENS - 2]])
    out = ops.restore_tokens(tokens, kept, TOKENS, 0)
    assert out[0, [0, 1, -3, -2, -1], -1].tolist() == [3.0, 0.5, 0.5, 4.0, 0.5]
    out[0, 1:-2] = 0.0
    grad = torch.ops.evit.restore_tokens_backward(out, kept, 3, 0, True)
    assert grad[0, :, -1].tolist() == [3.0, 4.0, 0.5]


def test_keys_beyond_2_to_the_31() -> None:
    # One token a batch entry of a keys tensor whose rows lie far apart.
    storage = torch.zeros(3, 2**30, dtype=torch.bfloat16)
    k = storage[:, :8].view(3, 1, 2, 4)
    k[2, 0, 1] = 4.0
    scores = ops.class_attention(torch.ones(3, 1, 4, dtype=torch.bfloat16), k)
    assert scores[:2].eq(0.5).all() and scores[2, 1] > 0.99
