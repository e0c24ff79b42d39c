"""What every operator must do, as tests that each operator's test class inherits.

A subclass gives `operator`, `reference` and `cases`; it gets: agreement with the reference computed in
float64, of values and of gradients, in every dtype; any strides; determinism, whatever the number of threads;
gradcheck; opcheck; torch.compile with a dynamic batch; torch.export; autocast; a batch of 0; inputs left as
they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

# Error allowed, relative to 1 + the exact value. The largest seen over all cases, gradients included: float32
# 1.0e-6 (sums of some hundred terms), float16 3.9e-4 and bfloat16 3.4e-3 (one rounding), float64 7.6e-16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float64: 4e-15}


@dataclass
class Case:
    """Arguments of one call. Tensors are float64 and are cast to the dtype under test."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype, device: torch.device) -> list[Any]:
        """The arguments with floating tensors in `dtype`; fresh copies, on `device`."""
        out: list[Any] = []
        for arg in self.args:
            if isinstance(arg, Tensor):
                arg = arg.detach().clone().to(device)
                if arg.is_floating_point():
                    arg = arg.to(dtype)
            out.append(arg)
        return out


def random_examples(count: int) -> settings:
    """Hypothesis with `count` examples, which may all share the `device` that the test was given."""
    # A fixture is set up once for all examples, which the health check warns of; a device has no state.
    return settings(
        max_examples=count, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


def exact(args: list[Any]) -> list[Any]:
    """The same values in float64."""
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, slack: float = 1) -> None:
    """Compare with a float64 tensor: within `slack` times TOLERANCE of `dtype`, by default actual's.

    Integers must be equal.

    The error is relative to the largest value expected: scores and gradients are small numbers.
    """
    if not actual.is_floating_point():
        assert torch.equal(actual, expected)
        return
    assert actual.shape == expected.shape
    finite = expected.detach()[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    tolerance = TOLERANCE[dtype or actual.dtype] * slack
    torch.testing.assert_close(
        actual.double(), expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


def differentiable(args: list[Any]) -> list[Tensor]:
    """The floating tensors among `args`, now requiring gradients."""
    return [a.requires_grad_() for a in args if isinstance(a, Tensor) and a.is_floating_point()]


def floating(result: Any) -> list[Tensor]:
    """The outputs that can have a gradient."""
    return [tensor for tensor in outputs(result) if tensor.is_floating_point()]


def awkward_strides(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The values of `x` behind strides that nobody would choose."""
    padded = torch.zeros([size + 3 for size in x.shape], dtype=x.dtype, device=x.device)
    slice_of_larger = padded[tuple(slice(1, size + 1) for size in x.shape)]
    yield "slice of a larger tensor", slice_of_larger.copy_(x)
    yield "every second element", x.repeat_interleave(2, dim=-1)[..., ::2]
    if x.dim() == 1:
        return
    yield "every second row", x.repeat_interleave(2, dim=1)[:, ::2]
    yield "last two dimensions swapped", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "batch innermost", x.movedim(0, -1).contiguous().movedim(-1, 0)


class OperatorTester:
    """Base of the operators' test classes; see the module's docstring."""

    operator: Callable[..., Any]
    reference: Callable[..., Any]
    #: Name in torch.ops.evit.
    qualified_name: str
    #: Whether the floating outputs have the accumulation dtype instead of the inputs'.
    scores_like = False
    #: The numbers of the outputs that have, where not all do.
    scores: tuple[int, ...] = ()
    #: The devices on which torch.ops.evit.<name> has a gradient. Where it has none, the public function
    #: computes another way when a gradient is needed, and every test of gradients goes through that.
    gradient_devices: frozenset[str] = frozenset({"cpu", "cuda"})
    #: How many times TOLERANCE gradients may be off.
    gradient_slack = 1

    @staticmethod
    def cases() -> list[Case]:
        raise NotImplementedError

    @staticmethod
    def raw_args(args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Arguments of torch.ops.evit.<name>; by default those of the public function."""
        return tuple(args)

    @staticmethod
    def repeated(args: list[Any], count: int) -> list[Any]:
        """`args` with the batch `count` times as large; vectors are parameters and have no batch."""
        return [
            a.repeat(count, *[1] * (a.dim() - 1)) if isinstance(a, Tensor) and a.dim() > 1 else a
            for a in args
        ]

    def _call(self, case: Case, args: list[Any]) -> Any:
        return type(self).operator(*args, **case.kwargs)

    def _expected(self, case: Case, args: list[Any]) -> list[Tensor]:
        return outputs(type(self).reference(*exact(args), **case.kwargs))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_matches_float64_reference(self, device: torch.device, dtype: torch.dtype) -> None:
        for case in self.cases():
            args = case.cast(dtype, device)
            before = copy.deepcopy(args)
            result = outputs(self._call(case, args))
            for number, (actual, expected) in enumerate(zip(result, self._expected(case, args), strict=True)):
                assert_near(actual, expected)
                if actual.is_floating_point():
                    wanted = torch.float64 if dtype == torch.float64 else torch.float32
                    like_scores = self.scores_like or number in self.scores
                    assert actual.dtype == (wanted if like_scores else dtype)
                assert actual.is_contiguous()
            for was, now in zip(before, args, strict=True):
                assert not isinstance(was, Tensor) or torch.equal(was, now)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_gradients_match_float64_reference(self, device: torch.device, dtype: torch.dtype) -> None:
        for case in self.cases():
            args = case.cast(dtype, device)
            wide = exact(args)
            grads = []
            for function, values in ((type(self).operator, args), (type(self).reference, wide)):
                leaves = differentiable(values)
                results = floating(function(*values, **case.kwargs))
                torch.manual_seed(1)
                weights = [torch.randn(r.shape, dtype=torch.float64).to(dtype).to(r) for r in results]
                grads.append(torch.autograd.grad(results, leaves, weights, allow_unused=True))
            for actual, expected in zip(*grads, strict=True):
                if expected is None or actual is None:
                    # No path at all is the same as a gradient of zeros.
                    other = actual if expected is None else expected
                    assert other is None or not other.any()
                    continue
                assert_near(actual, expected, slack=self.gradient_slack)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_any_strides(self, device: torch.device, dtype: torch.dtype) -> None:
        for case in self.cases():
            args = case.cast(dtype, device)
            expected = outputs(self._call(case, args))
            for i, arg in enumerate(args):
                if not isinstance(arg, Tensor):
                    continue
                for name, strided in awkward_strides(arg):
                    result = outputs(self._call(case, [*args[:i], strided, *args[i + 1 :]]))
                    for a, b in zip(result, expected, strict=True):
                        assert torch.equal(a, b), f"{case.name}: argument {i}, {name}"

    def test_expanded_gradient(self, device: torch.device) -> None:
        """`out.sum().backward()` sends a gradient whose strides are all 0."""
        case = self.cases()[0]
        grads = []
        for expand in (True, False):
            args = case.cast(torch.float32, device)
            leaves = differentiable(args)
            results = floating(self._call(case, args))
            ones = [torch.ones((), device=device).expand(result.shape) for result in results]
            grads.append(
                torch.autograd.grad(results, leaves, [o if expand else o.contiguous() for o in ones])
            )
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)

    def test_deterministic_whatever_the_threads(self, device: torch.device) -> None:
        threads = torch.get_num_threads()
        seen: list[list[Tensor]] = []
        try:
            for count in (1, 2, 3, 7, 1):
                torch.set_num_threads(count)
                run: list[Tensor] = []
                for case in self.cases():
                    args = case.cast(torch.float32, device)
                    run += outputs(self._call(case, args))
                    if device.type not in self.gradient_devices:
                        continue
                    leaves = differentiable(args)
                    loss = torch.stack([r.square().sum() for r in floating(self._call(case, args))]).sum()
                    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
                    run += [g for g in grads if g is not None]
                seen.append(run)
        finally:
            torch.set_num_threads(threads)
        for run in seen[1:]:
            for a, b in zip(run, seen[0], strict=True):
                assert torch.equal(a, b)

    def test_gradcheck(self, device: torch.device) -> None:
        for case in self.cases():
            args = case.cast(torch.float64, device)
            # Every element of small cases, one random direction of large ones, which would take minutes.
            large = sum(a.numel() for a in args if isinstance(a, Tensor)) > 2000
            differentiable(args)

            def results(*values: Any, case: Case = case) -> tuple[Tensor, ...]:
                return tuple(floating(self._call(case, list(values))))

            assert torch.autograd.gradcheck(results, args, fast_mode=large)

    def test_opcheck(self, device: torch.device) -> None:
        operator = getattr(torch.ops.evit, self.qualified_name)
        for case in self.cases():
            args = case.cast(torch.float32, device)
            if device.type in self.gradient_devices:
                differentiable(args)
            torch.library.opcheck(operator, self.raw_args(args, case.kwargs))

    def test_compiles_without_graph_break_with_dynamic_batch(self, device: torch.device) -> None:
        torch._dynamo.reset()
        case = self.cases()[0]

        def loss(*values: Any) -> tuple[Tensor, Tensor]:
            results = floating(self._call(case, list(values)))
            return results[-1], torch.stack([r.float().square().sum() for r in results]).sum()

        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
        for repeat in (1, 3, 2):
            args = case.cast(torch.float32, device)
            args = self.repeated(args, repeat)
            with torch.no_grad():
                assert torch.equal(loss(*args)[0], compiled(*args)[0])
            leaves = differentiable(args)
            (eager, eager_loss), (graph, graph_loss) = loss(*args), compiled(*args)
            assert torch.equal(eager, graph)
            eager_grads = torch.autograd.grad(eager_loss, leaves, allow_unused=True)
            for a, b in zip(
                eager_grads, torch.autograd.grad(graph_loss, leaves, allow_unused=True), strict=True
            ):
                assert (a is None and b is None) or torch.equal(a, b)

    def test_exports(self, device: torch.device) -> None:
        case = self.cases()[0]
        args = case.cast(torch.float32, device)
        tensors = tuple(a for a in args if isinstance(a, Tensor))

        class Module(torch.nn.Module):
            def forward(module, *values: Tensor) -> list[Tensor]:
                rest = iter(values)
                return outputs(self._call(case, [next(rest) if isinstance(a, Tensor) else a for a in args]))

        batch = torch.export.Dim("batch", min=1, max=64)
        shapes = tuple({0: batch} if t.dim() > 1 else None for t in tensors)
        program = torch.export.export(Module(), tensors, dynamic_shapes={"values": shapes})
        larger = self.repeated(list(tensors), 3)
        for a, b in zip(program.module()(*larger), Module()(*larger), strict=True):
            assert torch.equal(a, b)

    def test_autocast(self, device: torch.device) -> None:
        case = self.cases()[0]
        args = case.cast(torch.float32, device)
        leaves = differentiable(args)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            result = outputs(self._call(case, args))
        for actual, expected in zip(result, self._expected(case, args), strict=True):
            assert_near(actual, expected, torch.bfloat16)
        for grad in torch.autograd.grad(sum(r.float().sum() for r in floating(result)), leaves):
            assert grad.dtype == torch.float32

    def test_batch_of_zero(self, device: torch.device) -> None:
        for dtype in DTYPES:
            case = self.cases()[0]
            args = self.repeated(case.cast(dtype, device), 0)
            with torch.no_grad():
                assert all(r.shape[0] == 0 for r in outputs(self._call(case, args)))
            leaves = differentiable(args)
            result = outputs(self._call(case, args))
            for actual, expected in zip(result, self._expected(case, args), strict=True):
                assert actual.shape == expected.shape
            total = sum(r.sum() for r in floating(result))
            for leaf, grad in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
                assert grad.shape == leaf.shape

    def test_meta_tensors(self) -> None:
        for case in self.cases():
            args = case.cast(torch.float32, torch.device("cpu"))
            meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
            for a, b in zip(outputs(self._call(case, meta)), outputs(self._call(case, args)), strict=True):
                assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")
