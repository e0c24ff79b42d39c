"""The configuration of tiny models that tests of building share."""

from __future__ import annotations

from typing import Any

from evit_ext.training import TrainConfig

TINY: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}


def config(model: str = "deit_small", **fields: Any) -> TrainConfig:
    """A configuration of a tiny model on images of 32 pixels."""
    extra = {"stem_dim": 6} if model.startswith("lvvit") else {}
    model_args = {**TINY, **extra, **fields.pop("model_args", {})}
    defaults = {"img_size": 32, "drop_loc": (1, 2, 3), "keep_rate": 0.5, "warmup_epochs": 0.0}
    return TrainConfig(model=model, model_args=model_args, **{**defaults, **fields})
