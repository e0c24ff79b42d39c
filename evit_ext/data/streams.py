"""Data sets that are read from front to back: WebDataset shards, and streamed Hugging Face data sets.

timm's readers list the shards and count the images. We read them ourselves, because timm's readers only log
unreadable images, keep decoded images in memory to shuffle them, and with several processes evaluate some
images twice and others never.

Streams have limits. Their order depends on the number of processes and workers. In an epoch, each worker
repeats its own shards until the epoch is full, so with shards of different sizes some images come more often
than others. And the middle of an epoch can only be reached by reading everything before it.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from timm.data.readers import create_reader
from torch.utils.data import IterableDataset, get_worker_info

from evit_ext._util.messages import shown
from evit_ext._util.randomness import derive_seed, seeded
from evit_ext.data.batches import (
    AUGMENTATION,
    MAX_IN_A_ROW,
    Batch,
    Sample,
    broken_data_set,
    check_label,
    collate,
    transformed,
)
from evit_ext.data.classes import match_classes
from evit_ext.data.images import ImageLimits, Unreadable, printable, read_image
from evit_ext.data.shards import Encoded, read_tar
from evit_ext.data.splits import find_folder, need
from evit_ext.data.transforms import Transform

#: Number of encoded images from which a shuffled stream draws the next one.
SHUFFLE_BUFFER = 2048
# Key of the random numbers that shuffle a stream.
_STREAM = 3


class Share(NamedTuple):
    """A worker's part of a stream: number `worker` of the `workers` in all processes."""

    worker: int
    workers: int
    rank: int
    world_size: int


@runtime_checkable
class Source(Protocol):
    """Where a stream comes from.

    Attributes:
        num_images: None if not known.
        classes: the number of every class by name; empty if not known.
    """

    num_images: int | None
    classes: Mapping[str, int]

    def number_classes(self, known: Sequence[str], of_model: str) -> None:
        """Number the classes as a model does, whose classes are called `known`; matched by name.

        Raises:
            ValueError: there is a class that the model does not know.
        """

    def most_workers(self, world_size: int) -> int:
        """Return how many workers a process can have without any of them having nothing to read."""

    def read(self, share: Share, seed: int | None) -> Iterator[Encoded | Unreadable]:
        """Read a share once, shuffled if a seed is given. All shares together hold every image once."""


class WebDataset:
    """WebDataset shards in a folder: tar files in which the files of a sample share their name.

    A sample has an image (.jpg, .jpeg, .png or .webp) and a .cls file with its label as a number. With at
    least as many shards as workers in all processes, each worker has its own shards; otherwise all workers
    read all shards and each takes its part of the samples.

    Args:
        data: the folder. Only files in it are read, not webdataset's other addresses: some of these are
            commands to run, which a settings file must not contain.
        split: a split in the folder's _info.json as timm writes it, or shards such as
            "train-{0000..0127}.tar", with the number of their images after a "|".
        num_images: None uses the split's own number.

    Raises:
        ValueError: `data` is not given, it has no such split, or a shard is outside the folder.
        FileNotFoundError: the folder or a shard is missing.
        ModuleNotFoundError: webdataset is not installed.
    """

    def __init__(self, data: str | None, split: str, num_images: int | None = None) -> None:
        need("webdataset", "wds")
        folder = find_folder(data)
        try:
            reader = create_reader("wds/", root=str(folder), split=split, num_samples=num_images)
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"{folder} has no split {shown(split)}: expected one of its _info.json, or shards such as "
                f"train-{{0000..0127}}.tar, got {error}"
            ) from error
        self.num_images: int | None = reader.num_samples or None
        self.classes: Mapping[str, int] = {}
        self.shards = [folder / name for name in reader.split_info.filenames]
        for shard in self.shards:
            if folder.resolve() not in shard.resolve().parents:
                raise ValueError(f"shards of split {shown(split)} must lie in {folder}, got {shard}")
            if not shard.is_file():
                raise FileNotFoundError(f"split {shown(split)} of {folder} has no shard {shard}")

    def number_classes(self, known: Sequence[str], of_model: str) -> None:
        """Do nothing: labels are numbers, without names."""

    def most_workers(self, world_size: int) -> int:
        return 1 << 30

    def read(self, share: Share, seed: int | None) -> Iterator[Encoded | Unreadable]:
        shards = list(self.shards)
        if seed is not None:
            random.Random(seed).shuffle(shards)
        if len(shards) >= share.workers:
            yield from (
                sample for shard in shards[share.worker :: share.workers] for sample in read_tar(shard)
            )
            return
        for number, sample in enumerate(sample for shard in shards for sample in read_tar(shard)):
            if number % share.workers == share.worker:
                yield sample


