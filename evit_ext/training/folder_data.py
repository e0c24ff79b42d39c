"""The training and validation images of a folder, as a run's configuration says; torch is not needed."""

from __future__ import annotations

from evit_ext.data.images import ImageLimits
from evit_ext.data.listing import Listing
from evit_ext.data.splits import ImageFiles, find_folder, find_parts, no_split, open_part
from evit_ext.training.config import TrainConfig
from evit_ext.training.waiting import told


def open_folder(
    config: TrainConfig, training: bool, listings: dict[str, Listing] | None = None
) -> tuple[ImageFiles | None, ImageFiles | None]:
    """Return the training data, if it is wanted, and the validation data, if there is to be any.

    Args:
        config: of the run.
        training: whether training data is wanted.
        listings: as of :func:`open_part`.

    Raises:
        ValueError: there are no images, or settings contradict the data.
        FileNotFoundError: there is no such folder, or no such split.
    """
    if config.train_images is not None:
        raise ValueError("train_images is for streams and cluttered-digits, not for a folder")
    limits = ImageLimits(config.max_image_pixels)
    train, val = find_parts(config.data, config.train_split, config.val_split, config.val_fraction)
    folder = find_folder(config.data)
    if training and train is None:
        raise no_split(folder, config.train_split)
    if config.val_split and val is None:
        raise no_split(folder, config.val_split)
    listings = {} if listings is None else listings
    with told(f"the files in {folder} to be listed"):
        opened = open_part(train, limits, listings) if training and train is not None else None
        if opened is not None and not len(opened):
            raise ValueError(
                f"{folder} has no image to train on: val_fraction {config.val_fraction:g} holds out all"
            )
        return opened, open_part(val, limits, listings) if val is not None else None
