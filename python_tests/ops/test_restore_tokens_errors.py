"""restore_tokens: what the function refuses, and what the operator refuses by itself."""

from __future__ import annotations

import pytest
import torch
from restore_cases import make, make_fill

from evit_ext import ops

FUNCTIONS = (ops.restore_tokens, ops.reference.restore_tokens)


def test_errors(device: torch.device) -> None:
    tokens, kept = (t.to(device) for t in make(2, 4, 5, 7))
    tokens = tokens.float()
    fill = make_fill(2, 8, 5).float().to(device)
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match="num_patches must be an int, got float"):
            function(tokens, kept, 7.0)
        with pytest.raises(TypeError, match="num_prefix_tokens must be an int, got bool"):
            function(tokens, kept, 7, True)
        with pytest.raises(ValueError, match="num_patches must be at least 4, the number of kept .* got 3"):
            function(tokens, kept, 3)
        with pytest.raises(ValueError, match="num_prefix_tokens must not be negative, got -1"):
            function(tokens, kept, 7, -1)
        for prefix, numbers in (
            (0, r"4 tokens \(P = 0, K = 4\) or 5"),
            (3, r"7 tokens \(P = 3, K = 4\) or 8"),
        ):
            with pytest.raises(ValueError, match=rf"tokens must have {numbers} .*got shape \(2, 6, 5\)"):
                function(tokens, kept, 7, prefix)
        with pytest.raises(ValueError, match=r'tokens must have 6 tokens with fill "fused", .*\(2, 5, 5\)'):
            function(tokens[:, :5], kept, 7)
        with pytest.raises(
            ValueError, match=r"must have 5 tokens .*where every patch is kept, .*\(2, 6, 5\)"
        ):
            function(tokens, torch.arange(4, device=device).expand(2, -1), 4)
        with pytest.raises(ValueError, match='fill must be "fused", "zero" or a tensor .*got \'mean\''):
            function(tokens, kept, 7, 1, "mean")
        with pytest.raises(TypeError, match="fill must be .*, got NoneType"):
            function(tokens, kept, 7, 1, None)
        with pytest.raises(TypeError, match="fill must be .*, got int"):
            function(tokens, kept, 7, 1, 0)
        with pytest.raises(TypeError, match="one dtype, got torch.float64 and torch.float32"):
            function(tokens, kept, 7, 1, fill.double())
        for wrong in (fill[:, 1:], fill[:1], fill[..., 1:], fill[0]):
            with pytest.raises(ValueError, match=r"fill must have shape .* = \(2, 8, 5\), got"):
                function(tokens, kept, 7, 1, wrong)
        with pytest.raises(TypeError, match="kept must be int64, got torch.int32"):
            function(tokens, kept.int(), 7)
        with pytest.raises(
            ValueError, match=r"kept must have the batch size of tokens, 2, got shape \(1, 4\)"
        ):
            function(tokens, kept[:1], 7)
        with pytest.raises(ValueError, match=r"kept must have shape \[B, K\], got \(4,\)"):
            function(tokens, kept[0], 7)
        with pytest.raises(ValueError, match=r"tokens must have shape \[B, P \+ K"):
            function(tokens[0], kept, 7)
        with pytest.raises(TypeError, match="tokens must be float32.*got torch.int64"):
            function(tokens.long(), kept, 7)
        with pytest.raises(TypeError, match="tokens must be a tensor of shape .*, got list"):
            function([1.0], kept, 7)
        with pytest.raises(ValueError, match="fill and tokens must be on one device"):
            function(tokens, kept, 7, 1, fill.to("meta"))
        with pytest.raises(ValueError, match="kept and tokens must be on one device"):
            function(tokens, kept.to("meta"), 7)


def test_contents_of_kept_are_checked_on_the_cpu() -> None:
    tokens = torch.randn(2, 5, 3)
    good = torch.tensor([[0, 2, 6], [1, 4, 5]])
    for place, value, error, message in (
        ((1, 2), 7, IndexError, r"kept must be in \[0, 7\), got 7"),
        ((0, 0), -1, IndexError, r"kept must be in \[0, 7\), got -1"),
        ((1, 1), 5, ValueError, r"kept must be strictly ascending, got \[1, 5, 5\]"),
        ((0, 1), 0, ValueError, r"kept must be strictly ascending, got \[0, 0, 6\]"),
        ((0, 0), 3, ValueError, r"kept must be strictly ascending, got \[3, 2, 6\]"),
    ):
        kept = good.clone()
        kept[place] = value
        for function in FUNCTIONS:
            with pytest.raises(error, match=message):
                function(tokens, kept, 7)


def test_operator_refuses_what_the_function_would(device: torch.device) -> None:
    tokens, kept = (t.to(device) for t in make(2, 4, 5, 7))
    fill = make_fill(2, 8, 5).to(device)
    operator, backward = torch.ops.evit.restore_tokens, torch.ops.evit.restore_tokens_backward
    every = torch.arange(4, device=device).expand(2, -1).contiguous()
    for args in (
        (tokens, kept, 3, 1, True),
        (tokens, kept, -1, 1, True),
        (tokens, kept, 2**63 - 1, 1, True),
        (tokens, kept, 7, -1, True),
        (tokens, kept, 7, 0, True),
        (tokens, kept, 7, 3, True),
        (tokens, kept, 7, 2**62, True),
        (tokens[:, :5], kept, 7, 1, True),
        (tokens, every, 4, 1, True),
        (tokens, kept, 7, 1, True, fill),
        (tokens, kept, 7, 1, False, fill[:, 1:]),
        (tokens, kept, 7, 1, False, fill[:1]),
        (tokens, kept, 7, 1, False, fill.float()),
        (tokens, kept.int(), 7, 1, True),
        (tokens, kept[:1], 7, 1, True),
        (tokens, kept[0], 7, 1, True),
        (tokens[0], kept, 7, 1, True),
        (tokens.long(), kept, 7, 1, True),
    ):
        with pytest.raises(RuntimeError):
            operator(*args)
    grad = make_fill(2, 8, 5).to(device)
    for args in (
        (grad, kept, 4, 1, False),
        (grad, kept, 7, 1, False),
        (grad, kept, -1, 1, False),
        (grad, kept, 5, 1, True),
        (grad[:, :5], every, 6, 1, True),
        (grad, kept, 6, 9, False),
        (grad, kept, 5, -1, False),
        (grad[:, :4], kept, 6, 1, True),
        (grad, kept.int(), 6, 1, True),
        (grad, kept[:1], 6, 1, True),
        (grad.long(), kept, 6, 1, True),
        (grad[0], kept, 6, 1, True),
    ):
        with pytest.raises(RuntimeError):
            backward(*args)
    with pytest.raises(RuntimeError, match=r"tokens must have P \+ K = 7 tokens, or one more .*, got 6"):
        operator(tokens, kept, 7, 3, True)
    # On a GPU, the kernels look: python_tests/cuda/test_cuda_out_of_range.py.
    wrongs = ([3, 1, 2, 4], [1, 1, 2, 4], [0, 1, 2, 7], [-1, 0, 1, 2]) if device.type == "cpu" else ()
    for wrong in wrongs:
        wrong_kept = torch.tensor([wrong, wrong], device=device)
        with pytest.raises(RuntimeError, match=r"kept must be ascending and in \[0, 7\), got"):
            operator(tokens, wrong_kept, 7, 1, True)
        for fill_fused in (True, False):
            with pytest.raises(RuntimeError, match=r"kept must be ascending and in \[0, 7\), got"):
                backward(grad, wrong_kept, 6, 1, fill_fused)
