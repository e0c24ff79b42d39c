"""Datasets that build whole batches for torch's DataLoader, from the samples that an order lists."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from evit_ext._util.randomness import derive_seed, seeded
from evit_ext.data.cluttered_digits import ClutteredDigits
from evit_ext.data.digits import Digits
from evit_ext.data.images import Unreadable, printable
from evit_ext.data.order import Place
from evit_ext.data.splits import ImageFiles
from evit_ext.data.token_label_maps import patch_labels, read_label_map
from evit_ext.data.transforms import CropWithLabels, Transform

#: Key of the random numbers for augmentation, which must differ from those for shuffling.
AUGMENTATION = 2
#: This many unreadable images in a row mean a broken data set, not a few bad files.
MAX_IN_A_ROW = 100


class Batch(NamedTuple):
    """A micro-batch of b images.

    Attributes:
        images: float32 [b, 3, S, S], normalized.
        labels: int64 [b].
        token_labels: class probabilities of the patches, float32 [b, patches, classes], patches row by row;
            None without token labels.
        unreadable: images that could not be read for this batch. In training they are replaced by others; in
            evaluation they are left out, so b is smaller and can be 0.
    """

    images: Tensor
    labels: Tensor
    token_labels: Tensor | None = None
    unreadable: tuple[Unreadable, ...] = ()


#: An image as the model sees it, its token labels or None, and its label.
Sample = tuple[Tensor, Tensor | None, int]


class TokenLabels(NamedTuple):
    """Where the token labels are, `<class>/<name>.pt` for an image `<class>/<name>.<ending>`, and how to read
    them; see `token_label_maps`."""

    folder: Path
    patch_grid: tuple[int, int]
    num_classes: int


class ImageBatches(Dataset[Batch]):
    """Batches of images from files.

    Args:
        files: the images.
        num_classes: labels must be in [0, num_classes).
        image_size: S.
        transform: from an RGB image to float32 [3, S, S]; :class:`CropWithLabels` with `token_labels`.
        seed: of the run; together with epoch and position it seeds the transform.
        replace: whether an unreadable image is replaced by the next readable one.
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
            RuntimeError: too many images in a row are unreadable.
            ValueError: a label is out of range, or token labels are malformed.
            FileNotFoundError: an image has no token labels.
        """
        made: list[Sample] = []
        unreadable: list[Unreadable] = []
        for place in places:
            sample = self._sample(place, unreadable)
            if sample is not None:
                made.append(sample)
        return collate(made, self.image_size, unreadable)

    def _sample(self, place: Place, unreadable: list[Unreadable]) -> Sample | None:
        """Return the first readable image from a place on; without `replace`, only that one is tried."""
        seed, index = derive_seed(self.seed, place.epoch, place.position, AUGMENTATION), place.image
        for _ in range(min(MAX_IN_A_ROW, len(self.files)) if self.replace else 1):
            found = self._transformed(index, seed)
            if not isinstance(found, Unreadable):
                return found
            unreadable.append(found)
            index = (index + 1) % len(self.files)
        if self.replace:
            raise broken_data_set(unreadable[-1])
        return None

    def _transformed(self, index: int, seed: int) -> Sample | Unreadable:
        found = self.files.read(index)
        if isinstance(found, Unreadable):
            return found
        image, label = found
        path = self.files.path(index)
        check_label(label, self.num_classes, path)
        with seeded(seed):
            seen = transformed(image, self.transform, path)
        if isinstance(seen, Unreadable) or self.token_labels is None:
            return seen if isinstance(seen, Unreadable) else (seen, None, label)
        view, crop = seen
        folder, patch_grid, num_classes = self.token_labels
        scores, classes = read_label_map(folder / f"{self.files.stem(index)}.pt", num_classes)
        return view, patch_labels(scores, classes, crop, patch_grid, num_classes), label


class DigitBatches(Dataset[Batch]):
    """Batches of digits, plain or cluttered. Cluttered digits get new canvases in each epoch.

    Args:
        digits: the data set.
        fixed: keep the canvases of epoch 0 in all epochs.
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
    made: Sequence[Sample],
    image_size: tuple[int, int],
    unreadable: Sequence[Unreadable],
) -> Batch:
    """Return a batch of images, labels and, for all or none of them, token labels; it may be empty."""
    images = torch.stack([image for image, _, _ in made]) if made else torch.empty(0, 3, *image_size)
    token_labels = [labels for _, labels, _ in made if labels is not None]
    labels = torch.tensor([label for _, _, label in made], dtype=torch.int64)
    return Batch(images, labels, torch.stack(token_labels) if token_labels else None, tuple(unreadable))


def transformed(image: Image.Image, transform: Callable[[Image.Image], Any], path: str) -> Any:
    """Return what a transform makes of an image; a transform that fails makes the image :class:`Unreadable`.

    Raises:
        MemoryError: the machine has run out of memory.
    """
    try:
        return transform(image)
    except MemoryError:
        raise
    except Exception as error:  # of Pillow, torchvision and timm
        size = f"{image.width}x{image.height} pixels"
        return Unreadable(printable(path), f"cannot be prepared ({size}): {type(error).__name__}: {error}")


def check_label(label: int, num_classes: int, path: str) -> None:
    """Raise ValueError unless a label is in [0, num_classes)."""
    if not 0 <= label < num_classes:
        raise ValueError(f"{path} has label {label}: expected one from 0 to {num_classes - 1}")


def broken_data_set(last: Unreadable) -> RuntimeError:
    """Return the error for a data set of which :data:`MAX_IN_A_ROW` images in a row cannot be read."""
    return RuntimeError(
        f"too many images in a row cannot be read (at most {MAX_IN_A_ROW}), the last of them "
        f"{last.path}: {last.reason}"
    )


def unchanged(batch: Any) -> Any:
    """Return the batch: the data sets make whole batches, so DataLoader has nothing to collate."""
    return batch


def start_worker(worker: int) -> None:
    """Make a DataLoader worker ignore signals that are meant for the run, so that the run can end in order.

    Ctrl-C in a terminal and SIGTERM from a scheduler reach all processes of the run. A worker exits only on a
    SIGTERM from its own main process, which torch sends to workers that do not respond, or, as all torch
    workers do, within seconds after that process has ended.
    """
    signal.set_wakeup_fd(-1)  # that of the run, whose copy this process has
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(128 + signal.SIGTERM)
