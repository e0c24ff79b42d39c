"""Language models whose images have fewer tokens, fine-tuned by transformers' Trainer and with LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_language_models import LINES, inputs, num_placeholders, photo, transformers
from torch import Tensor, nn

import evit_ext
from evit_ext import towers

NO_ACCELERATE = "transformers' Trainer needs accelerate, which is not installed"
NO_PEFT = "peft is not installed"
PROMPTS = ["<image> what is here ?", "word1 word2 <image> is there ?"]
#: Of the layer that makes the features, and of the language model.
ADAPTED = ["q_proj", "v_proj"]


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Two texts with an image each, as a model takes them."""

    def __init__(self, processor: Any) -> None:
        self.batch = inputs(processor, PROMPTS, [photo(30, 64), photo(60, 56, seed=1)])
        ids = self.batch["input_ids"]
        self.batch["labels"] = ids.masked_fill(ids == processor.image_token_id, -100)

    def __len__(self) -> int:
        return len(PROMPTS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.batch.items()}


def train(model: Any, processor: Any, folder: Path) -> tuple[Any, Examples]:
    """Train one step of both examples."""
    pytest.importorskip("accelerate", reason=NO_ACCELERATE)
    examples = Examples(processor)
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=len(PROMPTS),
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=examples)
    return trainer.train(), examples


@pytest.mark.parametrize("name", ["LLaVA", "LLaVA-NeXT", "LLaVA, SigLIP"])
@pytest.mark.parametrize("mode", ["select", "inside"])
def test_a_step_of_the_trainer(name: str, mode: str, tmp_path: Path) -> None:
    line = LINES[name]
    model, processor = line.build(), line.processor()
    towers.apply(model, 0.5, True, mode=mode, processor=processor)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        loss = float(model(**Examples(processor).batch).loss)
    with evit_ext.record_tokens(model) as record:
        result, examples = train(model, processor, tmp_path)
    assert result.global_step == 1 and result.training_loss == pytest.approx(loss, rel=1e-5)
    unchanged = Examples(line.processor())
    assert sum(num_placeholders(examples.batch)) < sum(num_placeholders(unchanged.batch))
    assert record.kept[-1].shape[1] < 16
    # All that the loss depends on has moved: projector, language model, and the scores' queries in the tower.
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    query = f"model.vision_tower.encoder.layers.{line.block}.self_attn.q_proj.weight"
    assert {query, "model.multi_modal_projector.linear_1.weight", "lm_head.weight"} <= moved
    assert set(model.state_dict()) == set(line.build().state_dict())


@pytest.mark.parametrize("first", ["towers", "peft"])
@pytest.mark.parametrize("mode", ["select", "inside"])
def test_a_step_with_lora(first: str, mode: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    line = LINES["LLaVA"]
    model, processor = line.build(), line.processor()
    settings = peft.LoraConfig(r=2, target_modules=ADAPTED, init_lora_weights=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if first == "towers":
        towers.apply(model, 0.5, True, mode=mode, processor=processor)
        adapted: nn.Module = peft.get_peft_model(model, settings)
    else:
        adapted = peft.get_peft_model(model, settings)
        towers.apply(adapted, 0.5, True, mode=mode, processor=processor)
    assert towers.num_image_tokens(adapted) < 16
    adapters = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapters)
    result, examples = train(adapted, processor, tmp_path)
    assert torch.isfinite(torch.tensor(result.training_loss))
    of_layer = f"vision_tower.encoder.layers.{line.block}.self_attn.q_proj.lora_A"
    moved = {n for n, p in adapted.named_parameters() if n in adapters and not torch.equal(p, adapters[n])}
    assert any(of_layer in name for name in moved)  # the scores go through the adapter
    # The weights under the adapters are the old ones; merged into them, the adapters compute the same.
    adapted.eval()
    with torch.no_grad():
        expected = adapted(**examples.batch).logits
        merged = adapted.merge_and_unload()  # type: ignore[operator]
        torch.testing.assert_close(merged(**examples.batch).logits, expected, rtol=1e-4, atol=1e-4)
    frozen = [key for key in before if not any(f".{name}." in key for name in ADAPTED)]
    assert all(torch.equal(merged.state_dict()[key], before[key]) for key in frozen)


def test_adapters_alone_are_saved_and_loaded(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    line = LINES["LLaVA"]
    model, processor = line.build(), line.processor()
    towers.apply(model, 0.5, processor=processor)
    settings = peft.LoraConfig(r=2, target_modules=ADAPTED, init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(towers.apply(line.build(), 0.5), tmp_path)
    batch = Examples(processor).batch
    with torch.no_grad():
        expected = adapted.eval()(**batch).logits
        assert torch.equal(other.eval()(**batch).logits, expected)
        plain = towers.apply(line.build(), 0.5)
        assert not torch.equal(plain(**batch).logits, expected)