class HuggingFaceStream:
    """A streamed Hugging Face data set with images in "image" and labels in "label".

    Code that comes with a data set is never run. The library assigns whole files to workers, so there can be
    at most as many workers as files.

    Args:
        name: "hfids/" and a name on the hub, or a local folder of, say, Parquet files.
        data: the cache folder.
        split: name of the split.
        num_images: None uses the data set's own number.

    Raises:
        ValueError: the number of images is not known.
        ModuleNotFoundError: datasets is not installed.
    """

    def __init__(self, name: str, data: str | None, split: str, num_images: int | None = None) -> None:
        need("datasets", name)
        from datasets import Image as ImageFeature

        # timm's reader requires a number even for evaluation, which does not need it.
        reader = create_reader(name, root=data, split=split, num_samples=num_images or 1)
        splits = reader.builder.info.splits or {}
        known = splits[split].num_examples if split in splits else None
        self.num_images: int | None = num_images or known or None
        stream = reader.builder.as_streaming_dataset(split=split)
        names = getattr((stream.features or {}).get("label"), "names", None) or []
        self.classes: Mapping[str, int] = {printable(name): label for label, name in enumerate(names)}
        self._numbers: dict[int, int] = {}
        self.stream = stream.cast_column("image", ImageFeature(decode=False))
        self.name = f"{name} {split}"

    def number_classes(self, known: Sequence[str], of_model: str) -> None:
        if self.classes:
            self._numbers = match_classes(self.classes, known, self.name, of_model)

    def most_workers(self, world_size: int) -> int:
        return self._part(0, world_size).num_shards

    def _part(self, rank: int, world_size: int, seed: int | None = None) -> Any:
        from datasets.distributed import split_dataset_by_node

        stream = self.stream
        if seed is not None:
            # This shuffles only the files: StreamBatches shuffles images. Recent versions would otherwise
            # read several files at once, and count them as one that cannot be split between workers.
            one_file = "max_buffer_input_shards"
            more = {one_file: 1} if one_file in signature(stream.shuffle).parameters else {}
            stream = stream.shuffle(seed=seed, buffer_size=1, **more)
        return split_dataset_by_node(stream, rank=rank, world_size=world_size)

    def read(self, share: Share, seed: int | None) -> Iterator[Encoded | Unreadable]:
        # The library itself splits a process's part between torch's workers.
        for number, item in enumerate(self._part(share.rank, share.world_size, seed)):
            image = item["image"]
            path = f"{self.name}: {image['path'] or f'image {number} of worker {share.worker}'}"
            data = image["bytes"]
            if data is None:
                try:
                    data = Path(image["path"]).read_bytes()
                except OSError as error:
                    yield Unreadable(path, f"{type(error).__name__}: {error}")
                    continue
            if item.get("label") is None:
                raise ValueError(f"{path} has no label")
            label = int(item["label"])
            yield Encoded(data, self._numbers.get(label, label), path)


class StreamBatches(IterableDataset[Batch]):
    """Batches of a stream: endless in training, otherwise every image once over all processes.

    Unreadable images are reported and left out. Each DataLoader worker makes its own batches, and the loader
    takes turns.

    Args:
        source: see :class:`Source`.
        batch_size: of one process; a worker's last batch can be smaller.
        num_classes: labels must be in [0, num_classes).
        image_size: S.
        transform: from an RGB image to float32 [3, S, S].
        limits: see :class:`ImageLimits`.
        seed: of the run.
        training: shuffle the stream and repeat it without end.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        num_classes: int,
        image_size: tuple[int, int],
        transform: Transform,
        limits: ImageLimits,
        seed: int,
        training: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.num_classes = num_classes
        self.image_size = image_size
        self.transform = transform
        self.limits = limits
        self.seed = seed
        self.training = training
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; running workers do not notice."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of this worker.

        Raises:
            RuntimeError: too many images in a row are unreadable, or in training there is none to read.
            ValueError: a label is out of range.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        share = Share(self.rank * workers + worker, self.world_size * workers, self.rank, self.world_size)
        made: list[Sample] = []
        unreadable: list[Unreadable] = []
        in_a_row = number = 0
        for sample in self._samples(share):
            found = self._decoded(
                sample, derive_seed(self.seed, self.epoch, share.worker, number, AUGMENTATION)
            )
            if isinstance(found, Unreadable):
                unreadable.append(found)
                in_a_row += 1
                if in_a_row >= MAX_IN_A_ROW:
                    raise broken_data_set(found)
                continue
            in_a_row = 0
            made.append(found)
            number += 1
            if len(made) == self.batch_size:
                yield collate(made, self.image_size, unreadable)
                made, unreadable = [], []
        if made or unreadable:
            yield collate(made, self.image_size, unreadable)

    def _decoded(self, sample: Encoded | Unreadable, seed: int) -> Sample | Unreadable:
        if isinstance(sample, Unreadable):
            return sample
        image = read_image(partial(io.BytesIO, sample.data), sample.path, self.limits)
        if isinstance(image, Unreadable):
            return image
        check_label(sample.label, self.num_classes, sample.path)
        with seeded(seed):
            view = transformed(image, self.transform, sample.path)
        return view if isinstance(view, Unreadable) else (view, None, sample.label)

    def _samples(self, share: Share) -> Iterator[Encoded | Unreadable]:
        if not self.training:
            yield from self.source.read(share, None)
            return
        turn = 0
        while True:
            seed = derive_seed(self.seed, self.epoch, turn, _STREAM)
            samples = shuffled(self.source.read(share, seed), derive_seed(seed, share.worker))
            nothing = True
            for sample in samples:
                nothing = False
                yield sample
            if nothing:
                raise RuntimeError(
                    f"worker {share.worker} of {share.workers} has no images to read: expected fewer workers"
                )
            turn += 1


def shuffled(
    samples: Iterable[Encoded | Unreadable], seed: int, size: int = SHUFFLE_BUFFER
) -> Iterator[Encoded | Unreadable]:
    """Yield the samples shuffled: each is drawn from a buffer of the next `size` samples."""
    generator = random.Random(seed)
    waiting: list[Encoded | Unreadable] = []
    for sample in samples:
        if len(waiting) < size:
            waiting.append(sample)
            continue
        chosen = generator.randrange(size)
        yield waiting[chosen]
        waiting[chosen] = sample
    generator.shuffle(waiting)
    yield from waiting
