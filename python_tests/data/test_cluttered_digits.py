"""Cluttered digits: always the same image, made of what it should be made of, with a true mask."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from evit_ext.data import DIFFICULTIES, ClutteredDigits, Difficulty, denormalize, object_patches
from evit_ext.data import cluttered_digits as module
from evit_ext.data.digits import load_scans

# A digit of exactly 8 pixels at full brightness and nothing else: the scan itself, somewhere.
BARE = Difficulty(digit_size=(0.25, 0.25), digit_brightness=(1, 1), num_distractors=(0, 0))


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_an_item_does_not_depend_on_its_batch(difficulty: str) -> None:
    data = ClutteredDigits("train", 48, size=200, seed=3, epoch=5, difficulty=difficulty)
    whole = data.render(range(200))
    for indices in ([7], [199, 0, 7, 7], list(range(199, 100, -1))):
        part = data.render(indices)
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours, theirs[indices])
    image, label = data[-1]
    assert torch.equal(image, whole.images[199])
    assert label == whole.labels[199]
    assert torch.equal(data.mask(7), whole.masks[7])
    assert torch.equal(data.object_patches(7, 8), object_patches(whole.masks[7:8], 8)[0])


def test_an_item_does_not_depend_on_the_workers() -> None:
    data = ClutteredDigits("test", 32, size=24)
    images = [torch.cat([x for x, _ in DataLoader(data, 5, num_workers=n)]) for n in (0, 2)]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], data.render(range(24)).images)


def test_images_are_those_of_every_machine() -> None:
    """The data set's definition: who changes these sums changes every published figure."""
    sums = {
        name: hashlib.sha256(
            (denormalize(ClutteredDigits("test", seed=1, difficulty=name).render(range(64)).images) * 255)
            .round()
            .byte()
            .numpy()
            .tobytes()
        ).hexdigest()[:16]
        for name in DIFFICULTIES
    }
    assert sums == {"easy": "fa760ac21294abcb", "hard": "c3cff2a7395fd156"}


def test_keys_tell_images_apart() -> None:
    base: dict[str, Any] = {"split": "train", "seed": 0, "epoch": 0, "size": 64}
    reference = ClutteredDigits(**base).render(range(64)).images
    for change in ({"seed": 1}, {"seed": -1}, {"epoch": 1}, {"split": "test"}, {"seed": 2**63}):
        other = ClutteredDigits(**{**base, **change}).render(range(64)).images
        same = (reference == other).flatten(1).all(dim=1)
        assert not same.any(), change
    moved = ClutteredDigits(**base)
    moved.set_epoch(1)
    assert torch.equal(
        moved.render(range(64)).images, ClutteredDigits(**{**base, "epoch": 1}).render(range(64)).images
    )


def test_all_images_differ() -> None:
    images = ClutteredDigits("test", 32, size=2000).render(range(2000)).images
    assert len({image.numpy().tobytes() for image in images}) == 2000


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_bare_digit_is_a_scan_of_its_split(split: str) -> None:
    data = ClutteredDigits(split, 32, size=300, difficulty=BARE)
    batch = data.render(range(300))
    scans, labels = load_scans(split)
    gray = (denormalize(batch.images) * 16).round().int()
    tops, lefts = set(), set()
    for index in range(300):
        scan = torch.from_numpy(scans[index % len(scans)].copy()).int()
        assert batch.labels[index] == labels[index % len(scans)]
        windows = gray[index].unfold(0, 8, 1).unfold(1, 8, 1)  # [25, 25, 8, 8]
        found = (windows == scan).all(dim=(2, 3)).nonzero()
        assert len(found) == 1
        assert gray[index].sum() == scan.sum()
        top, left = found[0].tolist()
        assert torch.equal(batch.masks[index, top : top + 8, left : left + 8], scan >= 4)
        assert batch.masks[index].sum() == (scan >= 4).sum()
        tops.add(top)
        lefts.add(left)
    # Every place from one edge to the other: 300 draws miss one of 25 with probability 1e-4.
    assert tops == lefts == set(range(25))


