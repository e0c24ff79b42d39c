"""Whether an exported file computes what its model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evit_ext.patching.recording import TokenRecord, recording
from evit_ext.tokens.stage import find_stages

#: Largest difference that is rounding, as a share of the largest logit, by the model's dtype. Exported
#: programs of 12 blocks were seen to differ by 3e-6 in float32 and 1e-2 in bfloat16.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}

_CANDIDATES = 8


@torch.no_grad()
def clear_images(model: nn.Module, like: Tensor, batches: Sequence[int]) -> list[Tensor]:
    """Return batches of random images for which it is clear which patches are kept.

    Where two patches have the same score to rounding, two right programs may keep one or the other. So
    those of a number of random images are taken whose closest scores on either side are farthest apart.

    Args:
        model: in eval mode.
        like: [B, channels, height, width], for the shape, dtype and device.
        batches: sizes of the batches.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (max(_CANDIDATES, sum(batches)), *like.shape[1:])
    images = torch.randn(shape, generator=generator).to(like)
    found = find_stages(model)
    gaps = torch.full((len(images),), torch.inf)
    if found:
        with recording(found, TokenRecord(private=True)) as record:
            model(images)
        for plan in (record.trail.plan(stage) for stage in record.trail.stages):
            if plan.scores is not None and not plan.keeps_all:
                ordered = plan.scores.double().sort(dim=1, descending=True).values
                num_kept = plan.kept.shape[1]
                gap = (ordered[:, num_kept - 1] - ordered[:, num_kept]) / ordered.abs().amax(dim=1)
                gaps = gaps.minimum(gap.cpu())
    order = gaps.argsort(descending=True, stable=True)[: sum(batches)]
    return list(images[order.to(images.device)].split(list(batches)))


@torch.no_grad()
def compare(model: nn.Module, run: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> float:
    """Return the largest difference between `model` and what `run` computes of the same images.

    Raises:
        ValueError: it is more than rounding, or the outputs have another shape or dtype.
    """
    largest = 0.0
    for images in batches:
        expected, found = model(images), run(images)
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise ValueError(
                f"the exported model is not right, and was removed: for {len(images)} images it gives "
                f"{found.dtype} {tuple(found.shape)}, the model {expected.dtype} {tuple(expected.shape)}"
            )
        scale = float(expected.abs().max())
        difference = float((found.to(expected.device) - expected).abs().max())
        # Written so that NaN is refused.
        if not difference <= TOLERANCES[expected.dtype] * scale:
            raise ValueError(
                f"the exported model is not right, and was removed: for {len(images)} images its logits "
                f"differ by {difference:.3g} from the model's, of which the largest is {scale:.3g}"
            )
        largest = max(largest, difference)
    return largest


@dataclass(frozen=True)
class Agreement:
    """How a file of int8 compares with the model that it was made of, on images that did not calibrate it.

    Attributes:
        calibrated_on: number of images that the ranges of the activations come from.
        images: number of other images, which the two were compared on.
        cosine: mean over these of the cosine between the two vectors of logits.
        least_cosine: that of the image with the least.
        same_class: share of these for which both have the same largest logit.
    """

    calibrated_on: int
    images: int
    cosine: float
    least_cosine: float
    same_class: float


@torch.no_grad()
def agreement(
    model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, calibrated_on: int
) -> tuple[Agreement, float]:
    """Return how what `run` computes of images agrees with the model, and the largest difference of a logit.

    Raises:
        ValueError: the logits are not finite, or the outputs have another shape.
    """
    batches = images.split(_CANDIDATES)
    expected, found = (torch.cat([each(batch) for batch in batches]) for each in (model, run))
    if found.shape != expected.shape or not found.isfinite().all():
        raise ValueError(
            f"the model in int8 is not right, and was removed: for {len(images)} images it gives "
            f"{tuple(found.shape)}{'' if found.isfinite().all() else ' with NaN or infinity'}, the model "
            f"{tuple(expected.shape)}"
        )
    cosines = torch.cosine_similarity(expected.double(), found.double(), dim=1)
    same = (expected.argmax(dim=1) == found.argmax(dim=1)).double().mean()
    compared = Agreement(calibrated_on, len(images), float(cosines.mean()), float(cosines.min()), float(same))
    return compared, float((found - expected).abs().max())
