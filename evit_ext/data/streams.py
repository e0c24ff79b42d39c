"""Data sets that are read from front to back: WebDataset's shards, and Hugging Face's in streaming mode.

timm's readers say which shards there are and how many images; reading is ours. Theirs log what they cannot
read and go on, hold decoded images to shuffle them, and over several processes evaluate some images twice and
others never.

What a stream cannot do: its order depends on the number of processes and workers; an epoch goes through each
worker's own shards until the epoch is full, so that with shards of different sizes some images come more
often than others; and the middle of an epoch is only reached by reading all that lies before.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from inspect import signature
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, runtime_checkable

from PIL import Image
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from evit_ext.data.batches import (
    AUGMENTATION,
    MAX_IN_A_ROW,
    Batch,
    check_label,
    collate,
    too_many,
)
from evit_ext.data.images import Unreadable, find_folder, need, read_image
from evit_ext.data.transforms import Transform
from evit_ext.randomness import derive_seed, seeded

#: Images, not yet decoded, among which the next one of a shuffled stream is drawn.
SHUFFLE_BUFFER = 2048
# Names the random numbers that shuffle a stream.
_STREAM = 3


class Encoded(NamedTuple):
    """An image as it is stored, where, and its label."""

    data: bytes
    label: int
    path: str


class Share(NamedTuple):
    """The part of a stream that a worker reads: that of number `worker` among `workers`, of all processes."""

    worker: int
    workers: int
    rank: int
    world_size: int


@runtime_checkable
class Source(Protocol):
    """Where a stream comes from.

    Attributes:
        num_images: None where it is not known.
        classes: the name and number of every class; empty where they are not known.
    """

    num_images: int | None
    classes: Mapping[str, int]

    def most_workers(self, world_size: int) -> int:
        """Return how many workers a process can have that all get something to read."""

    def read(self, share: Share, seed: int | None) -> Iterator[Encoded | Unreadable]:
        """Read a share once; shuffled with a seed. All shares together are every image once."""


class WebDataset:
    """Shards of WebDataset in a folder: tar files in which the files of a sample share their name.

    A sample has an image, .jpg, .jpeg, .png or .webp, and a file .cls with its label as a number. Where there
    are at least as many shards as workers in all processes, each has its own; otherwise all workers read all
    shards and each takes its part of the samples.

    Args:
        data: the folder. Only files in it are read: webdataset's addresses, some of which are commands to
            run, are not for files of settings.
        split: a split of the folder's _info.json as timm writes it, or shards such as
            "train-{0000..0127}.tar", with the number of their images after a "|".
        num_images: None takes what the split says.

    Raises:
        ValueError: `data` is not given, it has no such split, or a shard lies outside of it.
        FileNotFoundError: a folder or a shard is missing.
        ModuleNotFoundError: webdataset is not installed.
    """

    def __init__(self, data: str | None, split: str, num_images: int | None = None) -> None:
        need("webdataset", "wds")
        folder = find_folder(data)
        try:
            reader = create_reader("wds/", root=str(folder), split=split, num_samples=num_images)
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"{folder} has no split {split!r}: expected one of its _info.json, or shards such as "
                f"train-{{0000..0127}}.tar, got {error}"
            ) from error
        self.num_images: int | None = reader.num_samples or None
        self.classes: Mapping[str, int] = {}
        self.shards = [folder / name for name in reader.split_info.filenames]
        for shard in self.shards:
            if folder.resolve() not in shard.resolve().parents:
                raise ValueError(f"shards of split {split!r} must lie in {folder}, got {shard}")
            if not shard.is_file():
                raise FileNotFoundError(f"split {split!r} of {folder} has no shard {shard}")

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
    """A data set of Hugging Face's that is streamed, with its images in "image" and their labels in "label".

    Code that comes with a data set is never run. The library deals out whole files to workers, so there are
    at most as many as files.

    Args:
        name: "hfids/" and a name on their hub, or a folder here that holds, say, Parquet files.
        data: the cache.
        split: its name.
        num_images: None takes what the data set says.

    Raises:
        ValueError: the number of images is not known.
        ModuleNotFoundError: datasets is not installed.
    """

    def __init__(self, name: str, data: str | None, split: str, num_images: int | None = None) -> None:
        need("datasets", name)
        from datasets import Image as ImageFeature

        # timm's reader wants a number, also where none is needed: to evaluate.
        reader = create_reader(name, root=data, split=split, num_samples=num_images or 1)
        splits = reader.builder.info.splits or {}
        known = splits[split].num_examples if split in splits else None
        self.num_images: int | None = num_images or known or None
        stream = reader.builder.as_streaming_dataset(split=split)
        names = getattr((stream.features or {}).get("label"), "names", None) or []
        self.classes: Mapping[str, int] = {name: label for label, name in enumerate(names)}
        self.stream = stream.cast_column("image", ImageFeature(decode=False))
        self.name = f"{name} {split}"

    def most_workers(self, world_size: int) -> int:
        return self._part(0, world_size).num_shards

    def _part(self, rank: int, world_size: int, seed: int | None = None) -> Any:
        from datasets.distributed import split_dataset_by_node

        stream = self.stream
        if seed is not None:
            # The order of the files only: StreamBatches shuffles images. Recent versions would read several
            # files at once for it, and count them as one that cannot be dealt out.
            one_file = "max_buffer_input_shards"
            more = {one_file: 1} if one_file in signature(stream.shuffle).parameters else {}
            stream = stream.shuffle(seed=seed, buffer_size=1, **more)
        return split_dataset_by_node(stream, rank=rank, world_size=world_size)

    def read(self, share: Share, seed: int | None) -> Iterator[Encoded | Unreadable]:
        # The library itself deals out a process' part to torch's workers.
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
            yield Encoded(data, int(item["label"]), path)


def read_tar(shard: Path) -> Iterator[Encoded | Unreadable]:
    """Read the samples of a shard; a damaged shard is reported and given up where it is damaged."""
    sample: dict[str, bytes] = {}
    key = None
    try:
        with tarfile.open(shard, "r|*") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is None:
                    continue
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.partition(".")
                # As in WebDataset, a sample's name ends at the first dot.
                if (path.parent, stem) != key:
                    yield from _sample(shard, key, sample)
                    key, sample = (path.parent, stem), {}
                sample[ending.lower()] = file.read()
            end = tar.offset
        yield from _sample(shard, key, sample)
        # tarfile takes a file that breaks off between two members for a whole one.
        if shard.suffix == ".tar" and not _has_end_mark(shard, end):
            yield Unreadable(str(shard), "ReadError: the file breaks off, without the end mark of a tar file")
    except (OSError, EOFError, tarfile.TarError) as error:
        yield Unreadable(str(shard), f"{type(error).__name__}: {error}")


def _has_end_mark(shard: Path, position: int) -> bool:
    with shard.open("rb") as file:
        file.seek(position)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _sample(
    shard: Path, key: tuple[PurePosixPath, str] | None, files: dict[str, bytes]
) -> Iterator[Encoded | Unreadable]:
    if key is None:
        return
    endings = [ending for ending in ("jpg", "jpeg", "png", "webp") if ending in files]
    path = f"{shard}: {key[0] / key[1]}"
    if not endings or "cls" not in files:
        yield Unreadable(path, f"expected an image and .cls, found {', '.join(files)}")
    elif not files["cls"].strip().isdigit():
        yield Unreadable(path, f".cls must be a number, got {files['cls'][:20]!r}")
    else:
        yield Encoded(files[endings[0]], int(files["cls"]), f"{path}.{endings[0]}")


class StreamBatches(IterableDataset[Batch]):
    """Batches of a stream: in training without end, otherwise every image once over all processes.

    An image that cannot be read is reported and left out. With DataLoader's workers each one makes batches of
    its own, and the loader takes turns.

    Args:
        source: see :class:`Source`.
        batch_size: of one process; the last one of a worker is smaller.
        num_classes: labels must be in [0, num_classes).
        image_size: S.
        transform: from an image in RGB to float32 [3, S, S].
        max_pixels: a larger image counts as unreadable, and is not decoded.
        seed: of the run.
        training: shuffled, and over and over.
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
        max_pixels: int,
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
        self.max_pixels = max_pixels
        self.seed = seed
        self.training = training
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration (workers that run already do not see it)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of this worker.

        Raises:
            RuntimeError: too many images in a row cannot be read, or in training there is none to read.
            ValueError: a label out of range.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        share = Share(self.rank * workers + worker, self.world_size * workers, self.rank, self.world_size)
        made: list[tuple[Tensor, Tensor | None, int]] = []
        unreadable: list[Unreadable] = []
        in_a_row = number = 0
        for sample in self._samples(share):
            found = self._decoded(sample)
            if isinstance(found, Unreadable):
                unreadable.append(found)
                in_a_row += 1
                if in_a_row >= MAX_IN_A_ROW:
                    raise too_many(found)
                continue
            in_a_row = 0
            image, label, path = found
            check_label(label, self.num_classes, path)
            with seeded(derive_seed(self.seed, self.epoch, share.worker, number, AUGMENTATION)):
                made.append((self.transform(image), None, label))
            number += 1
            if len(made) == self.batch_size:
                yield collate(made, self.image_size, unreadable)
                made, unreadable = [], []
        if made or unreadable:
            yield collate(made, self.image_size, unreadable)

    def _decoded(self, sample: Encoded | Unreadable) -> tuple[Image.Image, int, str] | Unreadable:
        if isinstance(sample, Unreadable):
            return sample
        image = read_image(partial(io.BytesIO, sample.data), sample.path, self.max_pixels)
        return image if isinstance(image, Unreadable) else (image, sample.label, sample.path)

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
    """Yield the samples in another order: each drawn from the next `size` that have not been yet."""
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