def test_distractors_are_pieces_and_lie_behind_the_digit() -> None:
    one = Difficulty(
        digit_brightness=(1, 1), num_distractors=(1, 1), distractor_brightness=(0.5, 0.5), piece=(3, 3)
    )
    data = ClutteredDigits("train", 64, size=100, difficulty=one)
    none = data.with_difficulty(replace(one, num_distractors=(0, 0)))
    assert none.size == 100
    cluttered, bare = data.render(range(100)), none.render(range(100))
    assert torch.equal(cluttered.masks, bare.masks)
    assert torch.equal(cluttered.labels, bare.labels)
    with_piece, without = denormalize(cluttered.images), denormalize(bare.images)
    added = with_piece > without + 1e-4
    assert (with_piece >= without - 1e-4).all()
    assert added.flatten(1).any(dim=1).float().mean() > 0.9
    assert with_piece[added].max() <= 0.5 + 0.01
    for extra in added:
        rows, columns = extra.any(dim=1).nonzero(), extra.any(dim=0).nonzero()
        # 3 of 8 scan pixels of a scan of at most 32 pixels, and half a scan pixel of blur on either side.
        if len(rows):
            assert rows.max() - rows.min() < 12 + 4
            assert columns.max() - columns.min() < 12 + 4


def test_number_of_distractors_varies_within_its_range() -> None:
    few = Difficulty(num_distractors=(0, 1), distractor_brightness=(1, 1))
    data = ClutteredDigits("train", 64, size=400, difficulty=few)
    bare = data.with_difficulty(replace(few, num_distractors=(0, 0))).render(range(400)).images
    differs = (data.render(range(400)).images != bare).flatten(1).any(dim=1).float().mean()
    assert 0.4 < differs < 0.6


def test_canvases_are_exact() -> None:
    """Sixteen pieces on top of each other still add up as integers do: float32 loses nothing."""
    rng = np.random.default_rng(0)
    shape = (3, module.MAX_DISTRACTORS)
    glyphs = (rng.integers(0, 17, (*shape, 8, 8)) * module.BRIGHTNESS_ONE).astype(np.float32)
    place = [rng.integers(-4, 4, shape) for _ in range(2)]
    extent = rng.integers(8, 33, shape)
    first = [rng.integers(0, 4, shape) for _ in range(2)]
    drawn = module._paste(glyphs, 32, *place, extent, *first)
    wide = [
        module.interpolation_weights(32, p, extent, f).astype(np.int64)
        for p, f in zip(place, first, strict=True)
    ]
    expected = np.einsum("bgyi,bgij,bgxj->byx", wide[0], glyphs.astype(np.int64), wide[1])
    assert expected.max() > 2**20
    assert (drawn == expected).all()


def test_random_integers_are_uniform_and_independent() -> None:
    draws = module._Random((1, 2, 3), np.arange(20000)).integers(-2, 7, 2)
    assert draws.shape == (20000, 2)
    counts = np.bincount(draws[:, 0] + 2, minlength=10)
    # Ten cells of 2,000 expected each: chi-square with 9 degrees of freedom, 99.99 % below 33.7.
    assert ((counts - 2000) ** 2 / 2000).sum() < 33.7
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03


