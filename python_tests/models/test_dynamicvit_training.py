"""DynamicViT in training mode: against the oracle, sampling, gradients, and what must not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import small_dynamicvit
import torch
import torch.nn.functional as F
from slow_dynamicvit import slow_training
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import evit_ext
from evit_ext.models import dynamicvit_model
from evit_ext.models.dynamicvit import DynamicViT, DynamicViTOutput, sample_decisions
from evit_ext.models.masked_attention import attention_bias
from evit_ext.tokens import dynamicvit as token_predictor

pytestmark = pytest.mark.usefixtures("one_thread")


def micro(**arguments: Any) -> DynamicViT:
    return small_dynamicvit.micro(**arguments).train()


def images(batch: int = 3, **options: Any) -> Tensor:
    return small_dynamicvit.images(batch=batch, **options)


def fix_noise(monkeypatch: pytest.MonkeyPatch, noise: list[Tensor]) -> None:
    """Let each forward take `noise`, a tensor for each stage."""

    def forever() -> Iterator[Tensor]:
        while True:
            yield from noise

    iterator = forever()
    monkeypatch.setattr(token_predictor, "gumbel_noise", lambda like: next(iterator).to(like))


def gumbel(stages: int = 3, batch: int = 3, patches: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    uniform = torch.rand(stages, batch, patches, 2, generator=generator, dtype=torch.float64)
    return list(-(-uniform.log()).log())


def objective(logits: Tensor, tokens: Tensor, decisions: Any) -> Tensor:
    """Something that depends on all that a forward returns, differently on each element."""
    total = logits.new_zeros(())
    for number, part in enumerate((logits, tokens, *decisions)):
        generator = torch.Generator().manual_seed(number)
        weights = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        total = total + (part * weights.to(part)).sum()
    return total


@pytest.mark.parametrize(
    "arguments", [{}, {"reg_tokens": 2}, {"init_values": 0.5, "drop_loc": (0, 3)}, {"grad": True}]
)
def test_agrees_with_the_oracle(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    arguments = dict(arguments)
    checkpointing = arguments.pop("grad", False)
    model = micro(**arguments).double().to(device)
    model.set_grad_checkpointing(checkpointing)
    drop_loc = arguments.get("drop_loc", (1, 2, 3))
    noise = [part.to(device) for part in gumbel(len(drop_loc))]
    fix_noise(monkeypatch, noise)
    x = images(dtype=torch.float64).to(device)

    output = model(x)
    logits, tokens, decisions = slow_training(model, x, noise, drop_loc)
    assert isinstance(output, DynamicViTOutput)
    torch.testing.assert_close(output.logits, logits, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(output.tokens, tokens, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(output.decisions, decisions, strict=True):
        assert torch.equal(ours, theirs.round()) and 0 < ours.sum() < ours.numel()
    assert torch.equal(output.mask, output.decisions[-1]) and not output.mask.requires_grad

    parameters = list(model.parameters())
    ours = torch.autograd.grad(objective(output.logits, output.tokens, output.decisions), parameters)
    theirs = torch.autograd.grad(objective(logits, tokens, decisions), parameters)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm() and b.norm() > 0, name


def test_gradients_reach_the_predictors_through_attention_alone(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Also in float32, whatever kernel torch chooses. Measured: 1e-3, and 2e-4 of the oracle in float32."""
    noise = gumbel()
    exact = micro().double()
    logits, tokens, _ = slow_training(exact, images().double(), noise, (1, 2, 3))
    objective(logits, tokens, ()).backward()

    model = micro().to(device)
    fix_noise(monkeypatch, noise)
    output = model(images().to(device))
    objective(output.logits, output.tokens, ()).backward()
    for (name, parameter), expected in zip(model.named_parameters(), exact.parameters(), strict=True):
        error = (parameter.grad.cpu() - expected.grad).norm()
        assert error <= 5e-3 * expected.grad.norm(), name


