"""A run's batches: the same bits for any number of processes and workers, and entered anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from image_data import CLASSES, IMAGE, write_parquet, write_tars
from open_loaders import assert_equal, fingerprints, loaders
from torch import Tensor

from evit_ext.data import ClutteredDigits, Digits
from evit_ext.data.token_label_maps import read_label_map
from evit_ext.training.loaders import Batch


def save_token_labels(folder: Path, root: Path) -> Path:
    for number, path in enumerate(sorted((folder / "train").rglob("*.jpg"))):
        generator = torch.Generator().manual_seed(number)
        scores = 5 * torch.rand(1, 6, 6, generator=generator)
        classes = torch.randint(0, 2, (1, 6, 6), generator=generator)
        target = root / path.parent.name / f"{path.stem}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([scores, classes]).half(), target)
    return root


AUGMENTED = {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "repeated_aug": 2}


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_number_of_processes_changes_no_bit(folder: Path, world_size: int) -> None:
    alone = list(loaders(folder, accumulation=6, micro_batch=1, **AUGMENTED).train(1))
    assert len(alone) == 2 * 6
    ranks = [
        list(
            loaders(folder, rank, world_size, micro_batch=1, accumulation=6 // world_size, **AUGMENTED).train(
                1
            )
        )
        for rank in range(world_size)
    ]
    dealt = [ranks[m % world_size][m // world_size] for m in range(len(alone))]
    assert_equal(dealt, alone)


def test_neither_do_workers_nor_where_an_epoch_is_entered(spoilt: Path, tmp_path: Path) -> None:
    labels = save_token_labels(spoilt, tmp_path / "labels")
    fields = {**AUGMENTED, "token_labels": str(labels), "patch_grid": (4, 4), "label_smoothing": 0.1}
    here = list(loaders(spoilt, accumulation=2, **fields).train(0))
    assert any(batch.unreadable for batch in here)
    for workers in (1, 2):
        assert_equal(list(loaders(spoilt, accumulation=2, workers=workers, **fields).train(0)), here)
    opened = loaders(spoilt, accumulation=2, workers=2, **fields)
    assert_equal(list(opened.train(0, 2)), here[4:])
    assert list(opened.train(0, 3)) == []


def test_the_process_own_random_numbers_are_left_alone(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(loaders(folder, workers=workers, **AUGMENTED).train(0))
        assert torch.equal(torch.get_rng_state(), before)


def test_epochs_and_seeds_differ(folder: Path) -> None:
    opened = loaders(folder)
    runs = [fingerprints(opened.train(epoch)) for epoch in (0, 1)]
    runs += [fingerprints(loaders(folder, seed=1).train(0)), fingerprints(opened.train(0))]
    assert runs[0] == runs[3]
    assert runs[0] != runs[1] and runs[0] != runs[2]


def test_every_image_once_an_epoch(folder: Path) -> None:
    """Shown as in evaluation, an epoch of the validation images is what evaluation sees."""
    data = {"train_split": "val", "augment": False}
    opened = loaders(folder, micro_batch=5, **data)
    assert (opened.num_classes, opened.steps_per_epoch, opened.train_images, opened.val_images) == (
        2,
        2,
        10,
        10,
    )
    assert fingerprints(opened.train(0)) == fingerprints(opened.train(3)) == fingerprints(opened.val())
    dropped = loaders(folder, micro_batch=4, **data)
    assert (dropped.steps_per_epoch, dropped.train_images) == (2, 8)
    seen = fingerprints(dropped.train(0))
    assert len(set(seen)) == 8 and set(seen) < set(fingerprints(opened.val()))


def test_repeated_augmentation_shows_half_the_images_twice(folder: Path) -> None:
    data = {"train_split": "val", "micro_batch": 5, "repeated_aug": 2}
    seen = fingerprints(loaders(folder, augment=False, **data).train(0))
    assert len(seen) == 10 and len(set(seen)) == 5
    assert len(set(fingerprints(loaders(folder, **data).train(0)))) == 10


def test_tars_and_arrow_give_the_same_batches(folder: Path, tmp_path: Path) -> None:
    expected = list(loaders(folder, **AUGMENTED).train(0))
    tars = write_tars(folder, tmp_path / "tars")
    for workers in (0, 2):
        assert_equal(list(loaders(tars, workers=workers, **AUGMENTED).train(0)), expected)
    parquet = write_parquet(folder, tmp_path / "parquet")
    arrow = {"dataset": f"hfds/{parquet}", "workers": 1, **AUGMENTED}
    opened = loaders(tmp_path / "cache", **arrow)
    assert opened.num_classes == 2
    assert_equal(list(opened.train(0)), expected)
    assert fingerprints(opened.val()) == fingerprints(loaders(folder).val())


def test_token_labels_follow_the_image(folder: Path, tmp_path: Path) -> None:
    """Not cropped, every patch has its cell of the map, or that of the mirrored one."""
    root = save_token_labels(folder, tmp_path / "labels")
    fields = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "color_jitter": 0.0, "interpolation": "bilinear"}
    for path in (folder / "train").rglob("*.jpg"):
        assert (root / path.parent.name / f"{path.stem}.pt").is_file()
    # Square images, so that a crop of all of the area is the image.
    square = tmp_path / "square"
    shutil.copytree(folder, square)
    from PIL import Image

    for path in square.rglob("*.jpg"):
        Image.open(path).resize((48, 48)).save(path)
    opened = loaders(square, token_labels=str(root), patch_grid=(6, 6), **fields)
    maps: list[tuple[Tensor, int]] = []
    for label, name in enumerate(CLASSES):
        for path in sorted((root / name).iterdir()):
            scores, classes = read_label_map(path, 2)
            dense = torch.zeros(2, 6, 6).scatter_(0, classes, scores).softmax(0)
            maps += [(dense.flatten(1).T, label), (dense.flip(-1).flatten(1).T, label)]
    seen = set()
    for batch in opened.train(0):
        assert batch.token_labels is not None and batch.token_labels.shape == (2, 36, 2)
        for labels, label in zip(batch.token_labels, batch.labels.tolist(), strict=True):
            (match,) = [
                number for number, (dense, _) in enumerate(maps) if torch.allclose(labels, dense, atol=1e-4)
            ]
            assert maps[match][1] == label
            seen.add(match)
    assert len({number // 2 for number in seen}) == 14 and {number % 2 for number in seen} == {0, 1}
    assert next(opened.val()).token_labels is None
    (root / "china" / "0.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"china/0\.pt"):
        list(opened.train(0))


def test_digits_need_no_files() -> None:
    opened = loaders(None, dataset="digits", micro_batch=50)
    assert (opened.num_classes, opened.steps_per_epoch, opened.val_images) == (10, 28, len(Digits("test")))
    seen = fingerprints(opened.train(0))
    digits = Digits("train", 32)
    everything = sorted((digits[i][0].numpy().tobytes(), digits[i][1]) for i in range(len(digits)))
    assert len(seen) == 1400 and set(seen) <= set(everything)
    assert len(fingerprints(opened.val())) == len(Digits("test"))


def test_cluttered_digits_are_new_in_each_epoch_and_the_test_is_fixed() -> None:
    fields = {"dataset": "cluttered-digits", "train_images": 50, "difficulty": "hard", "micro_batch": 10}
    opened = loaders(None, seed=3, **fields)
    assert (opened.num_classes, opened.steps_per_epoch, opened.val_images) == (
        10,
        5,
        10 * len(Digits("test")),
    )
    digits = ClutteredDigits("train", 32, 50, seed=3, epoch=2, difficulty="hard")
    canvases = digits.render(range(50))
    assert fingerprints(opened.train(2)) == fingerprints([Batch(canvases.images, canvases.labels)])
    assert fingerprints(opened.train(1)) != fingerprints(opened.train(2))
    assert_equal(list(loaders(None, seed=3, workers=2, **fields).train(2)), list(opened.train(2)))
    assert_equal([next(loaders(None, seed=4, **fields).val())], [next(opened.val())])


def test_the_image_can_be_set_after_the_model_is_built(folder: Path) -> None:
    opened = loaders(folder)
    expected = list(opened.val())
    opened.image = None
    with pytest.raises(ValueError, match="image must say how the model wants its images"):
        next(opened.val())
    opened.image = {**IMAGE, "crop_mode": "squash"}
    assert next(opened.val()).images.shape == expected[0].images.shape
    assert not torch.equal(next(opened.val()).images, expected[0].images)


def test_evaluation_needs_no_training_data(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "val", tmp_path / "val")
    with pytest.raises(FileNotFoundError, match="no split 'train'"):
        loaders(tmp_path)
    opened = loaders(tmp_path, training=False)
    assert (opened.num_classes, opened.steps_per_epoch, opened.val_images) == (2, 0, 10)
    assert len(fingerprints(opened.val())) == 10
    with pytest.raises(ValueError, match="no training data"):
        opened.train(0)


def test_training_can_do_without_validation_data(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "train", tmp_path / "train")
    opened = loaders(tmp_path, val_split="")
    assert opened.val_images is None
    assert len(list(opened.train(0))) == 7
    with pytest.raises(ValueError, match="val_split is empty"):
        opened.val()


def test_settings_that_make_no_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="14 images, fewer than the 16 of one batch"):
        loaders(folder, micro_batch=16)
    with pytest.raises(ValueError, match="1 processes make 4 images a step, batch_size is 5"):
        loaders(folder, micro_batch=4, batch_size=5)
    with pytest.raises(ValueError, match="unknown dataset 'imagenet'"):
        loaders(folder, dataset="imagenet")
    with pytest.raises(ValueError, match="num_classes is 1, but the data has 2 classes"):
        loaders(folder, num_classes=1)
    assert loaders(folder, num_classes=5).num_classes == 5
    with pytest.raises(ValueError, match="train_images is for streams"):
        loaders(folder, train_images=5)
    with pytest.raises(ValueError, match="token_labels need augment"):
        loaders(folder, token_labels=str(tmp_path), augment=False)
    with pytest.raises(ValueError, match="token_labels need images that have names"):
        loaders(None, dataset="digits", token_labels=str(tmp_path))
    with pytest.raises(ValueError, match="repeated_aug is for image files.*'digits': expected 0, got 3"):
        loaders(None, dataset="digits", repeated_aug=3)
    with pytest.raises(ValueError, match=r"not augmented: .*, got 'rand-m9' and 0\.0"):
        loaders(None, dataset="digits", auto_augment="rand-m9")
    with pytest.raises(ValueError, match="patch_grid must be"):
        loaders(folder, token_labels=str(tmp_path)).train(0)
    with pytest.raises(ValueError, match=r"first_step must be in \[0, 7\], got 8"):
        loaders(folder).train(0, 8)


def test_classes_that_differ_are_named(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    (data / "val" / "flower").rename(data / "val" / "tree")
    message = "val has the class tree, which the training data does not know; it knows the class flower"
    with pytest.raises(ValueError, match=message):
        loaders(data)


def test_validation_data_may_lack_a_class(folder: Path, tmp_path: Path) -> None:
    """Its folder may be empty or missing: the others keep their numbers, and it is said."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    expected = [label for _, label in fingerprints(loaders(data).val()) if label == 1]
    for path in (data / "val" / "china").iterdir():
        path.unlink()
    for _ in range(2):
        opened = loaders(data)
        assert [label for _, label in fingerprints(opened.val())] == expected
        assert opened.classes == ["china", "flower"] and opened.val_images == len(expected)
        said = "the validation data has no image of the class china, which the training data has"
        assert said in opened.words
        shutil.rmtree(data / "val" / "china", ignore_errors=True)


