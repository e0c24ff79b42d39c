"""apply on models of transformers: against a slow EViT, and all that transformers does with layers."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import evit_ext
from evit_ext import families
from evit_ext.block import ReorganizingBlock

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
DROP_LOC, RATES = (0, 1, 3), (0.8, 0.7, 0.45)
TEXT = {**SIZES, "vocab_size": 50, "eos_token_id": 1, "bos_token_id": 0}

#: For each line of the table in the documentation: the class, its configuration, the number of prefix tokens
#: and whether there is a class token.
LINES: dict[str, tuple[str, str, dict[str, Any], int, bool]] = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {}, 1, True),
    "ViT, pooled": ("ViTModel", "ViTConfig", {"qkv_bias": False}, 1, True),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", {}, 2, True),
    "DeiT, with its teacher's head": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}, 2, True),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", {"mlp_ratio": 2}, 1, True),
    "DINOv2, SwiGLU": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2, "use_swiglu_ffn": True}, 1, True),
    "DINOv2 with registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {"mlp_ratio": 2, "num_register_tokens": 3},
        4,
        True,
    ),
    "CLIP vision": ("CLIPVisionModel", "CLIPVisionConfig", {}, 1, True),
    "CLIP vision, projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {}, 1, True),
    "CLIP, image classification": ("CLIPForImageClassification", "CLIPConfig", {}, 1, True),
    "SigLIP vision": ("SiglipVisionModel", "SiglipVisionConfig", {}, 0, False),
}


def build(line: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A small model of a line, with weights large enough that every token tells on the output."""
    model_name, config_name, arguments, _, _ = LINES[line]
    if config_name == "CLIPConfig":
        config = transformers.CLIPConfig(vision_config={**SIZES, **more}, text_config=TEXT, projection_dim=12)
    else:
        config = getattr(transformers, config_name)(**{**SIZES, **arguments, **more})
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                mean = 0.6 if "lambda" in name else mean  # LayerScale
                parameter.normal_(mean, 0.1, generator=generator)
            else:
                fan_in = parameter[0].numel() if parameter.shape[0] > 1 else 4
                parameter.normal_(0, 1.5 * fan_in**-0.5, generator=generator)
    return model.to(dtype).eval()


def images(batch: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)


def output(model: Any, x: Tensor, **arguments: Any) -> Tensor:
    """What a user of the model looks at."""
    return result(model(pixel_values=x, **arguments))


def result(out: Any) -> Tensor:
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        value = getattr(out, name, None)
        if value is not None:
            return value
    raise AssertionError(type(out))


