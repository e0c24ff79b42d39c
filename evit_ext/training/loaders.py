"""The batches of a run, as its configuration says: transforms, order and workers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, Sampler

from evit_ext._util.messages import shown
from evit_ext._util.randomness import derive_seed
from evit_ext.data.batches import (
    Batch,
    ImageBatches,
    TokenLabels,
    start_worker,
    unchanged,
)
from evit_ext.data.classes import missing_classes
from evit_ext.data.images import ImageLimits, Unreadable
from evit_ext.data.listing import Listing
from evit_ext.data.order import EvaluationOrder, Place, TrainOrder
from evit_ext.data.sizes import steps_per_epoch
from evit_ext.data.splits import ImageFiles
from evit_ext.data.streams import Source, StreamBatches
from evit_ext.data.transforms import CropWithLabels, Transform, train_transform
from evit_ext.training.config import TrainConfig
from evit_ext.training.data_sets import Canvases, count_images, open_data, size_of
from evit_ext.training.ranks import Ranks
from evit_ext.training.shared_memory import check_shared_memory

__all__ = ["Batch", "Loaders", "Unreadable"]

# Key of the random numbers that torch's loader draws for its workers.
_WORKERS = 4


class Loaders:
    """The training and validation batches of one process, as a run's configuration says.

    Opening lists the files but reads none of them. `image` and `patch_grid` are needed only when batches are
    made, so they may be set after the model has been built for `num_classes`.

    Training batches depend on the configuration, the epoch and the step alone. They have the same bits
    whatever the number of workers, wherever an epoch is entered, and for any number of processes with the
    same `accumulation` · processes. For streams ("wds", "hfids/…") see `evit_ext.data.streams`.

    Args:
        config: of the run. Its `batch_size` is micro_batch · accumulation · processes.
        ranks: this process among all.
        micro_batch: images of a batch, b.
        accumulation: batches that this process takes for an optimizer step.
        image: as `timm.data.resolve_model_data_config` returns it: input_size, mean, std, interpolation,
            crop_pct and perhaps crop_mode. Digits use only input_size.
        patch_grid: rows and columns of the model's patches; for token labels.
        training: False opens the validation data only.
        classes: names of the model's classes, in order, by which those of the data are matched; by default
            those of the training data.
        of_model: what knows these classes, for messages.
        listings: of folders that have been listed already, by their paths.

    Attributes:
        num_classes: from the configuration, else from `classes` or the data.
        classes: names of the model's classes, in order; empty where the data does not name its classes.
        words: what there is to say about the data, a line each: files that are skipped, images held out,
            classes that the validation data lacks.
        steps_per_epoch: optimizer steps; 0 without training data.
        train_images: images that an epoch uses up: steps_per_epoch · batch_size.
        val_images: over all processes; None for a stream that does not say, or where `val_split` is "".

    Raises:
        ValueError: settings that contradict each other or the data, an unknown data set, a data set without
            images or smaller than a batch, classes of training and validation data that differ.
        FileNotFoundError: a folder, split or shard is missing.
        ModuleNotFoundError: an optional package is not installed.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        micro_batch: int,
        accumulation: int = 1,
        image: Mapping[str, Any] | None = None,
        patch_grid: tuple[int, int] | None = None,
        training: bool = True,
        classes: Sequence[str] | None = None,
        of_model: str = "the model",
        listings: dict[str, Listing] | None = None,
    ) -> None:
        batch_size = micro_batch * accumulation * ranks.world_size
        if training and batch_size != config.batch_size:
            raise ValueError(
                f"micro_batch {micro_batch}, accumulation {accumulation} and {ranks.world_size} processes "
                f"make {batch_size} images a step, batch_size is {config.batch_size}"
            )
        self.config, self.ranks = config, ranks
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.image, self.patch_grid = image, patch_grid
        self._train, self._val = open_data(config, training, listings)
        self.words = [words for data in (self._train, self._val) for words in getattr(data, "words", ())]
        self.classes: list[str] = []
        self.know_classes(classes, of_model)
        self.steps_per_epoch = 0
        if self._train is not None:
            size = size_of(self._train)
            if size is None:
                raise ValueError(
                    f"{shown(config.dataset)} does not say how many images it has: give train_images"
                )
            self.steps_per_epoch = steps_per_epoch(size, batch_size)
        self.train_images = self.steps_per_epoch * batch_size
        self.val_images = size_of(self._val) if self._val is not None else None
        if config.token_labels is not None and not isinstance(self._train, ImageFiles | None):
            raise ValueError(
                f"token_labels need images that have names of their own, got {shown(config.dataset)}"
            )
        if config.token_labels is not None and not config.augment:
            raise ValueError("token_labels need augment: it is the random crop that they are cut with")
        if config.repeated_aug > 1 and not isinstance(self._train, ImageFiles | None):
            raise ValueError(
                f"repeated_aug is for image files and 'hfds/NAME', not for {shown(config.dataset)}: expected "
                f"0, got {config.repeated_aug}"
            )
        if isinstance(self._train, Canvases) and (config.auto_augment or config.reprob):
            raise ValueError(
                f"images of {shown(config.dataset)} are not augmented: auto_augment must be none and reprob "
                f"0, got {shown(config.auto_augment)} and {config.reprob}"
            )

    @property
    def described(self) -> str:
        """What batches come from, to be said while one is waited for."""
        source = self.config.data or self.config.dataset
        return f"images of {source} from the loader ({self.config.workers} workers)"

    @property
    def val_batches(self) -> int | None:
        """How many batches of validation the first process has, where that is known."""
        images = self.val_images
        return (
            None
            if images is None
            else math.ceil(math.ceil(images / self.ranks.world_size) / self.micro_batch)
        )

    @property
    def named_classes(self) -> int:
        """How many classes the training data, or else the validation data, names."""
        data = self._train if self._train is not None else self._val
        return 0 if data is None else len(data.classes)

    def know_classes(self, classes: Sequence[str] | None, of_model: str = "the model") -> None:
        """Number the classes of all data as a model does.

        Args:
            classes: names of the model's classes, in order; None takes those of the training data.
            of_model: what knows them, for messages.

        Raises:
            ValueError: the data has a class that the model does not know, or more than `num_classes`.
        """
        self._name_classes(classes, of_model)
        self.num_classes = _num_classes(self.config, self.classes)
        if self.classes:
            self.classes += [f"class {number}" for number in range(len(self.classes), self.num_classes)]

    def _name_classes(self, classes: Sequence[str] | None, of_model: str) -> None:
        train, val = self._train, self._val
        if classes is not None:
            self.classes = list(classes)
        else:
            first = train if train is not None and train.classes else val
            self.classes = sorted(first.classes, key=first.classes.__getitem__) if first is not None else []
            of_model = "the training data"
        if not self.classes:
            return
        for data in (train, val):
            if data is not None:
                data.number_classes(self.classes, of_model)
        if val is not None and val.classes and (missing := missing_classes(val.classes, self.classes)):
            self.words.append(f"the validation data has no image of {missing}, which {of_model} has")

    def train(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this process' batches of an epoch from a step on: `accumulation` for each step.

        From a stream, everything before `first_step` is read and thrown away.

        Raises:
            ValueError: no training data, the epoch has no such step, or `image` or `patch_grid` is missing;
                a label out of range, or bad token labels.
            FileNotFoundError: an image has no token labels.
            RuntimeError: too many images in a row cannot be read.
        """
        if self._train is None:
            raise ValueError("there is no training data: the loaders were opened with training=False")
        if not 0 <= first_step <= self.steps_per_epoch:
            raise ValueError(f"first_step must be in [0, {self.steps_per_epoch}], got {first_step}")
        config, ranks = self.config, self.ranks
        if isinstance(self._train, Source):
            batches = self._stream(self._train, training=True)
            batches.set_epoch(epoch)
            loader = self._loader(batches, None, epoch)
            steps = slice(first_step * self.accumulation, self.steps_per_epoch * self.accumulation)
            return islice(loader, steps.start, steps.stop)
        order = TrainOrder(
            count_images(self._train),
            self.micro_batch,
            self.accumulation,
            ranks.rank,
            ranks.world_size,
            config.seed,
            max(config.repeated_aug, 1),
        )
        order.start(epoch, first_step)
        return self._loader(self._batches(self._train, training=True), order, epoch)

    def val(self) -> Iterator[Batch]:
        """Yield this process' part of the validation data: each image once over all processes.

        Batches have at most `micro_batch` images, perhaps none; processes can differ in their number.

        Raises:
            ValueError: no validation data, or `image` is missing; a label out of range.
            RuntimeError: too many images of a stream in a row cannot be read.
        """
        if self._val is None:
            raise ValueError("there is no validation data: val_split is empty")
        if isinstance(self._val, Source):
            return self._loader(self._stream(self._val, training=False), None, 0)
        order = EvaluationOrder(
            count_images(self._val), self.micro_batch, self.ranks.rank, self.ranks.world_size
        )
        return self._loader(self._batches(self._val, training=False), order, 0)

    def some_val(self, count: int) -> Batch:
        """Return up to `count` validation images, spread over the data; of a stream the first.

        Raises:
            ValueError: no validation data, or `image` is missing.
        """
        if self._val is None:
            raise ValueError("there is no validation data: val_split is empty")
        if isinstance(self._val, Source):
            return next(iter(self._stream(self._val, training=False)))
        images = min(count, size := count_images(self._val))
        places = [Place(0, number * size // images, number * size // images) for number in range(images)]
        batches: Any = self._batches(self._val, training=False)
        found: Batch = batches.__getitems__(places)
        return found

    def _loader(
        self, batches: Dataset[Batch], order: Sampler[list[Place]] | None, epoch: int
    ) -> Iterator[Batch]:
        workers, pinned = self.config.workers, self.ranks.device.type == "cuda"
        if isinstance(batches, StreamBatches):
            workers = min(workers, batches.source.most_workers(self.ranks.world_size))
        loader = DataLoader(
            batches,
            batch_sampler=order,
            batch_size=1 if order is not None else None,
            num_workers=workers,
            collate_fn=unchanged,
            pin_memory=pinned,
            worker_init_fn=start_worker,
            # Its own: otherwise it would draw from the process' random numbers.
            generator=torch.Generator().manual_seed(derive_seed(self.config.seed, epoch, _WORKERS)),
        )
        for batch in loader:
            # Pinning makes a list of a tuple.
            yield batch._replace(unreadable=tuple(batch.unreadable))

    def _image(self) -> Mapping[str, Any]:
        if self.image is None:
            raise ValueError("image must say how the model wants its images, as timm.data does, got none")
        return self.image

    def _size(self) -> tuple[int, int]:
        height, width = self._image()["input_size"][-2:]
        return height, width

    def check_shared_memory(self) -> None:
        """Raise ValueError if the batches of the workers do not fit into /dev/shm."""
        height, width = self._size()
        numbers = 3 * height * width
        if self.config.token_labels is not None and self.patch_grid is not None:
            numbers += self.patch_grid[0] * self.patch_grid[1] * self.num_classes
        check_shared_memory(self.config.workers, 4 * self.micro_batch * numbers)

    def _limits(self) -> ImageLimits:
        image = self._image()
        shorter = min(self._size()) / (self.config.crop_pct or image["crop_pct"])
        return ImageLimits(self.config.max_image_pixels, math.ceil(shorter))

    def _stream(self, source: Source, training: bool) -> StreamBatches:
        return StreamBatches(
            source,
            self.micro_batch,
            self.num_classes,
            self._size(),
            self._transform(training),
            self._limits(),
            self.config.seed,
            training,
            self.ranks.rank,
            self.ranks.world_size,
        )

    def _batches(self, data: ImageFiles | Canvases, training: bool) -> Dataset[Batch]:
        if isinstance(data, Canvases):
            return data.batches(self._size())
        labelled = training and self.config.token_labels is not None
        data.limits = self._limits()
        return ImageBatches(
            data,
            self.num_classes,
            self._size(),
            CropWithLabels(self._train_arguments()) if labelled else self._transform(training),
            self.config.seed,
            replace=training,
            token_labels=self._token_labels() if labelled else None,
        )

    def _token_labels(self) -> TokenLabels:
        if self.patch_grid is None:
            raise ValueError("patch_grid must be the model's rows and columns of patches for token labels")
        folder = Path(str(self.config.token_labels))
        return TokenLabels(folder, self.patch_grid, self.num_classes)

    def _transform(self, training: bool) -> Transform:
        if training and self.config.augment:
            return train_transform(**self._train_arguments())
        image = self._image()
        return create_transform(
            input_size=image["input_size"],
            interpolation=image["interpolation"],
            mean=image["mean"],
            std=image["std"],
            crop_pct=self.config.crop_pct or image["crop_pct"],
            crop_mode=image.get("crop_mode"),
        )

    def _train_arguments(self) -> dict[str, Any]:
        config, image = self.config, self._image()
        return {
            "input_size": image["input_size"],
            "scale": config.scale,
            "ratio": config.ratio,
            "hflip": config.hflip,
            "color_jitter": config.color_jitter or None,
            "auto_augment": config.auto_augment,
            "interpolation": config.interpolation,
            "mean": image["mean"],
            "std": image["std"],
            "re_prob": config.reprob,
            "re_mode": config.remode,
            "re_count": config.recount,
        }


def _num_classes(config: TrainConfig, classes: Sequence[str]) -> int:
    found = len(classes)
    if config.num_classes is None:
        if not found:
            raise ValueError(
                f"data set {shown(config.dataset)} does not say how many classes it has: give num_classes"
            )
        return found
    if config.num_classes < found:
        raise ValueError(f"num_classes is {config.num_classes}, but the data has {found} classes")
    return config.num_classes
