"""evit_ext.cuda_graph: right for other images and weights, refused where a replay would be silently wrong.

Here on the CPU, with a stand-in for torch's graphs; python_tests/cuda has what needs a GPU.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import cuda_graph_stand_in
import pytest
import small_dynamicvit
import small_lvvit
import timm
import torch
from family_lines import LINES, Line
from torch import Tensor, nn

import evit_ext
from evit_ext.tokens.random_selection import RandomSelection

huggingface_models: Any = None
if importlib.util.find_spec("transformers") is not None:
    import huggingface_models


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_graph_stand_in.install(monkeypatch)


def images(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def plain(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x)


@pytest.fixture
def vit(small_vit: Any) -> Any:
    return evit_ext.apply(small_vit(), (0.7, 0.6, 0.5))


@pytest.fixture
def captured(vit: Any) -> Any:
    return evit_ext.cuda_graph(vit, images())


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_every_kind_of_model(line: Line) -> None:
    vit = evit_ext.apply(line.build(), 0.6, (0, 2))
    forward = evit_ext.cuda_graph(vit, line.images())
    for seed in (1, 2):
        x = line.images(seed=seed)
        torch.testing.assert_close(forward(x), plain(vit, x), rtol=0, atol=0)


@pytest.mark.parametrize("build", [small_lvvit.micro, small_dynamicvit.micro], ids=["LV-ViT", "DynamicViT"])
def test_models_of_the_package(build: Callable[[], nn.Module]) -> None:
    vit = build()
    forward = evit_ext.cuda_graph(vit, images())
    torch.testing.assert_close(forward(images(seed=1)), plain(vit, images(seed=1)), rtol=0, atol=0)
    evit_ext.set_keep_rate(vit, 0.4)
    with pytest.raises(RuntimeError, match="the keep rate, or the rule"):
        forward(images(seed=1))


@pytest.mark.parametrize("line", huggingface_models.LINES if huggingface_models else [])
def test_models_of_transformers(line: str) -> None:
    vit = evit_ext.apply(huggingface_models.build(line), 0.6, (0, 2))
    forward = evit_ext.cuda_graph(vit, images())
    actual, expected = forward(images(seed=1)), plain(vit, images(seed=1))
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("rates", [1.0, 0.5, (0.7, 1.0, 0.3)], ids=str)
def test_keep_rates(small_vit: Any, rates: Any) -> None:
    vit = evit_ext.apply(small_vit(), rates)
    forward = evit_ext.cuda_graph(vit, images())
    torch.testing.assert_close(forward(images(seed=3)), plain(vit, images(seed=3)), rtol=0, atol=0)


def test_a_model_that_keeps_all_its_tokens(small_vit: Any) -> None:
    """Also one that evit_ext has not changed: to compare with."""
    vit = small_vit()
    forward = evit_ext.cuda_graph(vit, images())
    torch.testing.assert_close(forward(images(seed=3)), plain(vit, images(seed=3)), rtol=0, atol=0)


def test_results_are_the_callers_own(captured: Any) -> None:
    first = captured(images(seed=1))
    before = first.clone()
    captured(images(seed=2))
    assert torch.equal(first, before)
    assert not first.requires_grad and not first.is_inference()


def test_one_replay_a_call_and_no_python(vit: Any, captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evit_ext.ops, "class_attention", None)
    for count in (1, 2):
        captured(images())
        assert captured._graph.replays == count


def test_images_of_the_graph_are_not_copied(vit: Any, captured: Any) -> None:
    captured.images.copy_(images(seed=5))
    assert torch.equal(captured(captured.images), plain(vit, images(seed=5)))


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode(vit: Any, inside: bool) -> None:
    """Around the capture and around a call, or one of them."""
    with torch.inference_mode(inside):
        forward = evit_ext.cuda_graph(vit, images())
    for mode in (True, False):
        with torch.inference_mode(mode):
            assert torch.equal(forward(images(seed=1)), plain(vit, images(seed=1)))


def test_the_example_stays_the_callers(vit: Any) -> None:
    example = images()
    forward = evit_ext.cuda_graph(vit, example)
    forward(images(seed=1))
    assert torch.equal(example, images())


def test_other_strides(vit: Any, captured: Any) -> None:
    x = images(seed=1).to(memory_format=torch.channels_last)
    torch.testing.assert_close(captured(x), plain(vit, images(seed=1)), rtol=0, atol=0)


def test_weights_that_change_in_place(vit: Any, captured: Any) -> None:
    before = captured(images())
    other = {name: value * 1.1 for name, value in vit.state_dict().items()}
    vit.load_state_dict(other)
    expected = plain(vit, images())
    assert not torch.equal(before, expected)
    torch.testing.assert_close(captured(images()), expected, rtol=0, atol=0)


def test_random_rules_draw_anew(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), rule=RandomSelection(0.5))
    forward = evit_ext.cuda_graph(vit, images())
    assert not torch.equal(forward(images()), forward(images()))


def test_the_same_keep_rate_again(vit: Any, captured: Any) -> None:
    """It changes nothing, and neither does a way there and back."""
    evit_ext.set_keep_rate(vit, 0.9)
    evit_ext.set_keep_rate(vit, (0.7, 0.6, 0.5))
    assert torch.equal(captured(images()), plain(vit, images()))


def test_results_of_several_tensors() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"sums": (x.sum(1), None), "mean": [x.mean(), 3]}

    x = images(seed=2)
    result = evit_ext.cuda_graph(Two().eval(), images())(x)
    assert torch.equal(result["sums"][0], x.sum(1)) and result["sums"][1] is None
    assert torch.equal(result["mean"][0], x.mean()) and result["mean"][1] == 3


def test_autocast(vit: Any) -> None:
    """In the dtype of the capture, without autocast's cache, which would be freed."""
    with torch.autocast("cpu", torch.bfloat16):
        forward = evit_ext.cuda_graph(vit, images())
        assert forward(images(seed=1)).dtype == torch.bfloat16
        for factor in (1.0, 1.3):
            vit.load_state_dict({name: factor * value for name, value in vit.state_dict().items()})
            assert torch.equal(forward(images(seed=1)), plain(copy.deepcopy(vit), images(seed=1)))
    with pytest.raises(RuntimeError, match="autocast was switched after the capture"):
        forward(images())


