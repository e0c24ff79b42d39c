"""Offsets beyond 2**31 elements on a GPU. Slow: needs 24 GiB of its memory; run with `pytest -m slow`."""

from __future__ import annotations

import pytest
import torch

from evit_ext import ops

GIB_NEEDED = 24


def reason_not_to_run() -> str:
    if not torch.cuda.is_available():
        return "CUDA: torch.cuda.is_available() is False"
    free = torch.cuda.mem_get_info()[0] / 2**30
    return "" if free >= GIB_NEEDED else f"CUDA: {GIB_NEEDED} GiB are needed, {free:.0f} GiB are free"


pytestmark = pytest.mark.slow

CHANNELS = 1024
TOKENS = 2**31 // CHANNELS + 5


@pytest.fixture(autouse=True)
def enough_memory() -> None:
    """Asked here and not when the tests are collected: that would start CUDA where they are not wanted."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    reason = reason_not_to_run()
    if reason:
        pytest.skip(reason)


def test_one_entry_beyond_2_to_the_31() -> None:
    x = torch.zeros(1, TOKENS, CHANNELS, dtype=torch.bfloat16, device="cuda")
    x[0, -3:] = torch.tensor([1.0, 2.0, 3.0], device="cuda").bfloat16().unsqueeze(-1)
    index = torch.tensor([[TOKENS - 1, 0, TOKENS - 3]], device="cuda")
    assert ops.gather_tokens(x, index)[0, :, 5].tolist() == [3.0, 0.0, 1.0]
    assert ops.fuse_tokens(x, torch.ones(1, TOKENS, device="cuda"), index)[0, -1].item() == 4.0
    scores = torch.zeros(1, TOKENS, device="cuda")
    scores[0, -2], scores[0, -1] = 1.0, 0.5
    tokens, kept = ops.reorganize_tokens(x, scores, 1)
    assert kept.item() == TOKENS - 3
    assert tokens[0, :, -1].tolist() == [0.0, 2.0, 1.5]


def test_a_batch_beyond_2_to_the_31() -> None:
    """Inputs, results and gradients are each larger than 2**31 elements."""
    tokens, keep = 4, 2
    batch = 2**31 // (tokens * CHANNELS) + 3
    x = torch.zeros(batch, tokens, CHANNELS, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(1.0, 5.0, device="cuda").unsqueeze(-1)
    scores = torch.tensor([0.25, 2.0, 1.0], device="cuda").expand(batch, -1)
    x.requires_grad_()
    out, kept = ops.reorganize_tokens(x, scores, keep)
    assert out.numel() > 2**31 and kept[-1].tolist() == [1, 2]
    assert out[-1, :, -1].tolist() == [1.0, 3.0, 4.0, 0.5]
    weight = torch.zeros_like(out)
    weight[-1] = torch.tensor([1.0, 2.0, 4.0, 8.0], device="cuda").unsqueeze(-1)
    (grad,) = torch.autograd.grad(out, x, weight)
    assert grad[-1, :, -1].tolist() == [1.0, 2.0, 2.0, 4.0] and grad[0].eq(0).all()


def test_restored_tokens_beyond_2_to_the_31() -> None:
    tokens = torch.tensor([3.0, 4.0, 0.5], device="cuda").bfloat16().view(1, 3, 1).expand(-1, -1, CHANNELS)
    kept = torch.tensor([[0, TOKENS - 2]], device="cuda")
    out = ops.restore_tokens(tokens, kept, TOKENS, 0)
    assert out[0, [0, 1, -3, -2, -1], -1].tolist() == [3.0, 0.5, 0.5, 4.0, 0.5]
    out[0, 1:-2] = 0.0
    grad = torch.ops.evit.restore_tokens_backward(out, kept, 3, 0, True)
    assert grad[0, :, -1].tolist() == [3.0, 4.0, 0.5]


def test_a_block_beyond_2_to_the_31() -> None:
    tokens, keep = 4, 2
    batch = 2**31 // (tokens * CHANNELS) + 3
    x = torch.zeros(batch, tokens, CHANNELS, dtype=torch.bfloat16, device="cuda")
    x[-1, :, ::2] = 1.0
    scores = torch.tensor([0.25, 2.0, 1.0], device="cuda").expand(batch, -1)
    with torch.no_grad():
        out, normed, kept = ops.add_reorganize_norm(x, x, scores, keep)
    assert kept[-1].tolist() == [1, 2]
    assert out[-1, :, -2].tolist() == [2.0, 2.0, 2.0, 0.5] and out[-1, :, -1].eq(0).all()
    assert normed[-1, 0, -2:].tolist() == [1.0, -1.0] and normed[0].eq(0).all()


def test_a_result_beyond_2_to_the_31() -> None:
    ones = torch.ones(1, 2, CHANNELS, dtype=torch.bfloat16, device="cuda")
    places = torch.tensor([[TOKENS - 1, TOKENS - 1]], device="cuda")
    out = ops.scatter_tokens(ones, places, TOKENS)
    assert out[0, -1, -1].item() == 2.0 and out[0, -2].eq(0).all()


def test_keys_beyond_2_to_the_31() -> None:
    # One token a batch entry of a keys tensor whose rows lie far apart.
    storage = torch.zeros(3, 2**30, dtype=torch.bfloat16, device="cuda")
    k = storage[:, :8].view(3, 1, 2, 4)
    k[2, 0, 1] = 4.0
    q = torch.ones(3, 1, 4, dtype=torch.bfloat16, device="cuda")
    scores = ops.class_attention(q, k)
    assert scores[:2].eq(0.5).all() and scores[2, 1] > 0.99


def test_gradients_of_keys_beyond_2_to_the_31() -> None:
    batch = 2**31 // (2 * CHANNELS) + 3
    k = torch.zeros(batch, 1, 2, CHANNELS, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    q = torch.zeros(batch, 1, CHANNELS, dtype=torch.bfloat16, device="cuda")
    q[-1] = 1.0
    scores = ops.class_attention(q, k, 1.0)
    weight = torch.zeros_like(scores)
    weight[-1, 0] = 1.0
    (grad,) = torch.autograd.grad(scores, k, weight)
    # The softmax of two equal logits is 1/2 each, its derivative ±1/4, and q is 1.
    assert grad[-1, 0, :, -1].tolist() == [0.25, -0.25] and grad[0].eq(0).all()