def test_dropped_tokens_have_a_gradient_too() -> None:
    """The mask's gradient is that of mask * exp(logits), at 1 and at 0."""
    mask = torch.tensor([[1.0, 1, 0, 1, 0, 0, 1]], dtype=torch.float64)
    q, k, v = torch.randn(3, 1, 2, 7, 8, dtype=torch.float64)
    weights = torch.randn(1, 2, 7, 8, dtype=torch.float64)

    ours = mask.clone().requires_grad_()
    out = F.scaled_dot_product_attention(q, k, v, attention_bias(ours))
    (gradient,) = torch.autograd.grad((out * weights).sum(), ours)

    theirs = mask.clone().requires_grad_()
    eye = torch.eye(7, dtype=torch.float64)
    exponentials = (q @ k.transpose(2, 3) / 8**0.5).exp() * (theirs * (1 - eye) + eye)
    expected = (exponentials / exponentials.sum(dim=3, keepdim=True)) @ v
    (slope,) = torch.autograd.grad((expected * weights).sum(), theirs)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-13)
    assert (slope != 0).all()


def test_the_published_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published attention adds 1e-6 against underflow, ours does not need to."""
    model = micro().double()
    noise = gumbel()
    fix_noise(monkeypatch, noise)
    x = images(dtype=torch.float64)
    published, _, _ = slow_training(model, x, noise, (1, 2, 3), eps=1e-6)
    difference = (model(x).logits - published).abs().max() / published.abs().max()
    assert 0 < difference < 2e-5


def test_dropped_patches_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first block's decisions forced, what a dropped patch shows does not matter."""
    model = micro(drop_loc=(0,))
    noise = torch.zeros(1, 16, 2)
    noise[0, [2, 3, 11], 1] = 1e4
    noise[0, :, 0] = 1e3
    fix_noise(monkeypatch, [noise])
    x = images(1)
    changed = x.clone()
    changed[:, :, 0:8, 16:32] = 5.0  # patches 2 and 3
    before, after = model(x), model(changed)
    left = before.mask[0] > 0
    assert (~left).nonzero().flatten().tolist() == [2, 3, 11]
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.tokens[:, left], after.tokens[:, left])
    assert not torch.equal(before.tokens[:, 2], after.tokens[:, 2])


def test_dropping_everything_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    model = micro()
    noise = torch.zeros(3, 16, 2)
    noise[..., 1] = 1e4
    fix_noise(monkeypatch, [noise] * 3)
    output = model(images())
    assert not output.mask.any()
    objective(output.logits, output.tokens, output.decisions).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_keeping_everything_is_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = micro(keep_rate=1.0).double()
    noise = torch.zeros(3, 16, 2)
    noise[..., 0] = 1e4
    fix_noise(monkeypatch, [noise] * 3)
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x).logits, model.eval()(x), rtol=1e-12, atol=1e-13)


def test_sampling_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.02, 0.3, 0.5, 0.9])
    log_probabilities = torch.stack([probabilities, 1 - probabilities], dim=1).log()
    decisions = sample_decisions(log_probabilities.expand(20_000, 4, 2))
    assert set(decisions.unique().tolist()) == {0.0, 1.0}
    deviation = (probabilities * (1 - probabilities) / 20_000).sqrt()
    assert ((decisions.mean(dim=0) - probabilities).abs() < 4 * deviation).all()


