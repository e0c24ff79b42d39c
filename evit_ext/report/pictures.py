"""What a run's model keeps of some validation images, as small pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from evit_ext.visualize.photos import Eye
from evit_ext.visualize.picture import merged_picture
from evit_ext.visualize.views import StageView, view_images

_SIDE = 160
# Dropped patches: little of the image on a grey that is neither the light page's nor the dark one's.
_GREY, _LEFT_OVER = 128, 0.18


@dataclass(frozen=True)
class KeptPatches:
    """An image and what each stage keeps of it.

    Attributes:
        label: what it is.
        predicted: what the model takes it for.
        stages: data URLs of the image, and of what is left after each stage.
        shares: of the patches that are left, for each stage.
    """

    label: str
    predicted: str
    stages: list[str]
    shares: list[float]


def kept_patches(
    model: nn.Module, images: Tensor, labels: Sequence[int], names: Sequence[str], eye: Eye
) -> list[KeptPatches]:
    """Return what a model in eval mode keeps, at the keep rate that it has.

    Args:
        model: of the run.
        images: float32 [B, 3, height, width], as the model takes them, on its device.
        labels: of the images.
        names: of the classes; may be empty.
        eye: turns images back into pictures.
    """
    from evit_ext.patching.keep_rates import keep_rates

    def name(number: int) -> str:
        return names[number] if number < len(names) else f"class {number}"

    found: list[KeptPatches] = []
    rates = keep_rates(model)
    if not rates:  # a rule such as ToMe(r=13): its views would be those of another model
        return found
    for tensor, label, view in zip(images, labels, view_images(model, images, [min(rates)]), strict=True):
        (rate,) = view.rates
        picture = eye.show(tensor.cpu())
        best = None if rate.probabilities is None else int(rate.probabilities.argmax())
        found.append(
            KeptPatches(
                name(label),
                "" if best is None else name(best),
                [_url(picture), *(_url(_left(picture, stage)) for stage in rate.stages)],
                [float(stage.kept.float().mean()) for stage in rate.stages],
            )
        )
    return found


def _left(picture: Image.Image, stage: StageView) -> Image.Image:
    if stage.groups is not None:
        return merged_picture(picture, stage.groups, max(picture.size))
    return _dimmed(picture, stage.kept)


def _dimmed(picture: Image.Image, kept: Tensor) -> Image.Image:
    pixels = np.asarray(picture, np.float32)
    mask = torch.nn.functional.interpolate(
        kept[None, None].float(), size=pixels.shape[:2], mode="nearest-exact"
    )
    shown = mask[0, 0].numpy()[:, :, None]
    dimmed = _LEFT_OVER * pixels + (1 - _LEFT_OVER) * _GREY
    return Image.fromarray((shown * pixels + (1 - shown) * dimmed).astype(np.uint8))


def _url(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
