"""The operators called directly, without the checks in Python, with tensors that nobody means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fuzzed import fuzzed
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

OPERATORS = sorted(
    {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("evit::") and hasattr(torch.ops.evit, schema.name.split("::")[1])
    }
)

#: Shapes that are right, by the arguments' names: B batch, H heads, N tokens, D channels a head, C channels,
#: K kept, W all heads' channels, T three times as many, S the tokens that a stage leaves, M those after a
#: merge, A the tokens that are not merged away, R the patches.
SHAPES = {
    "q": "BHD", "k": "BHND", "logsumexp": "BH", "grad_scores": "BN", "qkv": "BNT", "x": "BNC", "index": "BK",
    "weights": "BN", "grad": "BC", "scores": "BN", "branch": "BNC", "weight": "C", "bias": "C", "kept": "BK",
    "tokens": "BSC", "fill": "BNC", "grad_out": "BNW", "grad_tokens": "BSC",
    "keys": "BHND", "owner": "BR", "merge_tokens.weights": "BR", "merge_tokens_backward.weights": "BR",
    "merge_tokens_backward.grad_out": "BMC", "grad_totals": "BK",
    "scatter_tokens.x": "BKC", "restore_tokens_backward.grad": "BNC",
}  # fmt: skip
NUMBERS = {"num_heads": "H", "num_keep": "K", "num_tokens": "N", "num_patches": "R", "num_prefix_tokens": "P"}
NUMBERS |= {"merge_tokens.num_out": "K", "bipartite_matching.num_out": "A"}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.int32]
EXTREME = st.sampled_from([-(2**63), -1, 0, 1, 2**31, 2**62, 2**63 - 1])


@st.composite
def all_sizes(draw: Any) -> dict[str, int]:
    sizes = {letter: draw(st.integers(0, 5)) for letter in "BHND"}
    sizes["N"] += draw(st.sampled_from([0, 2, 30]))
    sizes["P"] = draw(st.integers(0, min(2, sizes["N"])))
    sizes["R"] = sizes["N"] - sizes["P"]
    sizes["K"] = draw(st.integers(0, sizes["R"]))
    sizes["S"] = sizes["P"] + sizes["K"] + 1
    sizes["M"] = sizes["P"] + sizes["K"]
    sizes["A"] = sizes["N"] - sizes["N"] // 3
    sizes["W"] = sizes["H"] * sizes["D"]
    return {**sizes, "T": 3 * sizes["W"], "C": draw(st.sampled_from([0, 1, 7, 33]))}


@st.composite
def tensors(draw: Any, operator: str, name: str, sizes: dict[str, int], dtype: torch.dtype) -> Tensor:
    letters = SHAPES.get(f"{operator}.{name}", SHAPES.get(name, "BNC"))
    shape = [sizes[letter] for letter in letters]
    odd = draw(st.integers(0, 40))
    if odd == 0:
        shape = draw(st.lists(st.integers(0, 6), max_size=5))
    elif odd == 1:
        dtype = draw(st.sampled_from(DTYPES))
    elif name == "grad_scores":
        dtype = torch.promote_types(dtype, torch.float32)
    seed = draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(seed)
    if name == "owner":
        low, high = (
            (0, max(sizes["K"], 1)) if odd > 3 else draw(st.sampled_from([(-3, 9), (-(2**62), 2**62)]))
        )
        value = torch.randint(low, high, shape, generator=generator)
    elif letters == "BK" and name != "grad_totals" and odd > 3:
        most = sizes["R"] if name == "kept" else sizes["N"]
        rows = [torch.randperm(most, generator=generator)[: sizes["K"]] for _ in range(sizes["B"])]
        value = torch.stack(rows) if rows else torch.zeros(shape, dtype=torch.int64)
        value = value.sort(dim=1).values if name == "kept" else value
    elif letters == "BK" and name != "grad_totals":
        low, high = draw(st.sampled_from([(-3, 9), (-(2**62), 2**62)]))
        value = torch.randint(low, high, shape, generator=generator)
    else:
        value = torch.randn(shape, generator=generator).mul(3).to(dtype)
        if value.is_floating_point() and value.numel() and seed == 0:
            value.view(-1)[0] = float("nan")
    way = draw(st.sampled_from(["as it is", "transposed", "every other", "expanded"]))
    if way == "transposed" and value.dim() > 1:
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if way == "every other" and value.dim():
        return value.repeat_interleave(2, -1)[..., ::2]
    if way == "expanded" and value.dim() and value.shape[0]:
        return value[:1].expand(value.shape)
    return value


def test_there_are_operators() -> None:
    assert len(OPERATORS) >= 12


@pytest.mark.parametrize("name", OPERATORS)
@fuzzed
@given(st.data())
def test_operators(name: str, data: Any) -> None:
    """They compute, or raise; they read and write nothing else, which a crash or a sanitizer would tell."""
    sizes = data.draw(all_sizes())
    dtype = data.draw(st.sampled_from(DTYPES[:4]))
    operator = getattr(torch.ops.evit, name).default
    arguments: list[Any] = []
    for argument in operator._schema.arguments:
        kind = str(argument.type)
        if kind == "Optional[Tensor]" and data.draw(st.booleans()):
            arguments.append(None)
        elif "Tensor" in kind:
            arguments.append(data.draw(tensors(name, argument.name, sizes, dtype)))
        elif kind == "bool":
            arguments.append(data.draw(st.booleans()))
        elif kind == "float":
            arguments.append(data.draw(st.floats()))
        else:
            usual = sizes[NUMBERS.get(f"{name}.{argument.name}") or NUMBERS[argument.name]]
            if (name, argument.name) == ("restore_tokens_backward", "num_tokens"):
                usual = sizes["S"]
            odd = data.draw(st.integers(0, 40))
            arguments.append(usual if odd else data.draw(st.integers(-1, 7) | EXTREME))
    before = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    try:
        results = operator(*arguments)
    except (RuntimeError, IndexError, ValueError, TypeError, MemoryError) as error:
        assert str(error)
        event("refused")
    else:
        event("computed")
        for result in results if isinstance(results, tuple) else (results,):
            result.double().sum()  # every element can be read
    for value, copy in zip(arguments, before, strict=True):
        if isinstance(value, Tensor):
            assert torch.equal(value.nan_to_num(), copy.nan_to_num())