# What a replay would ignore in silence.


def set_rate(vit: Any) -> None:
    evit_ext.set_keep_rate(vit, 0.4)


def train(vit: Any) -> None:
    vit.blocks[1].train()


def hook(vit: Any) -> None:
    vit.blocks[2].mlp.register_forward_hook(lambda module, args, output: output * 2)


def own_forward(vit: Any) -> None:
    attention = vit.blocks[0].attn
    attention.forward = lambda *arguments, **named: 0


def other_head(vit: Any) -> None:
    vit.head = nn.Linear(24, 7)


def other_weights(vit: Any) -> None:
    vit.load_state_dict({name: value.clone() for name, value in vit.state_dict().items()}, assign=True)


def other_dtype(vit: Any) -> None:
    vit.double()


def other_scale(vit: Any) -> None:
    vit.blocks[3].attn.scale = 0.1


def without(vit: Any) -> None:
    evit_ext.remove(vit)


CHANGES: dict[Callable[[Any], None], str] = {
    set_rate: "the keep rate, or the rule",
    train: "blocks.1 got another 'training'",
    hook: "blocks.2.mlp got a hook",
    own_forward: "blocks.0.attn got another 'forward'",
    other_head: "the model got other modules",
    other_weights: "weights in other memory",
    other_dtype: "weights in other memory",
    other_scale: "blocks.3.attn got another 'scale'",
    without: "the model got another 'forward_intermediates'",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_refused(vit: Any, captured: Any, change: Callable[[Any], None]) -> None:
    captured(images())
    change(vit)
    with pytest.raises(RuntimeError, match=f"{CHANGES[change]}.*call evit_ext.cuda_graph again"):
        captured(images())


def test_the_graphs_weights_stay_in_memory(vit: Any, captured: Any) -> None:
    """A replay reads them once more before it is known that the model has others."""
    address = vit.head.weight.data_ptr()
    vit.double()
    assert vit.head.weight.data_ptr() != address
    assert address in {weight.data_ptr() for weight in captured._weights}


def test_a_changed_class_is_refused(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm.layers.Mlp, "forward", lambda self, x: x)
    with pytest.raises(RuntimeError, match=r"mlp got another forward after the capture"):
        captured(images())


def test_global_hooks_are_refused(captured: Any) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.raises(RuntimeError, match="the model got a hook"):
            captured(images())
    finally:
        handle.remove()
    captured(images())


def test_what_a_capture_refuses(vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"in training mode: call vit.eval\(\)"):
        evit_ext.cuda_graph(copy.deepcopy(vit).train(), images())
    with evit_ext.record_tokens(vit), pytest.raises(RuntimeError, match="sees nothing of a CUDA graph"):
        evit_ext.cuda_graph(vit, images())
    hooked = copy.deepcopy(vit)
    hook(hooked)
    with pytest.raises(RuntimeError, match="the model's blocks.2.mlp has hooks"):
        evit_ext.cuda_graph(hooked, images())
    with pytest.raises(ValueError, match="the model is compiled"):
        evit_ext.cuda_graph(torch.compile(vit), images())
    monkeypatch.setattr(evit_ext.patching.capturing, "_DEVICES", frozenset({"meta"}))
    with pytest.raises(ValueError, match="got cls_token on cpu, images on meta"):
        evit_ext.cuda_graph(vit, images().to("meta"))
    with pytest.raises(TypeError, match="vit must be a model"):
        evit_ext.cuda_graph("vit", images())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="images must be a tensor"):
        evit_ext.cuda_graph(vit, [1])  # type: ignore[arg-type]


