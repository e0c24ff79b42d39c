"""apply on models of transformers: against a slow EViT, and all that transformers does with layers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from huggingface_models import LINES, SIZES, TEXT, build, images, output, result, transformers
from slow_huggingface import Slow

import evit_ext
from evit_ext.patching import families
from evit_ext.tokens.stage import find_stages

pytestmark = pytest.mark.usefixtures("one_thread")


DROP_LOC, RATES = (0, 1, 3), (0.8, 0.7, 0.45)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("line", LINES)
def test_keep_rate_one_is_the_original_to_the_last_bit(line: str, training: bool) -> None:
    model, x = build(line).train(training), images()
    torch.manual_seed(3)
    expected = output(model, x)
    assert evit_ext.apply(model, 1.0) is model
    torch.manual_seed(3)
    assert torch.equal(output(model, x), expected)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("line", LINES)
def test_agrees_with_the_slow_implementation(line: str, fuse: bool) -> None:
    x = images(dtype=torch.float64)
    plain, model = build(line, torch.float64), build(line, torch.float64)
    slow = Slow(line, plain, RATES, DROP_LOC, fuse)
    expected = slow(x)
    evit_ext.apply(model, RATES, DROP_LOC, fuse)
    with evit_ext.record_tokens(model) as record:
        got = output(model, x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    assert [kept.sort(dim=1).values.tolist() for kept in record.kept] == slow.kept
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    # Some gradients are zero but for rounding, such as those of the keys' biases.
    atol = 1e-12 * max(p.grad.abs().max().item() for p in plain.parameters() if p.grad is not None)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=atol, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(output(model, x), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("line", LINES)
def test_remove_restores_the_original(line: str) -> None:
    model, x = build(line), images()
    expected, keys = output(model, x), list(model.state_dict())
    layers = families.locate(model).blocks
    assert layers is not None
    before = list(layers)
    evit_ext.apply(model, 0.6)
    assert list(model.state_dict()) == keys
    assert not torch.equal(output(model, x), expected)
    other = build(line)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())
    evit_ext.remove(model)
    assert all(a is b for a, b in zip(layers, before, strict=True))
    assert list(model.state_dict()) == keys
    assert torch.equal(output(model, x), expected)


@pytest.mark.parametrize("line", LINES)
def test_compiles_without_a_graph_break(line: str) -> None:
    model, x = evit_ext.apply(build(line, torch.float64), 0.6), images(dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(result(compiled(pixel_values=x)), output(model, x))


@pytest.mark.parametrize("line", ["ViT", "DINOv2 with registers", "CLIP vision", "SigLIP vision"])
def test_gradient_checkpointing(line: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = evit_ext.apply(build(line, torch.float64), 0.6).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert all(block.gradient_checkpointing for block in find_stages(model))
        output(model, images(dtype=torch.float64)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        # What was switched on while the model reorganised tokens stays on.
        evit_ext.remove(model)
        layers = families.locate(model).blocks
        assert layers is not None
        assert {layer.gradient_checkpointing for layer in layers} == {checkpointing}
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("line", ["ViT", "DINOv2", "CLIP vision"])
def test_hidden_states_of_all_layers_are_recorded(line: str) -> None:
    model, x = build(line), images()
    number = len(model(pixel_values=x, output_hidden_states=True).hidden_states)
    model = evit_ext.apply(build(line), 0.5, [1, 3])
    states = model(pixel_values=x, output_hidden_states=True).hidden_states
    assert len(states) == number == 5
    assert [state.shape[1] for state in states] == [17, 17, 1 + 8 + 1, 1 + 8 + 1, 1 + 5 + 1]


def test_interpolated_positions_and_other_sizes() -> None:
    model = evit_ext.apply(build("ViT"), 0.6)
    x = torch.randn(2, 3, 48, 40)
    with evit_ext.record_tokens(model) as record:
        model(pixel_values=x, interpolate_pos_encoding=True)
    assert record.scores[0].shape == (2, 6 * 5)


def test_copies_and_saved_models(tmp_path: Any) -> None:
    model, x = evit_ext.apply(build("DINOv2"), 0.6), images()
    expected = output(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    model.save_pretrained(tmp_path)
    loaded = transformers.Dinov2ForImageClassification.from_pretrained(tmp_path).eval()
    others.append(evit_ext.apply(loaded, 0.6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in others:
        assert torch.equal(output(other, x), expected)


def test_an_oracle_guides_it() -> None:
    student = evit_ext.apply(build("ViT"), 0.6)
    oracle = evit_ext.Oracle(build("ViT, pooled"))
    with oracle.guide(student), evit_ext.record_tokens(student) as record:
        output(student, images())
    assert torch.equal(record.scores[0], oracle(images())[0])


def test_an_oracle_finds_the_images_among_the_arguments() -> None:
    student, oracle = evit_ext.apply(build("ViT"), 0.6), evit_ext.Oracle(build("ViT"))
    x = torch.randn(2, 3, 48, 40)
    with oracle.guide(student), evit_ext.record_tokens(student) as record:
        student(labels=torch.tensor([0, 1]), pixel_values=x, interpolate_pos_encoding=True)
    assert torch.equal(record.scores[0], oracle(x, interpolate_pos_encoding=True)[0])


def test_an_oracle_with_a_text_model() -> None:
    config = transformers.CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=12)
    clip = transformers.CLIPModel(config).eval()
    student, oracle = evit_ext.apply(copy.deepcopy(clip), 0.6), evit_ext.Oracle(clip)
    oracle.initialize(student)
    with oracle.guide(student), evit_ext.record_tokens(student) as record:
        student(input_ids=torch.tensor([[0, 5, 7, 1]]), pixel_values=images())
    assert torch.equal(record.scores[0], oracle(images())[0])


def test_bfloat16_and_autocast() -> None:
    assert (
        output(evit_ext.apply(build("ViT", torch.bfloat16), 0.6), images(dtype=torch.bfloat16))
        .isfinite()
        .all()
    )
    model = evit_ext.apply(build("SigLIP vision"), 0.6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = output(model, images())
    out.float().sum().backward()
    assert out.isfinite().all()


@pytest.mark.parametrize("line", ["ViT", "DINOv2", "CLIP vision", "SigLIP vision"])
def test_a_scaling_that_somebody_changed(line: str) -> None:
    """Attention and scores are those of queries three times as large."""
    usual = build(line, torch.float64).eval()
    scaled = copy.deepcopy(usual)
    for module in usual.modules():
        if hasattr(module, "q_proj"):
            with torch.no_grad():
                for parameter in module.q_proj.parameters():
                    parameter.mul_(3)
    for module in scaled.modules():
        if hasattr(module, "q_proj"):
            name = "scaling" if hasattr(module, "scaling") else "scale"
            setattr(module, name, 3 * getattr(module, name))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for model in (usual, scaled):
        evit_ext.apply(model, RATES, DROP_LOC)
    with torch.no_grad():
        torch.testing.assert_close(scaled(images)[0], usual(images)[0], rtol=1e-9, atol=1e-11)
