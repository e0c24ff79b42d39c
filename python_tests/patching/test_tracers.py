"""Reorganising blocks under torch.jit.trace, torch.fx and torch.compile block by block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import evit_ext

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, DROP_LOC = 0.6, (2, 4, 6)


def vit() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 8, "num_heads": 3}
    return VisionTransformer(**sizes, num_classes=10).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tokens", [65, 211, 1001])
def test_traced_sizes(tokens: int) -> None:
    block, x = evit_ext.apply(vit(), RATE).blocks[2], torch.randn(1, tokens, 48)
    traced = torch.jit.trace(block, x, check_trace=False)
    torch.testing.assert_close(traced(x), block(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_models() -> None:
    for model in (
        evit_ext.apply(vit(), RATE),
        evit_ext.models.dynamicvit_tiny(drop_loc=(1, 2), depth=4, img_size=64).eval(),
    ):
        torch.testing.assert_close(
            torch.jit.trace(model, images(), check_trace=False)(images()), model(images())
        )


def test_tracers_that_cannot_follow_name_the_way_out(tmp_path: Any) -> None:
    model = evit_ext.apply(vit(), RATE)
    with pytest.raises(TypeError, match="torch.fx cannot trace a block.*torch.export"):
        torch.fx.symbolic_trace(model.blocks[2])
    with pytest.raises(RuntimeError, match="use evit_ext.export.export_model or evit export"):
        torch.onnx.export(model, (images(),), str(tmp_path / "a.onnx"), dynamo=False)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rate", [1.0, RATE])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_blocks_compiled_one_by_one(library: str, rate: float, gradients: bool) -> None:
    """One graph for all blocks of a kind, and one more where the number of tokens changes."""
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    if library == "timm":
        model: Any = evit_ext.apply(vit(), rate, DROP_LOC)
        blocks, run = model.blocks, model
    else:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        sizes = {"image_size": 64, "patch_size": 8, "hidden_size": 48, "intermediate_size": 96}
        config = transformers.ViTConfig(**sizes, num_hidden_layers=8, num_attention_heads=3)
        model = evit_ext.apply(transformers.ViTModel(config).eval(), rate, DROP_LOC)
        blocks, run = model.layers, lambda x: model(x).last_hidden_state
    with torch.set_grad_enabled(gradients):
        expected = run(images())
        for block in blocks:
            block.compile(fullgraph=True, backend=backend)
        torch.testing.assert_close(run(images()), expected)
        run(images())
    assert len(graphs) == (2 if rate == 1 else 4)


def half(attention: Any) -> None:
    attention.register_forward_pre_hook(lambda module, args: (args[0] * torch.linspace(0, 2, 48),))


def own(attention: Any) -> None:
    forward = type(attention).forward
    attention.forward = lambda x, **named: forward(attention, x * torch.linspace(0, 2, 48), **named)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("change", [half, own])
def test_attentions_whose_input_other_code_changes(change: Any) -> None:
    """Compiled, they leave the graph; what leaves Python is refused."""
    model = evit_ext.apply(vit(), RATE, DROP_LOC)
    for block in model.blocks:
        change(block.attn)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(images()), model(images()))
    with pytest.raises(RuntimeError, match="cannot be exported or traced in a block that reorganises tokens"):
        torch.jit.trace(model, images(), check_trace=False)
    with pytest.raises(Exception, match="cannot be exported or traced in a block that reorganises tokens"):
        torch.export.export(model, (images(),))
