"""Streams of shards and files: each image once in evaluation, full epochs, and bad images reported."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from image_data import damage, write_parquet, write_shards
from open_loaders import assert_equal, fingerprints, loaders

from evit_ext.data.streams import Encoded, WebDataset, read_tar, shuffled


@pytest.fixture(scope="module")
def spoilt(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("spoilt") / "data"
    shutil.copytree(folder, data)
    for split in ("train", "val"):
        damage(data / split / "flower")
    return data


WDS: dict[str, Any] = {"dataset": "wds", "val_split": "val", "num_classes": 2}


@pytest.mark.parametrize(("shards", "uneven"), [(1, False), (4, True), (5, False)])
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 1), (3, 0)])
def test_shards_are_evaluated_once(
    spoilt: Path, tmp_path: Path, shards: int, uneven: bool, world_size: int, workers: int
) -> None:
    data = write_shards(spoilt, tmp_path / "shards", shards, uneven)
    parts, reports = [], []
    for rank in range(world_size):
        opened = loaders(data, rank, world_size, workers=workers, **WDS)
        assert opened.val_images == 10
        batches = list(opened.val())
        parts += fingerprints(batches)
        reports += [report.path.rpartition(": ")[2] for batch in batches for report in batch.unreadable]
    assert sorted(parts) == fingerprints(loaders(spoilt).val())
    assert sorted(reports) == [f"flower_{number}.jpg" for number in range(4)]


@pytest.mark.parametrize(("world_size", "workers", "shards"), [(1, 0, 3), (1, 2, 3), (2, 2, 3), (3, 0, 5)])
def test_every_process_gets_the_batches_of_an_epoch(
    folder: Path, tmp_path: Path, world_size: int, workers: int, shards: int
) -> None:
    data = write_shards(folder, tmp_path / "shards", shards, uneven=True)
    everything = set(fingerprints(loaders(folder, augment=False).train(0)))
    seen = []
    for rank in range(world_size):
        opened = loaders(data, rank, world_size, accumulation=2, workers=workers, augment=False, **WDS)
        assert opened.steps_per_epoch == 14 // (4 * world_size)
        batches = list(opened.train(0))
        assert len(batches) == opened.steps_per_epoch * 2
        assert all(len(batch.labels) == 2 for batch in batches)
        seen += fingerprints(batches)
    assert set(seen) <= everything


def test_one_reader_goes_through_all_images_shuffled(folder: Path, tmp_path: Path) -> None:
    data = write_shards(folder, tmp_path / "shards", 3)
    opened = loaders(data, augment=False, **WDS)
    batches = list(opened.train(0))
    assert fingerprints(batches) == fingerprints(loaders(folder, augment=False).train(0))
    labels = [label for batch in batches for label in batch.labels.tolist()]
    assert labels != sorted(labels)
    other = [label for batch in opened.train(1) for label in batch.labels.tolist()]
    assert other != labels


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_entered_in_the_middle(spoilt: Path, tmp_path: Path, workers: int) -> None:
    data = write_shards(spoilt, tmp_path / "shards", 4)
    opened = loaders(data, accumulation=2, workers=workers, reprob=0.5, **WDS)
    whole = list(opened.train(3))
    assert any(batch.unreadable for batch in whole)
    assert_equal(list(opened.train(3)), whole)
    assert_equal(list(opened.train(3, 1)), whole[2:])


@pytest.mark.parametrize("inside", ["header", "data", "between"])
def test_a_shard_that_breaks_off_is_reported(folder: Path, tmp_path: Path, inside: str) -> None:
    data = write_shards(folder, tmp_path / "shards", 2)
    shard = data / "val-000.tar"
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    cut = {
        "header": members[4].offset + 100,
        "data": members[4].offset_data + 100,
        "between": members[4].offset,
    }
    shard.write_bytes(shard.read_bytes()[: cut[inside]])
    batches = list(loaders(data, **WDS).val())
    # Two samples of this shard, and all five of the other.
    assert len(fingerprints(batches)) == 7
    (report,) = [report for batch in batches for report in batch.unreadable]
    assert report.path == str(shard) and "ReadError" in report.reason


def test_samples_that_lack_something(folder: Path, tmp_path: Path) -> None:
    data = write_shards(folder, tmp_path / "shards", 1)
    with tarfile.open(data / "val-000.tar", "w") as tar:
        for name, content in (("a.txt", b"x"), ("b.jpg", b"x"), ("c.jpg", b"x"), ("c.cls", b"cat"),
                              ("d.png", b"y"), ("d.cls", b"1")):  # fmt: skip
            member = tarfile.TarInfo(f"in/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    a, b, c, d = read_tar(data / "val-000.tar")
    assert a == (f"{data}/val-000.tar: in/a", "expected an image and .cls, found txt")
    assert b == (f"{data}/val-000.tar: in/b", "expected an image and .cls, found jpg")
    assert c == (f"{data}/val-000.tar: in/c", ".cls must be a number, got b'cat'")
    assert d == Encoded(b"y", 1, f"{data}/val-000.tar: in/d.png")


def test_shards_that_are_none(folder: Path, tmp_path: Path) -> None:
    data = write_shards(folder, tmp_path / "shards", 2)
    with pytest.raises(ValueError, match=r"no split 'test': expected one of its _info\.json"):
        WebDataset(str(data), "test")
    with pytest.raises(FileNotFoundError, match="has no shard .*val-002"):
        WebDataset(str(data), "val-{000..002}.tar")
    with pytest.raises(ValueError, match="must lie in"):
        WebDataset(str(data), "../data-{0..1}.tar")
    with pytest.raises(FileNotFoundError, match="there is no pipe:touch harm"):
        WebDataset("pipe:touch harm", "val")
    with pytest.raises(FileNotFoundError, match="has no shard"):
        WebDataset(str(data), "pipe:touch harm.tar")
    assert not Path("harm").exists()
    by_name = WebDataset(str(data), "val-{000..001}.tar|10")
    assert by_name.num_images == 10 and len(by_name.shards) == 2
    with pytest.raises(ValueError, match="'wds' does not say how many classes it has: give num_classes"):
        loaders(data, **{**WDS, "num_classes": None})
    with pytest.raises(ValueError, match=r"flower_\d\.jpg has label 1: expected one from 0 to 0"):
        list(loaders(data, **{**WDS, "num_classes": 1}).val())
    with pytest.raises(ValueError, match="repeated_aug is for image files.*'wds': expected 0, got 3"):
        loaders(data, **WDS, repeated_aug=3)
    unknown = {**WDS, "train_split": "train-{000..001}.tar", "val_split": "val-{000..001}.tar"}
    with pytest.raises(ValueError, match="train_images"):
        loaders(data, **unknown)
    opened = loaders(data, train_images=6, **unknown)
    assert (opened.steps_per_epoch, opened.val_images) == (3, None)
    assert len(list(opened.train(0))) == 3 and len(fingerprints(opened.val())) == 10


def test_a_stream_of_nothing_readable_ends_the_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    for path in (tmp_path / "data").rglob("*.jpg"):
        path.write_bytes(b"")
    data = write_shards(tmp_path / "data", tmp_path / "shards", 1)
    with pytest.raises(RuntimeError, match="too many images in a row"):
        list(loaders(data, **WDS).train(0))


@pytest.mark.parametrize(("files", "world_size", "workers"), [(1, 1, 0), (3, 1, 2), (4, 2, 2), (3, 2, 1)])
def test_streamed_files(spoilt: Path, tmp_path: Path, files: int, world_size: int, workers: int) -> None:
    """Of Hugging Face's: each image once in evaluation, and full epochs in training."""
    parquet = write_parquet(spoilt, tmp_path / "parquet", files)
    fields = {"dataset": f"hfids/{parquet}", "train_images": 14, "augment": False, "workers": workers}
    parts, reports, seen = [], [], []
    for rank in range(world_size):
        opened = loaders(tmp_path / "cache", rank, world_size, **fields)
        assert opened.num_classes == 2
        batches = list(opened.val())
        parts += fingerprints(batches)
        reports += [report.path.rpartition(": ")[2] for batch in batches for report in batch.unreadable]
        training = list(opened.train(1))
        assert [len(batch.labels) for batch in training] == [2] * opened.steps_per_epoch
        assert_equal(list(opened.train(1, 1)), training[1:])
        seen += fingerprints(training)
    assert sorted(parts) == fingerprints(loaders(spoilt).val())
    assert sorted(reports) == [f"flower_{number}.jpg" for number in range(4)]
    assert set(seen) <= set(fingerprints(loaders(spoilt, augment=False).train(0)))


def test_shuffling_loses_nothing_and_is_bounded() -> None:
    samples = [Encoded(b"", number, "") for number in range(100)]
    order = [sample.label for sample in shuffled(samples, 0, size=10)]  # type: ignore[union-attr]
    assert sorted(order) == list(range(100)) and order != list(range(100))
    assert all(label < place + 11 for place, label in enumerate(order))
    again = [sample.label for sample in shuffled(samples, 1, size=10)]  # type: ignore[union-attr]
    assert again != order
