"""Small language models of transformers with vision towers, with their processors, from configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

#: 4 blocks, 16 patches.
TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "<video>",
    "what",
    "is",
    "in",
    "here",
    "and",
    "there",
    "?",
]
WORDS += [f"word{number}" for number in range(20)]
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": len(WORDS),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32]]


@dataclass(frozen=True)
class Line:
    """A class of models.

    Attributes:
        name: of the class, before "ForConditionalGeneration".
        tower: "clip" or "siglip".
        arguments: of its configuration.
        block: the block that makes the features.
        tiles: images are cut into tiles.
    """

    name: str
    tower: str
    arguments: dict[str, Any]
    block: int
    tiles: bool = False

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches."""
        return 1 if self.tower == "clip" else 0

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return the same model each time, in eval mode, with weights on which every token tells."""
        tower = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}[self.tower]
        more = {"projection_dim": 32} if self.name == "PaliGemma" else {}
        text = transformers.GemmaConfig(**TEXT, head_dim=16) if more else transformers.LlamaConfig(**TEXT)
        config = getattr(transformers, f"{self.name}Config")(
            vision_config=tower(**TOWER, **more),
            text_config=text,
            image_token_id=WORDS.index("<image>"),
            **self.arguments,
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.name}ForConditionalGeneration")(config)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                    parameter.normal_(mean, 0.1, generator=generator)
                else:
                    fan_in = parameter[0].numel() if parameter.shape[0] > 1 else 4
                    parameter.normal_(0, 1.5 * fan_in**-0.5, generator=generator)
        return model.to(dtype).eval()

    def processor(self) -> Any:
        """Return a processor with a tokenizer of few words."""
        vocabulary = {word: number for number, word in enumerate(WORDS)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            unk_token="<unk>",
            additional_special_tokens=["<image>", "<video>"],
        )
        fast.padding_side = "left"
        side = {"height": 32, "width": 32}
        if self.name == "PaliGemma":
            fast.image_token, fast.image_token_id = "<image>", WORDS.index("<image>")
            images = transformers.SiglipImageProcessor(size=side)
            images.image_seq_length = 16
            return transformers.PaliGemmaProcessor(images, fast)
        if self.name == "Llava":
            images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side)
            return transformers.LlavaProcessor(
                images,
                fast,
                patch_size=8,
                vision_feature_select_strategy=self.arguments["vision_feature_select_strategy"],
                num_additional_image_tokens=self.prefix,
            )
        if self.name in ("LlavaNext", "LlavaNextVideo"):
            images = transformers.LlavaNextImageProcessor(
                size={"shortest_edge": 32}, crop_size=side, image_grid_pinpoints=PINPOINTS
            )
            settings: dict[str, Any] = {
                "patch_size": 8,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
            }
            if self.name == "LlavaNext":
                return transformers.LlavaNextProcessor(images, fast, **settings)
            videos = transformers.LlavaNextVideoVideoProcessor(size={"shortest_edge": 32}, crop_size=side)
            return transformers.LlavaNextVideoProcessor(videos, images, fast, **settings)
        images = transformers.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=PINPOINTS)
        videos = transformers.LlavaOnevisionVideoProcessor(size=side)
        return transformers.LlavaOnevisionProcessor(
            images, fast, videos, num_image_tokens=16, vision_feature_select_strategy="full"
        )


_TILES = {"image_grid_pinpoints": PINPOINTS}
LINES = {
    "LLaVA": Line(
        "Llava", "clip", {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}, 2
    ),
    "LLaVA, with the class token": Line(
        "Llava", "clip", {"vision_feature_layer": [-2], "vision_feature_select_strategy": "full"}, 2
    ),
    "LLaVA, SigLIP": Line(
        "Llava", "siglip", {"vision_feature_layer": 4, "vision_feature_select_strategy": "full"}, 3
    ),
    "LLaVA-NeXT": Line("LlavaNext", "clip", {"vision_feature_layer": -2, **_TILES}, 2, tiles=True),
    "LLaVA-NeXT-Video": Line(
        "LlavaNextVideo",
        "clip",
        {"vision_feature_layer": -2, "video_token_id": WORDS.index("<video>"), **_TILES},
        2,
        tiles=True,
    ),
    "LLaVA-OneVision": Line(
        "LlavaOnevision", "siglip", {"video_token_id": WORDS.index("<video>"), **_TILES}, 3, tiles=True
    ),
    "PaliGemma": Line("PaliGemma", "siglip", {"projection_dim": 32}, 3),
}


def photo(height: int, width: int, seed: int = 0) -> Any:
    """Return a random image, as arrays are: uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def inputs(processor: Any, texts: Any, images: Any) -> dict[str, Any]:
    """Return what the processor makes of texts and images, as the model takes it."""
    made = processor(text=texts, images=images, return_tensors="pt", padding=True)
    return {name: value for name, value in made.items() if name != "labels"}


def num_placeholders(made: dict[str, Any]) -> list[int]:
    """Return how many placeholders each text has."""
    ids: Tensor = made["input_ids"]
    return [int(row.sum()) for row in ids == WORDS.index("<image>")]
