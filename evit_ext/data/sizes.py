"""How many batches images make."""

from __future__ import annotations


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Return the number of full batches in an epoch.

    Raises:
        ValueError: there is none.
    """
    if num_images < batch_size:
        raise ValueError(
            f"the training data has {num_images} images, fewer than the {batch_size} of one batch: "
            "expected a smaller batch_size, or more data"
        )
    return num_images // batch_size
