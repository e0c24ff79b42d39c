"""Batches, made of what the orders name: by torch's DataLoader, in its workers or without any."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from evit_ext.data.cluttered_digits import ClutteredDigits
from evit_ext.data.digits import Digits
from evit_ext.data.images import ImageFiles, Unreadable
from evit_ext.data.order import Place
from evit_ext.data.token_label_maps import patch_labels, read_label_map
from evit_ext.data.transforms import CropWithLabels, Transform
from evit_ext.randomness import derive_seed, seeded

#: Names the random numbers that augment, apart from those that shuffle.
AUGMENTATION = 2
#: So many images in a row that cannot be read are no longer single bad files.
MAX_IN_A_ROW = 100


class Batch(NamedTuple):
    """A micro-batch of b images.

    Attributes:
        images: float32 [b, 3, S, S], normalized.
        labels: int64 [b].
        token_labels: probabilities of the patches' classes, float32 [b, patches, classes], row by row; None
            without token labels.
        unreadable: images that could not be read while the batch was made. In training, others have taken
            their places; in evaluation they are missing from the batch, so that b is smaller, even 0.
    """

    images: Tensor
    labels: Tensor
    token_labels: Tensor | None = None
    unreadable: tuple[Unreadable, ...] = ()


class TokenLabels(NamedTuple):
    """Where the token labels lie, `<class>/<name>.pt` for an image `<class>/<name>.<ending>`, and how a patch
    gets its own; see `token_label_maps`."""

    folder: Path
    patch_grid: tuple[int, int]
    num_classes: int


class ImageBatches(Dataset[Batch]):
    """Batches of images from files.

    Args:
        files: the images.
        num_classes: labels must be in [0, num_classes).
        image_size: S.
        transform: from an image in RGB to float32 [3, S, S]; :class:`CropWithLabels` with `token_labels`.
        seed: of the run; with the epoch and the position it makes the random numbers of the transform.
        replace: whether the next readable image takes the place of one that is not.
        token_labels: None for none.
    """

    def __init__(
        self,
        files: ImageFiles,
        num_classes: int,
        image_size: tuple[int, int],
        transform: Transform | CropWithLabels,
        seed: int,
        replace: bool,
        token_labels: TokenLabels | None = None,
    ) -> None:
        self.files = files
        self.num_classes = num_classes
        self.image_size = image_size
        self.transform = transform
        self.seed = seed
        self.replace = replace
        self.token_labels = token_labels

    def __getitems__(self, places: Sequence[Place]) -> Batch:
        """Return the batch of these places.

        Raises:
            RuntimeError: too many images in a row cannot be read.
            ValueError: a label out of range, or bad token labels.
            FileNotFoundError: an image has no token labels.
        """
        made: list[tuple[Tensor, Tensor | None, int]] = []
        unreadable: list[Unreadable] = []
        for place in places:
            index, found = self._read(place.image, unreadable)
            if found is None:
                continue
            image, label = found
            check_label(label, self.num_classes, self.files.path(index))
            with seeded(derive_seed(self.seed, place.epoch, place.position, AUGMENTATION)):
                made.append((*self._transformed(image, index, label), label))
        return collate(made, self.image_size, unreadable)

    def _read(self, index: int, unreadable: list[Unreadable]) -> tuple[int, tuple[Image.Image, int] | None]:
        """Return the first image that can be read from `index` on, only looking there without `replace`."""
        for _ in range(min(MAX_IN_A_ROW, len(self.files)) if self.replace else 1):
            found = self.files.read(index)
            if not isinstance(found, Unreadable):
                return index, found
            unreadable.append(found)
            index = (index + 1) % len(self.files)
        if self.replace:
            raise too_many(unreadable[-1])
        return index, None

    def _transformed(self, image: Image.Image, index: int, label: int) -> tuple[Tensor, Tensor | None]:
        if self.token_labels is None:
            return self.transform(image), None  # type: ignore[return-value]
        view, crop = self.transform(image)
        folder, patch_grid, num_classes = self.token_labels
        scores, classes = read_label_map(folder / f"{self.files.stem(index, label)}.pt", num_classes)
        return view, patch_labels(scores, classes, crop, patch_grid, num_classes)


class DigitBatches(Dataset[Batch]):
    """Batches of digits, plain or cluttered; those of cluttered digits are new in each epoch.

    Args:
        digits: the data set.
        fixed: whether the canvases stay those of epoch 0.
    """

    def __init__(self, digits: Digits | ClutteredDigits, fixed: bool) -> None:
        self.digits = digits
        self.fixed = fixed

    def __getitems__(self, places: Sequence[Place]) -> Batch:
        """Return the batch of these places."""
        indices = [place.image for place in places]
        if isinstance(self.digits, ClutteredDigits):
            self.digits.set_epoch(0 if self.fixed else places[0].epoch)
            images, labels, _ = self.digits.render(indices)
            return Batch(images, labels)
        items = [self.digits[index] for index in indices]
        return Batch(torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items]))


def collate(
    made: Sequence[tuple[Tensor, Tensor | None, int]],
    image_size: tuple[int, int],
    unreadable: Sequence[Unreadable],
) -> Batch:
    """Return a batch of images with their token labels, all or none, and labels; there may be no images."""
    images = torch.stack([image for image, _, _ in made]) if made else torch.empty(0, 3, *image_size)
    token_labels = [labels for _, labels, _ in made if labels is not None]
    labels = torch.tensor([label for _, _, label in made], dtype=torch.int64)
    return Batch(images, labels, torch.stack(token_labels) if token_labels else None, tuple(unreadable))


def check_label(label: int, num_classes: int, path: str) -> None:
    """Raise ValueError unless a label is in [0, num_classes)."""
    if not 0 <= label < num_classes:
        raise ValueError(f"{path} has label {label}: expected one from 0 to {num_classes - 1}")


def too_many(last: Unreadable) -> RuntimeError:
    """Return the error for a data set that is broken as a whole."""
    return RuntimeError(
        f"too many images in a row cannot be read (at most {MAX_IN_A_ROW}), the last of them "
        f"{last.path}: {last.reason}"
    )


def as_it_is(batch: Any) -> Any:
    """Return the batch: the data sets make whole ones, DataLoader has nothing to put together."""
    return batch


def start_worker(worker: int) -> None:
    """Have a worker of a DataLoader outlive signals that are meant for the run, which wants to end in order.

    A terminal's Ctrl-C and a scheduler's SIGTERM reach all processes of the run. A worker only leaves on a
    SIGTERM of the process that it works for, by which torch ends workers that do not listen; and, as torch's
    workers do by themselves, within seconds after that process has gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_when_told, args=(os.getppid(),), daemon=True).start()


def _leave_when_told(master: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != master:
        continue
    os._exit(128 + signal.SIGTERM)