def test_sampling_is_that_of_torch() -> None:
    """Decisions and gradient are those of torch's own Gumbel-softmax, with the same random numbers."""
    logits = torch.randn(4, 9, 2, dtype=torch.float64).log_softmax(dim=2)
    weights = torch.randn(4, 9, dtype=torch.float64)
    results = []
    for sample in (sample_decisions, lambda x: F.gumbel_softmax(x, tau=1.0, hard=True)[:, :, 0]):
        torch.manual_seed(5)
        leaf = logits.clone().requires_grad_()
        decisions = sample(leaf)
        (decisions * weights).sum().backward()
        results.append((decisions.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


def test_deterministic_with_a_seed() -> None:
    model = micro()
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(model(images()))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert not torch.equal(outputs[0].mask, outputs[2].mask)


def test_shapes_and_what_is_recorded() -> None:
    model = micro(reg_tokens=2)
    with evit_ext.record_tokens(model) as record:
        output = model(images())
    assert record.kept == []
    assert output.logits.shape == (3, 5) and output.tokens.shape == (3, 16, 24)
    assert output.mask.shape == (3, 16) and [part.shape for part in output.decisions] == [(3, 16)] * 3
    for earlier, later in zip(output.decisions, output.decisions[1:], strict=False):
        assert (later <= earlier).all()
    assert model.forward_features(images()).shape == (3, 19, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision(
    dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """The gradient of decisions, those to drop too, arrives also where numbers end early."""
    decided = (torch.arange(16) % 2.0).expand(3, 16)
    gradients = []
    for low in (False, True):
        model, x = micro(drop_loc=(0,)), images()
        if low:
            model, x = model.to(device), x.to(device)
            if not autocast:
                model, x = model.to(dtype), x.to(dtype)
        leaf = decided.to(x.device).requires_grad_()
        with monkeypatch.context() as patch, torch.autocast(x.device.type, dtype, enabled=low and autocast):
            patch.setattr(dynamicvit_model, "sample_decisions", lambda scores, leaf=leaf: leaf)
            output = model(x)
        output.logits.float().square().sum().backward()
        assert output.logits.dtype == (dtype if low else torch.float32)
        gradients.append(leaf.grad.cpu())
    for part in (slice(0, None, 2), slice(1, None, 2)):  # dropped, kept
        exact, got = gradients[0][:, part], gradients[1][:, part]
        assert (got - exact).norm() < 0.1 * exact.norm()


def test_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = micro()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    expected = model(images())
    torch.manual_seed(2)
    output = compiled(images())
    assert torch.equal(output.mask, expected.mask)
    torch.testing.assert_close(output.logits, expected.logits)
    output.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def seeded(model: Any) -> DynamicViTOutput:
    torch.manual_seed(2)
    output: DynamicViTOutput = model(images())
    return output


def with_hook_on_block(model: DynamicViT) -> None:
    model.blocks[-1].register_forward_hook(lambda module, args, output: output + args[0].square())


def with_hook_on_attention(model: DynamicViT) -> None:
    model.blocks[-1].attn.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))


def with_forward_of_an_instance(model: DynamicViT) -> None:
    attention = model.blocks[-1].attn
    forward = attention.forward
    attention.forward = lambda x, **options: 2 * forward(x, **options)


@pytest.mark.parametrize(
    "change",
    [with_hook_on_block, with_hook_on_attention, with_forward_of_an_instance],
    ids=lambda f: f.__name__,
)
def test_changes_of_others_count(change: Callable[[DynamicViT], None]) -> None:
    """In the last block, so that no decision depends on them."""
    model = micro()
    before = seeded(model)
    change(model)
    after = seeded(model)
    assert torch.equal(before.mask, after.mask)
    assert (before.tokens - after.tokens).abs().max() > 0.01


def test_hooks_that_change_nothing() -> None:
    """The gradient that reaches the predictors is that of the mask, whoever called attention."""
    model = micro()
    predictors = list(model.score_predictor.parameters())
    before = seeded(model)
    seen: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("attn", "blocks.1", "blocks.2", "blocks.3")):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    after = seeded(model)
    assert len(seen) == 4 + 3
    torch.testing.assert_close(after.tokens, before.tokens, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(before.logits.square().sum(), predictors)
    for got, want in zip(torch.autograd.grad(after.logits.square().sum(), predictors), expected, strict=True):
        assert (got - want).norm() < 1e-4 * want.norm()


def test_checkpoint_wrapper() -> None:
    model = micro()
    before = seeded(model)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = checkpoint_wrapper(block)
    after = seeded(model)
    torch.testing.assert_close(after.tokens, before.tokens, rtol=1e-5, atol=1e-5)
    after.logits.sum().backward()


def test_a_block_that_takes_no_mask_is_refused() -> None:
    model = micro()
    block = model.blocks[-1]
    block.forward = lambda x: x
    with pytest.raises(RuntimeError, match="the forward of its Block takes no attn_mask"):
        seeded(model)


def test_hooks_in_float16_are_refused() -> None:
    model = micro()
    with_hook_on_block(model)
    with pytest.raises(RuntimeError, match="train in bfloat16"):
        model.half()(images().half())
