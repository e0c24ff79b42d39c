"""Whether an exported file computes what its model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