class Slow:
    """The model as an EViT, slowly: its own forward, but that each layer is computed here.

    Attention maps are formed, patches are selected one image at a time and in the order of their scores.
    """

    def __init__(
        self, line: str, model: Any, rates: Sequence[float], drop_loc: Sequence[int], fuse: bool
    ) -> None:
        self.prefix, self.class_token = LINES[line][3:]
        self.model = model
        self.settings = dict(zip(drop_loc, rates, strict=True))
        self.fuse = fuse
        self.kept: list[list[list[int]]] = []
        self.patches: list[list[int]] = []

    def __call__(self, x: Tensor) -> Tensor:
        layers = families.find_blocks(self.model)
        assert layers is not None
        for number, layer in enumerate(layers):
            layer.forward = self.layer(number, layer)
        try:
            self.kept, self.patches = [], []
            return output(self.model, x)
        finally:
            for layer in layers:
                del layer.forward

    def layer(self, number: int, layer: Any) -> Any:
        def part(*names: str) -> Any:
            return next(getattr(layer, name) for name in names if hasattr(layer, name))

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self.patches:
                self.patches = [list(range(x.shape[1] - self.prefix)) for _ in x]
            attention = part("attention", "self_attn")
            normed = part("layernorm_before", "norm1", "layer_norm1")(x)
            heads = SIZES["num_attention_heads"]
            q, k, v = (
                p(normed).reshape(len(x), x.shape[1], heads, -1).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=-1)
            attended = (weights @ v).transpose(1, 2).reshape(len(x), x.shape[1], -1)
            projection = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
            attended = projection(attended)
            x = x + (layer.layer_scale1(attended) if hasattr(layer, "layer_scale1") else attended)
            if number in self.settings:
                scores = weights[:, :, 0] if self.class_token else weights.mean(dim=2)
                x = self.reorganize(x, scores.mean(dim=1)[:, self.prefix :], self.settings[number])
            out = layer.mlp(part("layernorm_after", "norm2", "layer_norm2")(x))
            return x + (layer.layer_scale2(out) if hasattr(layer, "layer_scale2") else out)

        return forward

    def reorganize(self, x: Tensor, scores: Tensor, rate: float) -> Tensor:
        rows, stage = [], []
        for b in range(len(x)):
            patches = self.patches[b]
            keep = math.ceil(rate * len(patches))
            order = sorted(range(len(patches)), key=lambda j: -float(scores[b, j]))
            chosen, others = order[:keep], order[keep:]
            row = [x[b, : self.prefix], x[b, [self.prefix + j for j in chosen]]]
            left = [patches[j] for j in chosen]
            stage.append(sorted(left))
            if self.fuse and others:
                row.append(sum(scores[b, j] * x[b, self.prefix + j] for j in others)[None])
                left.append(-1)
            self.patches[b] = left
            rows.append(torch.cat(row))
        self.kept.append(stage)
        return torch.stack(rows)


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
    layers = families.find_blocks(model)
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
            assert all(block.gradient_checkpointing for block in families.reorganizing_blocks(model))
        output(model, images(dtype=torch.float64)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        # What was switched on while the model reorganised tokens stays on.
        evit_ext.remove(model)
        layers = families.find_blocks(model)
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


def test_the_text_model_of_clip_is_left_alone() -> None:
    config = transformers.CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    evit_ext.apply(model, 0.6)
    changed = [name for name, module in model.named_modules() if isinstance(module, ReorganizingBlock)]
    assert changed == [f"vision_model.encoder.layers.{number}" for number in (1, 2, 3)]
    tokens = torch.tensor([[0, 5, 7, 1]])
    out = model(input_ids=tokens, pixel_values=images(1))
    assert out.logits_per_image.shape == (1, 1)


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


def test_masks_are_refused_where_tokens_are_dropped() -> None:
    model = build("ViT")
    x, mask = images(1), torch.ones(1, 17)
    mask[0, 3] = 0
    expected = output(model, x, attention_mask=mask)
    evit_ext.apply(model, 1.0)
    assert torch.equal(output(model, x, attention_mask=mask), expected)
    evit_ext.set_keep_rate(model, 0.6)
    with pytest.raises(NotImplementedError, match="takes no attention mask"):
        output(model, x, attention_mask=mask)


def test_models_that_cannot_be_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            evit_ext.apply(model)

    every = "is not supported: it needs a token for every patch"
    refuse(
        transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SIZES, encoder_stride=8)),
        f"ViTForMaskedImageModeling {every}",
    )
    refuse(transformers.Dinov2Backbone(transformers.Dinov2Config(**SIZES)), f"Dinov2Backbone {every}")
    refuse(
        transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES)),
        "ViTMAEModel is not supported: of transformers, evit_ext knows ViTModel, DeiTModel, Dinov2Model",
    )
    model = build("ViT")
    model.vit.layers[2].attention = torch.nn.Identity()
    refuse(model, "the attention of block 2 is a torch.nn.modules.linear.Identity, which is not supported")
    with pytest.raises(ValueError, match="ViTModel has no block that reorganises tokens"):
        evit_ext.set_keep_rate(build("ViT, pooled"), 0.5)
    monkeypatch.setattr(families, "MINIMUM_TRANSFORMERS", (99, 1))
    refuse(build("ViT"), "transformers [0-9.]+ is not supported: .* those of 99.1 and newer")


def documented_classes() -> list[str]:
    text = (Path(__file__).parents[1] / "docs/supported-models.md").read_text()
    section = text.split("## Hugging Face transformers")[1].split("\n## ")[0]
    rows = [row.split("|") for row in section.splitlines() if row.startswith("|")][2:]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row[2])]


@pytest.mark.parametrize("name", documented_classes())
def test_documented_classes(name: str) -> None:
    cls = getattr(transformers, name)
    if name in ("CLIPModel", "CLIPForImageClassification", "SiglipModel", "SiglipForImageClassification"):
        config = cls.config_class(vision_config=SIZES, text_config=TEXT)
    else:
        config = cls.config_class(**SIZES, **({"mlp_ratio": 2} if "Dinov2" in name else {}))
    model = evit_ext.apply(cls(config).eval(), 0.6)
    arguments = {"input_ids": torch.tensor([[0, 5, 7, 1]])} if name in ("CLIPModel", "SiglipModel") else {}
    with evit_ext.record_tokens(model) as record:
        model(pixel_values=images(1), **arguments)
    assert [kept.shape[1] for kept in record.kept] == [10, 7, 5]


def test_every_tested_class_is_documented() -> None:
    assert {line[0] for line in LINES.values()} <= set(documented_classes())


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