def test_a_transform_that_fails_on_an_image_is_that_images_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training another image takes its place, in evaluation it is left out; the run goes on."""
    opened = loaders(folder, augment=False)
    transform = opened._transform(False)
    calls = []

    def fails_once(image: object) -> Tensor:
        calls.append(image)
        if len(calls) == 3:
            raise OverflowError("too wide")
        return transform(image)  # type: ignore[arg-type]

    monkeypatch.setattr(opened, "_transform", lambda training: fails_once)
    val = list(opened.val())
    assert sum(len(batch.labels) for batch in val) == 9
    (report,) = [report for batch in val for report in batch.unreadable]
    assert report.path.endswith(".jpg") and "cannot be prepared (" in report.reason
    assert report.reason.endswith("OverflowError: too wide")
    calls.clear()
    train = list(opened.train(0))
    assert sum(len(batch.labels) for batch in train) == 14
    assert len([report for batch in train for report in batch.unreadable]) == 1


def test_pictures_training_and_evaluation_see_the_same(tmp_path: Path) -> None:
    """The camera's orientation and 16 bits, in each of them."""
    import numpy as np
    from PIL import Image

    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
        Image.fromarray(ramp).save(tmp_path / split / "a" / "x.png")
        turned = Image.fromarray((ramp // 257).astype(np.uint8))
        exif = turned.getexif()
        exif[0x0112] = 3
        turned.save(tmp_path / split / "b" / "x.png", exif=exif)
    opened = loaders(tmp_path, augment=False, crop_pct=1.0)
    seen = {}
    for kind, batches in (("train", opened.train(0)), ("val", opened.val())):
        (batch,) = batches
        seen[kind] = dict(zip(batch.labels.tolist(), batch.images, strict=True))
    for label in (0, 1):
        assert torch.equal(seen["train"][label], seen["val"][label])
    # The second is the first turned by 180 degrees; neither is white.
    assert torch.allclose(seen["val"][0], seen["val"][1].flip(1, 2), atol=0.03)
    assert seen["val"][0].std() > 1


def test_a_strip_of_pixels_is_unreadable(folder: Path, tmp_path: Path) -> None:
    """A file of 94 bytes would take more than a gigabyte when its shorter side is resized."""
    from PIL import Image

    data = tmp_path / "data"
    shutil.copytree(folder, data)
    Image.new("L", (100_000, 1)).save(data / "val" / "china" / "0.jpg", "PNG")
    opened = loaders(data)
    (report,) = [report for batch in opened.val() for report in batch.unreadable]
    assert "resized to a shorter side of 36 it would have 129600000" in report.reason