def test_workers_draw_the_same() -> None:
    data = ClutteredDigits(size=50)
    state = torch.get_rng_state()
    drawn = list(data.batches(16, shuffle=True, workers=2))
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(drawn, data.batches(16, shuffle=True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_batches_cover_an_epoch() -> None:
    data = ClutteredDigits("test", 32, size=50, epoch=2)
    plain = torch.cat([batch.images for batch in data.batches(16)])
    assert torch.equal(plain, data.render(range(50)).images)
    assert [len(batch.labels) for batch in data.batches(16, drop_last=True)] == [16, 16, 16]
    shuffled = torch.cat([batch.images for batch in data.batches(16, shuffle=True)])
    assert not torch.equal(shuffled, plain)
    assert {x.numpy().tobytes() for x in shuffled} == {x.numpy().tobytes() for x in plain}
    assert torch.equal(shuffled, torch.cat([batch.images for batch in data.batches(16, shuffle=True)]))
    data.set_epoch(3)
    labels = torch.cat([batch.labels for batch in data.batches(16, shuffle=True)])
    data.set_epoch(2)
    assert not torch.equal(labels, torch.cat([batch.labels for batch in data.batches(16, shuffle=True)]))


def test_every_scan_is_shown_equally_often() -> None:
    data = ClutteredDigits("test", size=2 * len(load_scans("test")[1]))
    labels = torch.cat([batch.labels for batch in data.batches(363)])
    assert torch.equal(labels, torch.from_numpy(load_scans("test")[1].copy()).repeat(2))


def test_a_black_digit_has_no_mask() -> None:
    black = replace(BARE, digit_brightness=(0, 0))
    batch = ClutteredDigits("test", 32, size=4, difficulty=black).render(range(4))
    assert not batch.masks.any()
    assert not denormalize(batch.images).round(decimals=4).any()


def test_empty_batch() -> None:
    batch = ClutteredDigits("test", 32).render([])
    assert batch.images.shape == (0, 3, 32, 32)
    assert batch.labels.shape == (0,)
    assert object_patches(batch.masks, 8).shape == (0, 16)


def test_object_patches_against_a_loop() -> None:
    masks = torch.rand(40, 24, 24) < torch.rand(40, 1, 1) * 0.3
    masks[0] = False
    masks[1] = False
    masks[1, 9, 17] = True  # too little for any patch: the best one counts
    found = object_patches(masks, 8, min_coverage=0.1)
    for mask, row in zip(masks, found, strict=True):
        covered = [int(mask[y : y + 8, x : x + 8].sum()) for y in (0, 8, 16) for x in (0, 8, 16)]
        most = max(covered)
        assert row.tolist() == [c > 0 and (c >= 6.4 or c == most) for c in covered]
    assert not found[0].any()
    assert found[1].nonzero().tolist() == [[5]]


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_the_digit_is_somewhere_and_not_everywhere(difficulty: str) -> None:
    masks = ClutteredDigits("test", difficulty=difficulty).render(range(500)).masks
    patches = object_patches(masks, 8).sum(dim=1)
    assert patches.min() >= 2
    assert patches.max() <= 25
    assert 0.08 < patches.float().mean() / 64 < 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "split must be one of 'train', 'test', got 'val'"),
        ({"canvas_size": 19}, "canvas_size 19 is too small: its smallest digit would have 7 pixels"),
        ({"canvas_size": 0}, "too small"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"difficulty": "medium"}, "difficulty must be a Difficulty or one of 'easy', 'hard', got 'medium'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClutteredDigits(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"digit_size": (0.5, 0.4)},
        {"digit_size": (0.5, 1.2)},
        {"num_distractors": (-1, 3)},
        {"num_distractors": (1, 17)},
        {"piece": (0, 3)},
        {"distractor_brightness": (float("nan"), 1)},
    ],
)
def test_bad_difficulties(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be a range"):
        Difficulty(**change)


def test_other_errors() -> None:
    data = ClutteredDigits("test", size=10)
    for index in (10, -11):
        with pytest.raises(IndexError, match="out of range for 10 items"):
            data[index]
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        data.batches(0)
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        data.batches(5, workers=-1)
    with pytest.raises(ValueError, match="patch_size 7 does not divide the canvas' 64 pixels"):
        data.object_patches(0, 7)
    with pytest.raises(ValueError, match=r"masks must have shape \[B, S, S\], got \[3, 8\]"):
        object_patches(torch.zeros(3, 8, dtype=torch.bool), 8)
