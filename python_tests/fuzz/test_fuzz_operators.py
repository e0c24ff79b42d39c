"""The operators called directly, without the checks in Python, with tensors that nobody means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fuzzed import fuzzed
from hypothesis import given
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

#: Shapes that are right, by the arguments' names; T is three times all heads' channels.
SHAPES = {
    "q": "BHD", "k": "BHND", "logsumexp": "BH", "grad_scores": "BN", "qkv": "BNT", "x": "BNC", "index": "BK",
    "weights": "BN", "grad": "BC", "scores": "BN", "branch": "BNC", "weight": "C", "bias": "C", "kept": "BK",
    "tokens": "BNC", "fill": "C", "grad_out": "BNC", "grad_tokens": "BNC",
}  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.int32]
EXTREME = st.sampled_from([-(2**63), -1, 0, 1, 2**31, 2**62, 2**63 - 1])


@st.composite
def tensors(draw: Any, name: str, sizes: dict[str, int], dtype: torch.dtype) -> Tensor:
    shape = [sizes[letter] for letter in SHAPES.get(name, "BNC")]
    if draw(st.integers(0, 5)) == 0:
        shape = draw(st.lists(st.integers(0, 6), max_size=5))
    if draw(st.integers(0, 9)) == 0:
        dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(seed)
    if name in ("index", "kept") and draw(st.integers(0, 5)):
        low, high = draw(st.sampled_from([(0, max(sizes["N"], 1)), (-3, 9), (-(2**62), 2**62)]))
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
    sizes = {letter: data.draw(st.integers(0, 6), letter) for letter in "BHNDK"}
    sizes["C"] = data.draw(st.sampled_from([sizes["H"] * sizes["D"], 0, 1, 7, 33]))
    sizes["T"] = 3 * sizes["H"] * sizes["D"]
    dtype = data.draw(st.sampled_from(DTYPES[:4]))
    operator = getattr(torch.ops.evit, name).default
    arguments: list[Any] = []
    for argument in operator._schema.arguments:
        kind = str(argument.type)
        if kind == "Optional[Tensor]" and data.draw(st.booleans()):
            arguments.append(None)
        elif "Tensor" in kind:
            arguments.append(data.draw(tensors(argument.name, sizes, dtype), argument.name))
        elif kind == "bool":
            arguments.append(data.draw(st.booleans()))
        elif kind == "float":
            arguments.append(data.draw(st.floats()))
        else:
            usual = sizes["H"] if argument.name == "num_heads" else 1
            arguments.append(data.draw(st.just(usual) | st.integers(-1, 7) | EXTREME, argument.name))
    before = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    try:
        results = operator(*arguments)
    except (RuntimeError, IndexError, ValueError, TypeError, MemoryError) as error:
        assert str(error)
    else:
        for result in results if isinstance(results, tuple) else (results,):
            result.double().sum()  # every element can be read
    for value, copy in zip(arguments, before, strict=True):
        if isinstance(value, Tensor):
            assert torch.equal(value.nan_to_num(), copy.nan_to_num())