def test_records_and_oracles_are_refused_later_too(small_vit: Any, vit: Any, captured: Any) -> None:
    with evit_ext.record_tokens(vit), pytest.raises(RuntimeError, match="sees nothing of a CUDA graph"):
        captured(images())
    captured(images())
    with evit_ext.Oracle(small_vit()).guide(vit), pytest.raises(RuntimeError, match="an oracle sees nothing"):
        captured(images())
    captured(images())


def test_other_images_are_refused(vit: Any, captured: Any) -> None:
    """torch would copy one image, or another dtype, into the whole batch."""
    for other in (images(1), images(4), images()[:, :, :16], images().to("meta")):
        with pytest.raises(ValueError, match=r"images must have shape \(3, 3, 32, 32\) on cpu"):
            captured(other)
    for wrong in (images().double(), images().half(), [1]):
        with pytest.raises(TypeError, match="images must be torch.float32, as they were captured"):
            captured(wrong)
    with pytest.raises(ValueError, match="require a gradient"):
        captured(images().requires_grad_())


def test_needs_a_gpu(vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evit_ext.patching.capturing, "_DEVICES", frozenset({"cuda"}))
    with pytest.raises(ValueError, match="for an NVIDIA GPU: move model and images there, got cpu"):
        evit_ext.cuda_graph(vit, images())


def test_a_model_that_waits_for_the_gpu() -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(RuntimeError, match="something in it waits for the GPU"):
        evit_ext.cuda_graph(Waits().eval(), images())


def test_a_model_that_returns_something_else() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return object()

    with pytest.raises(TypeError, match="must return tensors, alone or in tuples.*got a object"):
        evit_ext.cuda_graph(Opaque().eval(), images())
