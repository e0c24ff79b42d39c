"""From a run's configuration to its data sets: a folder, tar files, shards, Hugging Face, or digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evit_ext._util.messages import shown
from evit_ext.data.batches import DigitBatches
from evit_ext.data.classes import match_classes
from evit_ext.data.cluttered_digits import ClutteredDigits
from evit_ext.data.digits import Digits, load_scans
from evit_ext.data.images import ImageLimits
from evit_ext.data.listing import Listing
from evit_ext.data.splits import ImageFiles, open_arrow
from evit_ext.data.streams import HuggingFaceStream, Source, WebDataset
from evit_ext.training.config import TrainConfig
from evit_ext.training.folder_data import open_folder

# The test canvases do not follow the seed of the training: runs with different seeds see the same ones.
_TEST_SEED = 1797
_DIGITS = ("digits", "cluttered-digits")


class Canvases:
    """A split of a digits data set, whose images are only drawn once their size is known."""

    classes: Mapping[str, int] = {str(digit): digit for digit in range(10)}

    def __init__(self, config: TrainConfig, training: bool) -> None:
        self.config = config
        self.training = training
        self.split = "train" if training else "test"
        self.source = config.dataset
        scans = len(load_scans(self.split)[0])
        self.size = scans if config.dataset == "digits" else 10 * scans
        if training and config.train_images is not None:
            if config.dataset == "digits":
                raise ValueError(f"train_images is not for 'digits': it has {scans} images")
            self.size = config.train_images

    def number_classes(self, known: Sequence[str], of_model: str) -> None:
        """Raise ValueError unless a model knows the ten digits by these numbers."""
        numbers = match_classes(self.classes, known, self.source, of_model)
        if any(digit != number for digit, number in numbers.items()):
            raise ValueError(f"{of_model} has the digits in another order than {self.source}")

    def batches(self, size: tuple[int, int]) -> DigitBatches:
        """Return the batches of images [3, S, S]; ValueError unless they are square."""
        side = size[0]
        if size != (side, side):
            raise ValueError(f"the images of {shown(self.config.dataset)} are square, got {size}")
        if self.config.dataset == "digits":
            return DigitBatches(Digits(self.split, side), fixed=True)
        seed = self.config.seed if self.training else _TEST_SEED
        digits = ClutteredDigits(self.split, side, self.size, seed, 0, self.config.difficulty)
        return DigitBatches(digits, fixed=not self.training)


#: What :func:`open_data` opens.
Data = ImageFiles | Canvases | Source


def open_data(
    config: TrainConfig, training: bool, listings: dict[str, Listing] | None = None
) -> tuple[Data | None, Data | None]:
    """Return the training data, if it is wanted, and the validation data, if there is to be any.

    `listings` is as of :func:`evit_ext.data.splits.open_part`.
    """
    if config.dataset == "":
        return open_folder(config, training, listings)
    train = _open_named(config, True) if training else None
    return train, _open_named(config, False) if config.val_split else None


def _open_named(config: TrainConfig, training: bool) -> Data:
    split = config.train_split if training else config.val_split
    dataset, prefix = config.dataset, config.dataset.partition("/")[0]
    number = config.train_images if training else None
    if dataset in _DIGITS:
        if config.data is not None:
            raise ValueError(
                f"dataset {shown(dataset)} needs no files: data must be none, or dataset, got "
                f"{shown(config.data)}"
            )
        return Canvases(config, training)
    if dataset == "wds":
        return WebDataset(config.data, split, number)
    if prefix == "hfids" and prefix != dataset:
        return HuggingFaceStream(dataset, config.data, split, number)
    if prefix == "hfds" and prefix != dataset:
        if number is not None:
            raise ValueError(f"train_images is for streams and cluttered-digits, not for {shown(dataset)}")
        return open_arrow(dataset, config.data, split, ImageLimits(config.max_image_pixels))
    raise ValueError(
        f"unknown dataset {shown(dataset)}: expected none for a folder of images or tar files, 'wds', "
        "'hfds/NAME', 'hfids/NAME', 'digits' or 'cluttered-digits'"
    )


def count_images(data: ImageFiles | Canvases) -> int:
    """Return how many images there are."""
    return data.size if isinstance(data, Canvases) else len(data)


def size_of(data: Data) -> int | None:
    """Return how many images there are, if it is known."""
    return data.num_images if isinstance(data, Source) else count_images(data)
