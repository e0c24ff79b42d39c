"""Weights with which small models can be compared."""

from __future__ import annotations

from torch import nn


def draw_telling_weights(model: nn.Module) -> None:
    """Draw weights so large that every token tells on the result, which timm's initial ones are not.

    They come from torch's generator.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
        else:
            fan_in = parameter[0].numel() if parameter.shape[0] > 1 else 4
            nn.init.normal_(parameter, std=1.5 * fan_in**-0.5)
